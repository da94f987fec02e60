"""How a recipe's rows become text for a model: plain, or as messages through its chat template; and what is said of that.

    tokens.chat    auto      question/answer rows as messages where the model has a template; prompt/completion text plain, as TRL trains it
                   always    every row as messages          never    rows of plain text stay plain

Rows of messages always go through the template. What was measured as messages is exported as messages: it trains as it was measured.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from curate.errors import ModelError, UsageError
from curate.passes.chat import DATE, Template
from curate.passes.thinking import opens
from curate.rows import Row

if TYPE_CHECKING:
    from curate.measurements import Measurement
    from curate.models.checkpoints import Checkpoint
    from curate.models.fingerprints import FingerprintCache
    from curate.passes.tokens import Limits, Turns
    from curate.recipe.load import Loaded
    from curate.store import Store

QUESTIONS = {"question_answer", "prompts"}  # the formats that auto asks as a chat
OF_MESSAGES = {"messages", "sharegpt", "implicit", "sharegpt_preference"}  # formats without plain text


@dataclass(frozen=True)
class Rendering:
    """How rows become text for one tokenizer. chat: rows of plain text go through the template. messages: there are rows of messages too.

    plain: there are rows of plain text. template: what is known of the tokenizer's, None where it has none (or where a server has it).
    turns: tokens.turns. tags: sampling.thinking_tags.
    """

    chat: bool
    plain: bool
    messages: bool
    template: Template | None = None
    pairs: bool = False
    turns: Turns = "last"
    tags: Sequence[str] | Literal["auto"] | None = "auto"

    def params(self, measurement: Measurement) -> dict[str, Any]:
        """What a measurement's values depend on here, beyond the tokenizer. Empty where rows are rendered as they were before 2026-11."""
        params: dict[str, Any] = {"chat": True} if self.chat else {}
        if self.template is None or not (self.chat or self.messages):
            return params
        if self.template.dated:
            params["template_date"] = f"{DATE:%Y-%m-%d}"
        of_prompts = measurement.reads == "sample" or measurement.prompt_only
        if self.template.end is None and self.template.eos and not of_prompts:
            params["template_end"] = "none" if self.template.refuses is None else "unknown"
        if self.pairs and not self.template.keeps_reasoning:
            params["same_tokens"] = "unknown"
        tags = self.template.thinks_in if self.tags == "auto" else self.tags
        if measurement.reads == "sample" and tags is not None:
            params["thinking"] = list(tags)
            if opens(self.template.prompt_end, tags):  # an answer's text alone does not say that it begins in it
                params["thinking_opened"] = True
            if set(tags) & set(self.template.special):  # a text that was decoded without them does not have them
                params["thinking_shown"] = True
        if self.turns == "all" and measurement.reads != "sample":
            params["turns"] = "all" if self.template.marks_turns else "all, by rendering"
        return params

    def notes(self, model: str, rule: str) -> list[str]:
        """What a user should know before anything is measured. rule: tokens.chat."""
        notes = []
        template = self.template
        if self.chat:
            notes.append(
                f"Rows are asked and measured as messages, through the chat template of {model} (tokens.chat: {rule}), and exported as messages. "
                "`--set tokens.chat=never` keeps them plain text."
            )
        elif self.plain and template is not None and rule == "auto":
            notes.append(
                f"{model} has a chat template, and these rows are plain text (no question/answer rows): they are measured as plain text, as TRL "
                "trains them. If the model is to answer as a chat, `--set tokens.chat=always` (they are exported as messages then); if plain is "
                "meant, `--set tokens.chat=never` says so."
            )
        if template is None or not (self.chat or self.messages):
            return notes
        if template.refuses:
            notes.append(
                f"{model}: {template.refuses.replace('these messages', 'a question with its reply')}, so how it ends a reply is not known. Rows that "
                "it refuses cannot be measured; give them the turns that it asks for, or take another template (chat_template.jinja)."
            )
        elif template.end is None:
            notes.append(
                f"The chat template of {model} ends a reply with no special token: TRL trains none, so none is measured, and a model trained on such "
                "rows does not learn to stop: its answers run to max_new_tokens. A template that writes the end token after the reply mends that."
            )
        elif template.eos and template.end not in template.stops:
            notes.append(
                f"The chat template of {model} ends a reply with {template.end}, which does not end an answer when it is sampled (that is "
                f"{', '.join(template.stops)}): set eos_token_id in generation_config.json, or `sampling.stop: ['{template.end}']`."
            )
        if self.turns == "all":
            notes.append(turns_text(f"of {model}", marked=template.marks_turns))
        if template.dated:
            notes.append(
                f"The chat template of {model} writes today's date into the prompt; {DATE:%d %B %Y} stands there in every measurement, so that "
                "values do not depend on the day. TRL and servers write the day's own."
            )
        return notes


