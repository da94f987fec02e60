"""Settings of a recipe that nothing of it uses: said in `plan` and `run`, since who wrote them expects something of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel

from curate.plan.beta import has_beta

if TYPE_CHECKING:
    from curate.plan.plan import Plan
    from curate.recipe.load import Loaded
    from curate.recipe.schema import Recipe


def unused_settings(loaded: Loaded, plan: Plan) -> list[str]:
    """A line for every section that was changed from its defaults and that no score of the recipe reads."""
    recipe = loaded.recipe
    passes = {step.reads for step in plan.steps}
    gradients = passes & {"backward", "direction"}
    named = {str(value) for want in plan.wanted for value in want.params.values()}
    unused = []
    if "sample" not in passes:
        unused += _changed("sampling", recipe.sampling)
        if recipe.server.url:
            unused.append("server.url")
    elif recipe.server.url and recipe.engine.sampler != "openai":
        unused.append(f"server.url (engine.sampler is {recipe.engine.sampler})")
    if "sample" in passes:
        unused += _idle(recipe)
    if recipe.tokens.turns != "last" and passes <= {"sample"}:
        unused.append("tokens.turns")
    if not gradients:
        unused += _changed("gradients", recipe.gradients)
    if "direction" not in passes:
        of_scores = recipe.export is not None or any(has_beta(want.score.name) for want in plan.wanted)
        used = ("forecast.beta",) if recipe.kind == "preference" and of_scores else ()  # an export's trainer takes it
        unused += [name for name in _changed("forecast", recipe.forecast) if name not in used]
    unused += [f"targets.{name}" for name in recipe.targets if name not in named]
    policy = plan.roles.policy
    if policy is not None and all(step.checkpoint.path != policy.path for step in plan.steps):
        unused.append("models.policy")
    if not unused:
        return []
    return [
        f"Not used by any score of this recipe: {', '.join(unused)}. `curate scores NAME` says what a score needs; leave out what is not meant."
    ]


def _idle(recipe: Recipe) -> list[str]:
    """Settings of sampling that others leave nothing to do."""
    sampling, idle = recipe.sampling, []
    if sampling.temperature == 0:
        given = [key for key in ("top_k", "min_p") if getattr(sampling, key) is not None]
        idle += [f"sampling.{key} (at temperature 0 the likeliest token is taken)" for key in given]
    if recipe.kind == "preference" and sampling.unfinished != "wrong":
        idle.append("sampling.unfinished (answers to pairs are not graded)")
    return idle


def _changed(section: str, given: BaseModel) -> list[str]:
    defaults = type(given)()
    return [f"{section}.{key}" for key in type(given).model_fields if getattr(given, key) != getattr(defaults, key)]
