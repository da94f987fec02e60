"""What is read off a pass: named columns of numbers, one file per thing measured. Many measurements share one pass.

    @measurement(reads="forward", kind="preference", head=("entropy",), columns={"chosen_entropy": "mean nats per token"})
    def chosen_entropy(batch):
        \"\"\"How unsure the model is along the chosen response.\"\"\"
        return {"chosen_entropy": batch.chosen.mean(batch.chosen.entropy)}

reads    "tokens": the function takes one Encoded or EncodedPair and returns {column: number}; no model runs
         "forward": it takes a Batch of the forward pass (passes/batch.py) and returns {column: (rows,) tensor}
         "neighbours": the same, each row after its nearest other training examples
         "sample", "backward": as their passes say
         "direction": it takes the rows' derivatives along `direction` (measurements/directions.py)
kind     rows it is for: "preference", "sft", or "any"
head     statistics of the LM head it reads (passes/head.py); what no measurement asks for is not computed
columns  name -> unit. NaN is unknown.
version  raised when the numbers change for the same rows: stored values of another version are never mixed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from curate.errors import CurateError
from curate.passes.contract import Kind, Measurement, Reads

MEASUREMENTS: dict[str, Measurement] = {}


def measurement(
    *,
    reads: Reads,
    kind: Kind,
    columns: Mapping[str, str],
    version: int = 1,
    head: Sequence[str] = (),
    without_prompt: bool = False,
    prompt_only: bool = False,
    perturbed: bool = False,
    name: str | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as a measurement under its own name. Two of one name, or one column from two for one kind:
    CurateError.

    `without_prompt`: the forward pass also runs each response without its prompt, as sides `chosen_alone`, `rejected_alone`,
    `completion_alone`. `prompt_only`: it reads the prompt's states alone, and is taken of SFT rows without a completion too.
    `perturbed`: of the samples it reads those to the row's perturbations (`sampling.perturb`), a list of them a row.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        made = Measurement(
            name=name or function.__name__,
            reads=reads,
            kind=kind,
            columns=dict(columns),
            version=version,
            function=function,
            head=tuple(head),
            without_prompt=without_prompt,
            prompt_only=prompt_only,
            perturbed=perturbed,
        )
        known = MEASUREMENTS.get(made.name)
        if known is not None and _home(known.function) != _home(function):
            raise CurateError(
                f"two measurements are called '{made.name}': in {_home(known.function)} and {_home(function)}."
            )
        for other in MEASUREMENTS.values():
            both = sorted(set(other.columns) & set(made.columns))
            if both and other.name != made.name and (other.kind == made.kind or "any" in (other.kind, made.kind)):
                raise CurateError(f"measurements {other.name} and {made.name} both give the column '{both[0]}'.")
        MEASUREMENTS[made.name] = made
        function.measurement = made  # type: ignore[attr-defined]
        return function

    return register


def _home(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"
