"""Columns along a direction in weight space; their names say which: STEP is sgd, sign or adam, TARGET a name of the recipe's `targets`.

    forecast_STEP_chosen, forecast_STEP_rejected   ⟨g±_i, P·G⟩, G = mean_j s_j (g+_j − g−_j), the training set's step
    head_forecast_STEP                             the LM head's part of the first, exact and forward only
    contribution_STEP                              s_i ⟨P·ḡ+, g+_i − g−_i⟩, ḡ+ the training set's mean chosen gradient
    influence_TARGET_STEP                          the same with the target's mean gradient in place of ḡ+; of SFT rows the product of P·ḡ_target with
                                                   the gradient of the row's mean log-probability per token
    cosine_TARGET_STEP                             cosine of the target's mean gradient with P·(g+_i − g−_i), of SFT rows with P·∇ log π(completion)
    cosine_TARGET_STEP__GROUP                      the same with one group of a target that has groups (`per`), a column each

They belong to the model, to the rows that made the direction, to β, to P and to the target's rows: their fingerprint holds all of these.
Over gradients.parameters alone, where a recipe says so; a matrix that is embedding and head moves as a whole. A direction is made once
(passes/gradients/mean.py), a column costs two forward passes (passes/gradients/derivatives.py) of a float32 model, all cosines of one P together
one backward
(passes/gradients/cosines.py).

Source: Pruthi et al. 2020, arXiv:2002.08484 (TracIn); Xia et al. 2024, arXiv:2402.04333 (LESS).
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from curate.passes.contract import Direction, Measurement

STEPS = "sgd|sign|adam"
UNIT = "nats per unit of step"
VERSION = (
    2  # of all of these, and of the gradients that are kept for them: raised when the numbers change for the same rows
)


def along_direction(column: str, kind: str) -> Measurement | None:
    """The measurement that gives such a column; None where the name is no such column, or not for rows of this kind."""
    pairs = kind == "preference"
    if (match := re.fullmatch(rf"forecast_({STEPS})_(?:chosen|rejected)", column)) and pairs:
        name = f"forecast_{match[1]}"
        return _made(name, kind, "step", match[1], responses, f"{name}_chosen", f"{name}_rejected")
    if (match := re.fullmatch(r"head_forecast_(sgd|sign)", column)) and pairs:
        return _made(column, kind, "head", match[1], chosen_alone, column)
    if (match := re.fullmatch(rf"contribution_({STEPS})", column)) and pairs:
        return _made(column, kind, "chosen", match[1], own_step, column)
    if match := re.fullmatch(rf"influence_(\w+)_({STEPS})", column):
        return _made(column, kind, f"target.{match[1]}", match[2], own_step, column)
    if match := re.fullmatch(r"(cosine_(\w+?)_(sgd|adam))(?:__\w+)?", column):
        units = {match[1]: "cosine"}  # of the target as a whole: `Targets.in_groups` adds groups
        about = Direction(f"target.{match[2]}", match[3], cosine=True)  # type: ignore[arg-type]
        return Measurement(match[1], "direction", kind, units, VERSION, each_group, direction=about)  # type: ignore[arg-type]
    return None


def _made(name: str, kind: Any, target: str, step: Any, function: Any, *columns: str) -> Measurement:
    def read(derivative: np.ndarray, weight: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(columns, function(derivative, weight), strict=True))

    read.__doc__ = function.__doc__
    return Measurement(
        name, "direction", kind, dict.fromkeys(columns, UNIT), VERSION, read, direction=Direction(target, step)
    )


def responses(derivative: np.ndarray, weight: np.ndarray) -> list[np.ndarray]:
    """What the step does to each response, per unit of it. derivative (rows, 2)."""
    return [derivative[:, 0], derivative[:, 1]]


def chosen_alone(derivative: np.ndarray, weight: np.ndarray) -> list[np.ndarray]:
    """What the step does to the chosen response, per unit of it."""
    return [derivative[:, 0]]


def each_group(cosines: np.ndarray) -> list[np.ndarray]:
    """Cosines of the row's own step with the target's mean gradient, or with those of its groups. cosines (rows, groups)."""
    return list(cosines.T)


def own_step(derivative: np.ndarray, weight: np.ndarray) -> list[np.ndarray]:
    """What the row's own step does to the direction's log-probabilities. derivative (rows, 2) of pairs, weight s_i; (rows, 1) of SFT rows, 1/T_i."""
    sign = np.array([1.0, -1.0])[: derivative.shape[1]]
    return [weight * (derivative @ sign)]