def turns_text(whose: str, *, marked: bool) -> str:
    """What a plan and a card say of `tokens.turns: all`. whose: whose chat template it is. marked: whether it has {% generation %}."""
    text = "Every assistant turn of a row counts, all together as its completion (tokens.turns: all), as TRL's assistant_only_loss trains them"
    if marked:
        return f"{text}."
    return (
        f"{text}. The chat template {whose} has no {{% generation %}} around them: where they stand was found by rendering each conversation up to "
        "them, and TRL trains so only with a template that has it (it refuses others, or takes one of its own). "
        "Write {% generation %}…{% endgeneration %} into chat_template.jinja, and measure with that."
    )


class Renderings:
    """The rendering for every model of a recipe. styles: of its rows, as the store has them (None: not known, both may occur)."""

    def __init__(
        self, loaded: Loaded, cache: FingerprintCache, styles: Collection[str] | None, store: Store | None = None
    ):
        self.loaded, self.cache, self.store = loaded, cache, store
        self.styles = {"standard", "conversational"} if styles is None else set(styles)
        self._known: dict[str, Rendering] = {}

    def of(self, checkpoint: Checkpoint) -> Rendering:
        """ModelError where tokens.chat is always and the model has no template; UsageError where auto cannot tell."""
        if not Path(checkpoint.home).is_dir():  # a server's model: its template is its own
            return self._rendering(self.loaded.recipe.tokens.chat == "always", None)
        folder = checkpoint.tokenizer
        if folder not in self._known:
            template = self.cache.template(Path(folder), Path(checkpoint.base or checkpoint.home))
            self._known[folder] = self.with_template(template, checkpoint.label)
        return self._known[folder]

    def with_template(self, template: Template | None, model: str) -> Rendering:
        rule, plain = self.loaded.recipe.tokens.chat, "standard" in self.styles
        if rule == "always" and plain and template is None:
            raise ModelError(
                f"tokens.chat is always, but the tokenizer of {model} has no chat template. Save one beside it (chat_template.jinja), or measure "
                "plain text: `--set tokens.chat=auto`."
            )
        chat = plain and (rule == "always" or (rule == "auto" and template is not None and self._questions()))
        if self.loaded.recipe.tokens.turns == "all" and plain and not chat:
            raise UsageError(
                "tokens.turns: all counts the assistant's turns of a conversation, and there are rows of plain text, which have none. Measure their "
                "completions (`--set tokens.turns=last`), or take them as messages: `--set tokens.chat=always`."
            )
        return self._rendering(chat, template)

    def _rendering(self, chat: bool, template: Template | None) -> Rendering:
        plain, messages = "standard" in self.styles, "conversational" in self.styles
        messages = messages or bool(self.loaded.recipe.targets)
        pairs, turns = self.loaded.recipe.kind == "preference", self.loaded.recipe.tokens.turns
        tags = self.loaded.recipe.sampling.thinking_tags
        return Rendering(chat and plain, plain, messages, template, pairs, turns, tags)

    def _questions(self) -> bool:
        """Whether the recipe's rows are questions with answers, by the format that they were read in."""
        if self.loaded.recipe.kind != "sft":
            return False
        if self.loaded.formats is None:  # nothing was read now: as it was measured
            return self.store is not None and any(m.params.get("chat") for m in self.store.measured())
        formats = set(self.loaded.formats()) - OF_MESSAGES
        if formats & QUESTIONS and formats - QUESTIONS:
            raise UsageError(
                f"tokens.chat: the sources are of several formats ({', '.join(sorted(formats))}): questions with answers would be asked as a chat, "
                "the others as plain text, and an export holds one sort of rows. Say which: `--set tokens.chat=always` or `--set tokens.chat=never`."
            )
        return bool(formats) and formats <= QUESTIONS

    def _some_questions(self) -> bool:
        """Whether any source holds questions with answers; beside others too, where all are asked as plain text."""
        formats = set(self.loaded.formats()) if self.loaded.recipe.kind == "sft" and self.loaded.formats else set()
        return bool(formats & QUESTIONS)

    def notes(self, checkpoints: Iterable[Checkpoint]) -> list[str]:
        """A line for each thing to know of the models' templates, each once."""
        rule = self.loaded.recipe.tokens.chat
        notes: list[str] = []
        for checkpoint in checkpoints:
            if Path(checkpoint.home).is_dir():
                notes += self.of(checkpoint).notes(Path(checkpoint.tokenizer).name, rule)
            elif rule == "auto" and "standard" in self.styles and self._some_questions():
                notes.append(
                    "Question/answer rows are asked as plain text: whether the server's model has a chat template is not known here. "
                    "`--set tokens.chat=always` asks it as a chat."
                )
        return list(dict.fromkeys(notes))


