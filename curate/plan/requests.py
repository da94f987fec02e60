"""The scores that a recipe asks for, found and checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from curate.errors import UsageError
from curate.plan.step import RequestedScore

if TYPE_CHECKING:
    from curate.recipe.load import Loaded


def requested_scores(loaded: Loaded) -> list[RequestedScore]:
    """The recipe's scores, found and checked. UsageError for a misspelt name, a wrong parameter, or a score of the other kind of row."""
    from curate.plan.beta import beta_of, has_beta
    from curate.scores import resolve

    requested, beta = [], beta_of(loaded.recipe)
    for i, request in enumerate(loaded.recipe.scores):
        try:
            score = resolve(request.score, folder=loaded.folder)
            own = {"beta": beta} if has_beta(request.score) and "beta" not in request.params else {}
            own |= _band_of(loaded) if request.score == "pass_band" else {}
            params = score.check({**own, **request.params})
        except UsageError as error:
            raise UsageError(f"{loaded.place('scores', i)}: scores: {error}") from None
        if score.kind not in ("any", loaded.recipe.kind):
            raise UsageError(
                f"{loaded.place('scores', i)}: scores: {request.score} is for {score.kind} rows, this recipe's kind is {loaded.recipe.kind}."
            )
        requested.append(RequestedScore(request.name, score, params))
    _check_names(requested, loaded)
    for want in list(requested):  # where a NULL is the right value, the score that says so comes along
        excuse = want.score.null_where
        if excuse and not any(w.score.name == excuse for w in requested):
            score = resolve(excuse)
            requested.append(
                RequestedScore(
                    excuse, score, score.check({k: v for k, v in want.params.items() if k in score.parameters})
                )
            )
    return requested


def _band_of(loaded: Loaded) -> dict[str, float]:
    """The band that rows are sampled for, where the recipe samples until it is decided."""
    samples = loaded.recipe.sampling.samples
    return {} if isinstance(samples, int) else {"low": samples.band[0], "high": samples.band[1]}


# What views and `select` have under these names beside what is measured; a row's own columns (row_id, source, …) are refused as the recipe is read.
NAMES = {
    "token_problem": "says why a row cannot be measured",
    "trained": "says whether a run trained on the row",
    "run": "is the training in the view `trajectories`",
    "checkpoint": "is the checkpoint in the view `trajectories`",
    "step": "is the training step in the view `trajectories`",
    "random": "is the word for a random order in select.order_by",
}


def _check_names(requested: Sequence[RequestedScore], loaded: Loaded) -> None:
    """UsageError for a score whose column would hide another one: `keep: {tokens: …}` would count the score."""
    from curate.measurements import providers

    codes = {f"{want.name}_name".lower(): want.name for want in requested if want.score.names}
    for want in requested:
        name = want.name.lower()
        if name == want.score.name and name in want.score.needs:
            continue  # the measured column itself
        measured = next((m for kind in ("preference", "sft") if (m := providers(name, kind))), None)
        if measured is not None:
            what = (
                f"is what the measurement {measured.name} measures, and select, export and other scores read it as that"
            )
        elif name in codes:
            what = f"is the text column of the score {codes[name]}"
        elif name in NAMES:
            what = NAMES[name]
        else:
            continue
        instead = (
            f", or leave the score out where you mean the column: SQL reads {name} as it is"
            if measured is not None
            else ""
        )
        raise UsageError(
            f"{loaded.path or 'recipe'}: scores: {want.score.name} cannot be called {want.name!r}: {name} {what}. Give the score another name, "
            f"such as `as: {want.name}_score`{instead}."
        )


def check_checkpoints(requested: Sequence[RequestedScore], n: int) -> None:
    """UsageError where a score is about a training and the recipe names fewer than it needs of its checkpoints. n: without the untrained model."""
    for want in requested:
        if want.score.least > n:
            count = f"{n} checkpoint{'s' * (n != 1)}" if n else "no checkpoint"
            raise UsageError(
                f"scores: {want.name} is about a training run and needs {want.score.least} of its checkpoints or more; the recipe names "
                f"{count} (the untrained model, step 0, is none). Set models.checkpoints to the run's folder, or to a list of models."
            )
