"""Where a round's new rows come from: a pool of the user's, or a model that writes them. Both make a `Collect` for `rounds.grow`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.errors import UsageError
from curate.jobs.collect.pick import Candidate, Known, by_function, by_group, fresh, nearest
from curate.jobs.collect.rounds import Collect, Round, read_rows
from curate.recipe.bounds import read_text
from curate.recipe.load import Loaded
from curate.recipe.objects import load_object
from curate.recipe.sources import Source, inherit
from curate.rows import Example

if TYPE_CHECKING:
    from curate.jobs.collect.generate import Template
    from curate.passes.sampling.reasoned import Thinking
    from curate.passes.sampling.types import Prompt

    Encode = Callable[[Any, int], Prompt | None]


def from_pool(pool: str, like: str) -> Collect:
    """Rows of a pool, read as the recipe's source is (format, columns): like `states`, `group:COLUMN` or `package.module:function`.

    Raises UsageError where the pool or a column is not there, and where `like` is none of the three.
    """
    kind, _, name = like.partition(":")
    if like != "states" and not (kind and name):
        raise UsageError(f"like: wanted states, group:COLUMN or package.module:function, found {like!r}.")

    def collect(asked: Round) -> tuple[list[Candidate], dict[str, int]]:
        source = asked.loaded.recipe.source
        assert source is not None
        rows, left_out = fresh(read_rows(asked.loaded, pool_rows(pool, source), "pool", base=Path()), asked.known)
        if like == "states":
            picked = _by_states(asked, rows)
        elif kind == "group":
            picked = by_group(
                [_column(row, name, "the hard rows") for row in asked.hard],
                [_column(row, name, pool) for row in rows],
                asked.take,
                seed=asked.seed,
            )
        else:
            function = load_object(like, what="function", folder=asked.loaded.folder)
            picked = by_function(function, asked.hard, rows, asked.take, seed=asked.seed, name=like)
        return [rows[at] for at in picked], left_out

    return collect


def pool_rows(pool: str, source: Source) -> Source:
    """The pool as a section of the recipe that says nothing but its path."""
    return inherit(Source(path=pool), source)


def check_pool(loaded: Loaded, pool: str, like: str) -> None:
    """What `from_pool` would refuse after a training, said before it: the pool, its rows, a column, a function. Raises as reading does."""
    source = loaded.recipe.source
    assert source is not None
    rows = read_rows(loaded, pool_rows(pool, source), "pool", base=Path())
    kind, _, name = like.partition(":")
    if kind == "group" and name:
        for checked, where in ((rows, pool), (read_rows(loaded, source, "source"), "the recipe's source")):
            for row in checked[:1]:
                _column(row, name, where)
    elif name:
        load_object(like, what="function", folder=loaded.folder)


def _by_states(asked: Round, pool: Sequence[Candidate]) -> list[int]:
    from curate.passes.loading.model import load_model
    from curate.passes.states import prompt_states
    from curate.plan.rendering import limits_for

    recipe = asked.loaded.recipe
    last, engine = asked.checkpoint, recipe.engine
    limits = limits_for(asked.loaded, [row.row for row in asked.hard], last)
    with load_model(last.path, base=last.base, dtype=engine.dtype, device=engine.device) as model:
        hard, free = (
            prompt_states(model, [c.row for c in rows], limits=limits, token_budget=recipe.engine.token_budget)
            for rows in (asked.hard, pool)
        )
    return nearest(hard, free, asked.take, seed=asked.seed)


def _column(row: Candidate, name: str, where: str) -> Any:
    if name not in row.columns:
        has = ", ".join(sorted(row.columns)) or "none"
        raise UsageError(f"like group:{name}: {where} has no column {name!r}; its columns besides the texts: {has}.")
    return row.columns[name]


def from_model(template: Path, *, generator: str | None = None, agree: float = 0.6) -> Collect:
    """Rows that a model writes (curate/jobs/collect/generate.py): by the round's last checkpoint, or `generator`, a model's folder or hub id.

    Problems are written at temperature 1 up to a blank line or the end marker, answers are sampled as the recipe samples them.
    """
    from curate.jobs.collect.generate import Template

    try:
        text = read_text(template)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{template}: wanted a text with {{1}}, {{2}}, … for hard rows' problems ({getattr(error, 'strerror', None) or error})."
        ) from None
    shots = Template.of(text, file=str(template))

    return lambda asked: _written(asked, shots, generator, agree)


def _written(
    asked: Round, template: Template, generator: str | None, agree: float
) -> tuple[list[Candidate], dict[str, int]]:
    """The rows that the model writes for this round, and how many were left out for what reason."""
    from curate.jobs.collect.generate import generate
    from curate.measurements.grading import grader
    from curate.passes.sampling.open import open_sampler
    from curate.passes.sampling.reasoned import Reasoned
    from curate.passes.sampling.types import Sampling
    from curate.workflow.runners.prompts import sampling_of

    recipe, loaded = asked.loaded.recipe, asked.loaded
    model, base = _generator(asked, generator)
    answering, writing, thinking = _prompts(asked, model, base)
    s = recipe.sampling
    with open_sampler(
        recipe.engine.sampler,
        model,
        base=base,
        dtype=recipe.engine.dtype,
        device=recipe.engine.device,
        max_length=recipe.tokens.max_length,
        seed=asked.seed,
        server=recipe.server.model_dump(),
    ) as sampler:
        return generate(
            asked.hard,
            asked.take,
            template=template,
            known=Known(asked.known),
            sampler=sampler if thinking is None else Reasoned(sampler, thinking),
            encode=answering,
            encode_plain=writing,
            grader=grader(s.grader, folder=loaded.folder),
            writing=Sampling(1, 1.0, s.top_p, s.max_new_tokens, ("\n\n",)),
            answering=sampling_of(s, _number(s)),
            agree=agree,
            seed=asked.seed,
        )


def _generator(asked: Round, name: str | None) -> tuple[str, str | None]:
    """The model that writes, and its base where it is an adapter. name: a folder or hub id; None: the round's last checkpoint."""
    from curate.models.checkpoints import find_base, find_model
    from curate.models.layouts import check_pickles
    from curate.passes.loading.adapter_config import is_adapter

    if not name:
        return asked.checkpoint.path, asked.checkpoint.base
    folder = asked.loaded.folder
    model = find_model(name, folder)
    base = find_base(model, folder) if is_adapter(model) else None
    check_pickles([model, base], allowed=asked.loaded.recipe.models.allow_pickle)
    return str(model), None if base is None else str(base)