def limits_for(loaded: Loaded, rows: Iterable[Row], checkpoint: Checkpoint) -> Limits:
    """How rows that are prompts and completions become tokens outside a plan, as a recipe over them measures them."""
    from curate.models.fingerprints import FingerprintCache
    from curate.passes.tokens import Limits

    renderings = Renderings(loaded, FingerprintCache(None), {row.style for row in rows})
    tokens = loaded.recipe.tokens
    return Limits(tokens.max_length, tokens.truncation, renderings.of(checkpoint).chat, tokens.turns)


def measured_as(store: Store, recipe: str) -> dict[str, Any]:
    """How the rows of a recipe were rendered when its values were measured: `Rendering.params` of any of them."""
    fingerprints = {use for kept in store.recipes() if kept["name"] == recipe for use in kept["uses"] or ()}
    params: dict[str, Any] = {}
    for measured in store.measured():
        if measured.fingerprint in fingerprints:
            params |= {
                key: value
                for key, value in measured.params.items()
                if key in ("chat", "template_end", "template_date", "turns")
            }
    return params


def card_notes(measured: dict[str, Any], rule: str, styles: Collection[str]) -> list[str]:
    """What a card says of the rendering. measured: of `measured_as`. rule: tokens.chat."""
    notes = []
    if measured.get("chat"):
        notes.append(
            f"Rows were asked and measured as messages, through the model's chat template (tokens.chat: {rule}), and are exported as messages."
        )
    elif "standard" in styles:
        notes.append(f"Rows of plain text were measured as plain text, without a chat template (tokens.chat: {rule}).")
    if measured.get("template_end") == "none":
        notes.append(
            "The model's chat template ends a reply with no special token: none was measured, and a training on these rows teaches none, so answers "
            "run to their longest length."
        )
    if turns := measured.get("turns"):
        notes.append(turns_text("that they were measured with", marked=turns == "all"))
    if day := measured.get("template_date"):
        notes.append(
            f"The model's chat template writes a date into prompts: {day} in every measurement, the day's own in a training."
        )
    return notes


def styles_of(store: Store, sources: list[str], kind: str) -> set[str]:
    """The styles of the rows of some sources: standard (plain text), conversational (messages)."""
    return store.styles(sources or None, kind)
