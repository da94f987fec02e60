"""DPO's β of a recipe: one number, for forecasts, for the scores that have a β, and for the training that an export is made for.

    forecast: {beta: 0.3}       the recipe's β: what forecasts take, scores that set none of their own, and trainer_args.json

Where it is not given, it is the one that the recipe's scores agree on, as long as no forecast is among them; else 0.1. A score may set another one:
it is then said in the plan, on the card and beside the trainer's settings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from curate.recipe.schema import ScoreRequest
from curate.recipe.sections import Forecast
from curate.scores import SCORES

if TYPE_CHECKING:
    from curate.plan.step import RequestedScore
    from curate.recipe.schema import Recipe

DEFAULT: float = Forecast().beta
OF_FORECASTS = ("forecast_", "head_forecast_", "contribution_", "influence_")  # columns that are measured with β


def dpo_beta(given: float | None, requests: Iterable[ScoreRequest]) -> float:
    """given: forecast.beta, None where the recipe does not have it."""
    requests = list(requests)
    if given is not None:
        return float(given)
    own = {float(request.params["beta"]) for request in requests if sets_beta(request.score, request.params)}
    forecasts = any(_is_forecast(request.score) for request in requests)
    return own.pop() if len(own) == 1 and not forecasts else DEFAULT


def beta_of(recipe: Recipe) -> float:
    given = recipe.forecast.beta if "beta" in recipe.forecast.model_fields_set else None
    return dpo_beta(given, recipe.scores)


def has_beta(score: str) -> bool:
    """Whether it is one of curate's scores with DPO's β; what a user's own score calls beta is its own affair."""
    return score in SCORES and SCORES[score].kind == "preference" and "beta" in SCORES[score].parameters


def sets_beta(score: str, params: Mapping[str, Any]) -> bool:
    return has_beta(score) and isinstance(params.get("beta"), int | float)


def asks_for_beta(recipe: Recipe) -> bool:
    """Whether anything of a recipe says or takes DPO's β."""
    says = "beta" in recipe.forecast.model_fields_set
    return recipe.kind == "preference" and (
        says or any(has_beta(one.score) or _is_forecast(one.score) for one in recipe.scores)
    )


def deviations(requested: Iterable[RequestedScore], beta: float) -> dict[str, float]:
    """Scores with another β -> theirs."""
    mine = {want.name: want.params["beta"] for want in requested if has_beta(want.score.name)}
    return {name: other for name, other in mine.items() if other != beta}


def deviation_text(requested: Iterable[RequestedScore], beta: float) -> list[str]:
    """A sentence where scores take another β than the recipe's."""
    others = deviations(requested, beta)
    if not others:
        return []
    named = ", ".join(f"{name} ({other:g})" for name, other in others.items())
    return [
        f"DPO's β is {beta:g} in this recipe (forecast.beta), and another one in {named}: a training with β {beta:g} is not what "
        f"{'this score is' if len(others) == 1 else 'these scores are'} about."
    ]


def _is_forecast(score: str) -> bool:
    needs = SCORES[score].needs if score in SCORES else ()
    return any(need.rpartition(".")[2].startswith(OF_FORECASTS) for need in needs)
