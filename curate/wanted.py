"""The scores that a recipe asks for, found and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from curate.errors import UsageError

if TYPE_CHECKING:
    from curate.recipe import Loaded
    from curate.scores import Need, Score


@dataclass(frozen=True)
class Wanted:
    """A score that the recipe asks for, under the name its column gets, with its checked parameters."""

    name: str
    score: Score
    params: dict[str, Any]

    def need(self, text: str) -> Need:
        """One of the score's needs, its parameters filled in."""
        return self.score.need(text, self.params)


def wanted_scores(loaded: Loaded) -> list[Wanted]:
    """The recipe's scores, found and checked. UsageError for a misspelt name, a wrong parameter, or a score of the other kind of row."""
    from curate.scores import resolve

    found = []
    for request in loaded.recipe.scores:
        try:
            score = resolve(request.score, folder=loaded.folder)
            params = score.check(request.params)
        except UsageError as error:
            raise UsageError(f"{loaded.path or 'recipe'}: scores: {error}") from None
        if score.kind not in ("any", loaded.recipe.kind):
            raise UsageError(
                f"{loaded.path or 'recipe'}: scores: {request.score} is for {score.kind} rows, this recipe's kind is {loaded.recipe.kind}."
            )
        found.append(Wanted(request.name, score, params))
    for want in list(found):  # where a NULL is the right value, the score that says so comes along
        excuse = want.score.null_where
        if excuse and not any(w.score.name == excuse for w in found):
            score = resolve(excuse)
            found.append(
                Wanted(excuse, score, score.check({k: v for k, v in want.params.items() if k in score.parameters}))
            )
    return found


def check_checkpoints(wanted: Sequence[Wanted], n: int) -> None:
    """UsageError where a score is about a training and the recipe names fewer than it needs of its checkpoints. n: without the untrained model."""
    for want in wanted:
        if want.score.least > n:
            found = f"{n} checkpoint{'s' * (n != 1)}" if n else "no checkpoint"
            raise UsageError(
                f"scores: {want.name} is about a training run and needs {want.score.least} of its checkpoints or more; the recipe names "
                f"{found} (the untrained model, step 0, is none). Set models.checkpoints to the run's folder, or to a list of models."
            )
