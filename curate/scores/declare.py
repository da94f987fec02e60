"""The two decorators, @score and @dataset_value, and the registry of everything they decorate here.

A score is a pure function of measurement columns: numpy float64 in, (rows,) float64 out, NaN for what is unknown. Its keyword-only
arguments are its parameters. One file per family; a user's own is named `package.module:object` in the recipe.

    @score(needs=("hidden_cc", "hidden_cr"), unit="activation²", worst="high", high_means="DPO tends to push the chosen response down")
    def ches(hidden_cc, hidden_cr):
        return hidden_cr - hidden_cc

A need may name its parameters in braces: "forecast_{step}_chosen" with step: sign is the column forecast_sign_chosen.
A need is a column's name, or a role and a column: "policy.chosen_logp" is the policy model's, "row.agreement" the user's own column
`agreement`; without a role it is the reference's (preference) or the last checkpoint's (sft; with over="checkpoints" every checkpoint's).
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from curate.errors import UsageError, did_you_mean
from curate.recipe.objects import load_object
from curate.scores.declared import Array, DatasetValue, Kind, Over, Score, Worst
from curate.scores.parameters import Parameter
from curate.scores.words import PLAIN

SCORES: dict[str, Score] = {}
DATASET_VALUES: dict[str, DatasetValue] = {}


def score(
    *,
    needs: tuple[str, ...],
    optional: tuple[str, ...] = (),
    kind: Kind = "any",
    over: Over = None,
    unit: str = "",
    worst: Worst = "none",
    high_means: str = "",
    source: str = "",
    null_where: str = "",
    names: tuple[str, ...] = (),
    per_checkpoint: Callable[..., Array] | None = None,
    least: int = 0,
    version: int = 1,
    plain: str = "",
) -> Callable[[Callable[..., Any]], Score]:
    """Declare a score. needs, optional: see the module. over="checkpoints": every column comes as (rows, K), in step order, NaN where
    unmeasured (K counts the base model as step 0 where it is given); an argument called `steps` then gets the K steps, one called `rates`
    the learning rates there (None or NaN where nobody knows them), one called `trained` (K,) booleans, False at step 0.

    The function takes needs, then optional columns, in that order; keyword-only arguments are parameters.
    """

    def decorate(function: Callable[..., Any]) -> Score:
        common = _described(function, needs, optional, kind, over, source)
        declared = Score(
            **common,
            unit=unit,
            worst=worst,
            high_means=high_means,
            null_where=null_where,
            names=tuple(names),
            per_checkpoint=per_checkpoint,
            least=least,
            version=version,
            plain=plain or PLAIN.get(common["name"], "") or high_means,
        )
        return _register(declared, SCORES)

    return decorate


def dataset_value(
    *,
    needs: tuple[str, ...],
    optional: tuple[str, ...] = (),
    kind: Kind = "any",
    over: Over = None,
    source: str = "",
    of: str = "",
) -> Callable[[Callable[..., Any]], DatasetValue]:
    """Declare values of a whole dataset: a function like a score's that returns a list of Value."""

    def decorate(function: Callable[..., Any]) -> DatasetValue:
        return _register(
            DatasetValue(**_described(function, needs, optional, kind, over, source), of=of), DATASET_VALUES
        )

    return decorate


def resolve(name: str, *, folder: str | Path | None = None) -> Score:
    """The score of that name, or a user's own by "package.module:object" (looked for in `folder` too, usually the recipe's).

    Raises UsageError: an unknown name (the nearest is offered), a module or object that is not there or is no score.
    """
    if ":" in name:
        loaded = load_object(name, what="score", folder=folder)
        if not isinstance(loaded, Score):
            raise UsageError(
                f"score {name!r}: found a {type(loaded).__name__}, expected a function decorated with @curate.score(needs=…)."
            )
        return loaded
    if name in SCORES:
        return SCORES[name]
    hint = did_you_mean(name, SCORES, cutoff=0.5, after=" ")
    raise UsageError(
        f"there is no score {name!r}; {hint}`curate scores` lists all; one of your own is named `package.module:object`."
    )


Declared = TypeVar("Declared", Score, DatasetValue)


def _register(declared: Declared, registry: dict[str, Declared]) -> Declared:
    """Ours go into the registry; a user's own is reached by its path, so it can never replace one of ours."""
    if declared.function.__module__.startswith("curate.scores."):
        if declared.name in registry:
            raise TypeError(
                f"two {declared.what}s are called {declared.name!r}: {registry[declared.name].path} and {declared.path}"
            )
        registry[declared.name] = declared
    return declared


def _described(
    function: Callable[..., Any], needs: tuple[str, ...], optional: tuple[str, ...], kind: Kind, over: Over, source: str
) -> dict[str, Any]:
    if isinstance(needs, str) or isinstance(optional, str):
        raise TypeError(f'{function.__name__}: needs and optional are tuples of column names; write ("{needs}",)')
    if not needs:
        raise TypeError(f"{function.__name__}: needs at least one column")
    signature = inspect.signature(function)
    positional = [p for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    variadic = any(p.kind == p.VAR_POSITIONAL for p in signature.parameters.values())
    if len(positional) != len(needs) + len(optional) and not variadic:
        raise TypeError(
            f"{function.__name__} takes {len(positional)} columns ({', '.join(p.name for p in positional)}), "
            f"declared are {', '.join((*needs, *optional))}. Parameters are keyword-only: put them after a `*`."
        )
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError):
        hints = {}
    keyword = [p for p in signature.parameters.values() if p.kind == p.KEYWORD_ONLY]
    parameters = {}
    for p in keyword:
        if p.name in ("steps", "rates", "trained"):
            continue
        known = p.default is not p.empty and p.default is not None
        parameters[p.name] = Parameter(p.name, p.default, hints.get(p.name, type(p.default) if known else None))
    return {
        "name": function.__name__,
        "path": f"{function.__module__}:{function.__qualname__}",
        "function": function,
        "needs": tuple(needs),
        "optional": tuple(optional),
        "kind": kind,
        "over": over,
        "source": source,
        "parameters": types.MappingProxyType(parameters),
        "takes_steps": any(p.name == "steps" for p in keyword),
        "takes_rates": any(p.name == "rates" for p in keyword),
        "takes_trained": any(p.name == "trained" for p in keyword),
    }
