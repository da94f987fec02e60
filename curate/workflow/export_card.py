"""What goes beside an export's rows: the card that says where they come from, and what trainers' settings are made from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from curate.models.layouts import own_code_notes
from curate.plan.beta import asks_for_beta, beta_of, deviation_text
from curate.plan.rendering import card_notes, measured_as, styles_of
from curate.plan.requests import requested_scores
from curate.recipe.doors import travelling
from curate.recipe.load import Loaded
from curate.scores.flags import ADVICE
from curate.store.sql import quote
from curate.workflow.read import noted

if TYPE_CHECKING:
    from curate.data import Card
    from curate.plan.roles import Roles
    from curate.store import Selection, Store


def card(head: Card, loaded: Loaded, store: Store, selection: Selection, sources: Sequence[str]) -> Card:
    """The card with what is counted over the rows."""
    from curate.data import distribution

    names = [request.name for request in loaded.recipe.scores]
    picked = ", ".join(map(quote, names)) or "NULL"
    frame = store.sql(f"SELECT {picked} FROM scored WHERE role = 'train'", recipe=loaded.name, names_columns=True)
    scores = {
        name: distribution(frame[name].cast(float).fill_null(math.nan).to_numpy())
        for name in names
        if name in frame.columns
    }
    known = prints(store)
    of_sources = noted(store, "train", {name: known[name] for name in sources if name in known})
    more = [travelling(note, loaded.folder) for note in (*_advice(loaded, store, selection), *of_sources)]
    return replace(head, scores=scores, notes=[*head.notes, *more])


def card_head(loaded: Loaded, store: Store, selection: Selection, sources: list[str], roles: Roles) -> Card:
    """What the card says of sources, models, recipe and counts."""
    from curate import __version__
    from curate.data import Card

    source = loaded.recipe.source
    known = prints(store)
    about = f"revision {source.revision}" if source and source.revision else None
    models = {
        role: checkpoint
        for role, checkpoint in (("reference", roles.reference), ("policy", roles.policy))
        if checkpoint
    }
    models |= {f"checkpoint {s.label}": s for s in roles.series}
    counts = {"rows": selection.counts["rows"], "kept": selection.counts["kept"]}
    counts |= {f"dropped: {step}": n for step, n in selection.counts["dropped_by"].items()}
    folder = loaded.folder
    return Card(
        title=f"{selection.name}, curated",
        sources=named_sources(
            [(travelling(name, folder), about or f"fingerprint {known.get(name, 'unknown')}") for name in sources]
        ),
        models={role: f"{checkpoint.label} (weights {checkpoint.fingerprint})" for role, checkpoint in models.items()},
        recipe=travelling(loaded.text, folder),
        counts=counts,
        notes=[
            travelling(note, folder)
            for note in [
                f"Made by curate {__version__}; `curate explain {store.folder.name} <row_id>` says why a row was kept or dropped.",
                *own_code_notes(roles.folders),
                *card_notes(
                    measured_as(store, loaded.name),
                    loaded.recipe.tokens.chat,
                    styles_of(store, sources, loaded.recipe.kind),
                ),
            ]
        ],
    )


def named_sources(found: Sequence[tuple[str, str]]) -> dict[str, str]:
    """name -> what it is; names that are the same without their folders are numbered."""
    named: dict[str, str] = {}
    for name, what in found:
        free = next(n for n in (name, *(f"{name} ({i})" for i in range(2, len(found) + 2))) if n not in named)
        named[free] = what
    return named


def prints(store: Store) -> dict[str, str]:
    """The training sources and their fingerprints."""
    return {s["source"]: s["fingerprint"] for s in store.sources() if s["role"] == "train"}


def _advice(loaded: Loaded, store: Store, selection: Selection) -> list[str]:
    """How many kept pairs are squeezing-prone, and what to do, in the order that retraining has shown so far."""
    column = _flagged(loaded)
    if not column:
        return []
    sign = "> 0" if column == {r.score: r.name for r in loaded.recipe.scores}.get("squeezing_prone") else "< 1"
    n = store.sql(
        f"SELECT count(*) AS n FROM scored s JOIN selections d USING (row_id) WHERE d.selection = ? AND d.kept AND s.{quote(column)} {sign}",
        [selection.name],
        recipe=loaded.name,
        names_columns=True,
    )["n"][0]
    steps = "; ".join(f"({i}) {text}" for i, text in enumerate(ADVICE, 1))
    return [
        f"{n:,} of the kept pairs are squeezing-prone (a ranking, not a forecast of how far). In this order: {steps}."
    ]


def trained_as(loaded: Loaded, store: Store) -> Any:
    from curate.data import TrainedAs

    recipe = loaded.recipe
    beta = beta_of(recipe) if asks_for_beta(recipe) else None
    unlike = [] if beta is None else deviation_text(requested_scores(loaded), beta)
    tokens, asked = recipe.tokens, recipe.export
    return TrainedAs(
        tokens.max_length,
        tokens.truncation,
        beta,
        bool(_flagged(loaded)),
        tuple(unlike),
        tokens.turns,
        in_order=asked is not None and asked.order == "order_by",
        given_reference=asked is not None and asked.reference_logps,
        sampling=_as_rollouts(loaded, store),
        asked_behind=_asked_behind(loaded, store),
    )


def _as_rollouts(loaded: Loaded, store: Store) -> tuple[tuple[str, Any], ...]:
    """How answers were sampled, as GRPO would sample them; () where none were, or where counts were imported."""
    uses = {use for recipe in store.recipes() if recipe["name"] == loaded.name for use in recipe["uses"] or ()}
    if not any(measured.fingerprint in uses for measured in store.measured(reads="sample")):
        return ()
    sampling = loaded.recipe.sampling
    named: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_completion_length": sampling.max_new_tokens,
    }
    further = ("top_k", "min_p", "repetition_penalty", "chat_template_kwargs")
    named |= {name: value for name in further if (value := getattr(sampling, name))}
    return tuple(named.items())


def _asked_behind(loaded: Loaded, store: Store) -> tuple[str, ...]:
    """What answers were sampled with that neither the exported prompts have nor a trainer's settings say."""
    if not _as_rollouts(loaded, store):
        return ()
    sampling = loaded.recipe.sampling
    before = [f"sampling.{key}" for key in ("system", "few_shot") if getattr(sampling, key)]
    ends = [f"sampling.{key}" for key in ("stop", "thinking_tokens", "extra_body") if getattr(sampling, key)]
    notes = []
    if before:
        notes.append(
            f"Answers were sampled with {' and '.join(before)} before every prompt, which these prompts do not have: put the same before them in the "
            "training, or other prompts are trained than those whose pass rates were measured."
        )
    if ends:
        notes.append(
            f"Answers were sampled with {', '.join(ends)}, which no setting here says: the training has to be told."
        )
    return tuple(notes)


def _flagged(loaded: Loaded) -> str:
    """The name of the column that counts a pair's signs of squeezing, "" where the recipe scores none."""
    found = {request.score: request.name for request in loaded.recipe.scores}
    return found.get("squeezing_prone") or found.get("squeezing_weight", "")