def _prompts(asked: Round, model: str, base: str | None) -> tuple[Encode, Encode, Thinking | None]:
    """How a problem becomes a prompt to answer, as the recipe asks its rows, how a text becomes one to be gone on with, and how the model thinks
    before it answers.
    """
    from curate.models.checkpoints import Checkpoint
    from curate.passes.loading.adapter_config import tokenizer_folder
    from curate.passes.sampling.reasoned import Thinking
    from curate.passes.sampling.types import Prompt
    from curate.passes.thinking import tags_of
    from curate.passes.tokenizer import load_tokenizer
    from curate.passes.tokens import encode_prompt
    from curate.plan.identity import few_shot_text
    from curate.plan.rendering import limits_for
    from curate.workflow.runners.prompts import with_template_settings

    tokenizer = load_tokenizer(tokenizer_folder(model, base))
    limits = limits_for(asked.loaded, [row.row for row in asked.hard], Checkpoint(model, "", base=base))
    context = {"system": asked.loaded.recipe.sampling.system, "few_shot": few_shot_text(asked.loaded)}

    sampling = asked.loaded.recipe.sampling
    through_template = limits.chat or any(not isinstance(row.row.prompt, str) for row in asked.hard)
    tags = tags_of(tokenizer) if sampling.thinking_tags == "auto" and through_template else sampling.thinking_tags
    thinking = Thinking.of(tags, tokenizer, sampling.thinking_tokens) if tags not in (None, "auto") else None

    def answering(text: Any, seed: int) -> Prompt | None:
        row = with_template_settings(Example(text), sampling.chat_template_kwargs)
        tokens = encode_prompt(row, tokenizer, limits=limits, **context)
        args = row.template_args
        return None if tokens.problem else Prompt(tokens.ids, tokens.text, tokens.messages, seed, template_args=args)

    def writing(text: Any, seed: int) -> Prompt | None:
        tokens = encode_prompt(Example(text), tokenizer, limits=replace(limits, chat=False))
        return None if tokens.problem else Prompt(tokens.ids, tokens.text, tokens.messages, seed)

    return answering, writing, thinking


def _number(sampling: Any) -> int:
    """Answers a problem. UsageError where the recipe leaves it to the row: what is collected has a majority of a fixed number."""
    if isinstance(sampling.samples, int):
        return sampling.samples
    raise UsageError("sampling.samples: collecting takes a number of answers a problem, `--set sampling.samples=8`.")
