"""LiMem: does the model solve a problem and fail its perturbations? Then it remembers rather than reasons.

    limem = acc · (1 − CR)        acc: accuracy on the problem,  CR: mean accuracy on its perturbations

Perturbations are made by a function of the user's own (`sampling.perturb`, measurements/perturbations.py), or are rows of the source like any other,
sampled and graded with their own answers. Two columns of the user's then say what belongs together: `problem`, the same for a problem and its
perturbations, and `perturbed`, true on the perturbations.
Source: Xie et al. 2024, arXiv:2410.23123, section 2.
"""

from __future__ import annotations

import numpy as np

from curate.scores.declare import score
from curate.scores.declared import Array

XIE = "Xie et al. 2024, arXiv:2410.23123"


@score(
    needs=("accuracy",),
    optional=("perturbed_accuracy", "row.problem", "row.perturbed"),
    kind="sft",
    unit="share",
    worst="high",
    high_means="solved as it stands, failed when it is changed a little: memorised",
    source=XIE,
)
def limem(
    accuracy: Array,
    perturbed_accuracy: Array | None = None,
    problem: np.ndarray | None = None,
    perturbed: np.ndarray | None = None,
) -> Array:
    """acc·(1 − CR), 0..1, of every problem. NULL where a problem has no perturbation measured, where acc is 0, and on rows that are perturbations.

    perturbed_accuracy: CR by the recipe's function; where there is one the columns are not read. problem: what a problem and its
    perturbations have in common. perturbed: 1 or true on the perturbations, else 0.
    """
    if perturbed_accuracy is not None:
        return np.where(accuracy > 0, accuracy * (1 - perturbed_accuracy), np.nan)
    if problem is None or perturbed is None:
        raise ValueError(
            "there are no perturbations; name a function that makes them, `--set sampling.perturb=package.module:function`, or give the "
            "source the columns `problem` and `perturbed`"
        )
    flag = np.asarray(perturbed, dtype=np.float64)
    problems = np.asarray(problem)
    unknown = np.array([p is None or p != p for p in problems.tolist()], bool)
    _, group = np.unique(problems.astype(str), return_inverse=True)
    group = group.reshape(len(flag))
    counted = (flag == 1) & ~unknown & ~np.isnan(accuracy)
    n = np.bincount(group[counted], minlength=group.max(initial=-1) + 1)
    total = np.bincount(group[counted], accuracy[counted], minlength=len(n))
    if not len(n):
        return np.full(len(accuracy), np.nan)
    has_flagged = n[group] > 0
    rate = np.where(has_flagged, total[group] / np.maximum(n[group], 1), np.nan)
    known = (flag == 0) & ~unknown & (accuracy > 0)
    return np.where(known, accuracy * (1 - rate), np.nan)
