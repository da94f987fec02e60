"""Pre-memorization accuracy: how well the model answered an example before it had memorised its solution.

    masked_j = acc_j if nll_j ≥ τ else 0            acc = correct/samples, nll = mean target-token NLL (nats/token)
    premem_t = min( max_{j≤t} masked_j , acc_t )    the outer min matters: R² falls from 0.95 to 0.19 on MATH without it

τ depends on task and base model (0.1003 on GSM8K, 0.1827 on MATH with Llama-3-8B): calibrate it, curate/scores/calibration.py.
Examples that are fluent from the start (nll < τ before anything was learned) get 0 by the formula although most are easy.
Source: Kang et al. 2024, arXiv:2411.07681 (whose mask is written ln ln perplexity ≥ p).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from curate.scores.declare import dataset_value, score
from curate.scores.declared import Array, Value
from curate.scores.intervals import mean_value, proportion_value
from curate.scores.parameters import Positive

KANG = "Kang et al. 2024, arXiv:2411.07681"
AUTO = ("auto", "auto_per_group")
Threshold = Positive | dict[str, Positive] | Literal["auto", "auto_per_group"]


def running(accuracy: Array, target_nll: Array, threshold: float | Array) -> Array:
    """premem_t for every checkpoint t: (rows, K) from (rows, K), NaN where the measured values do not decide it.

    threshold: τ in nats/token, one number or (rows,). A masked value is known to be 0 where nll < τ or acc = 0, whatever the other
    one is; where it is unknown it lies between 0 and acc (or 1). premem_t is NaN where acc_t is, and where those bounds leave a choice.
    """
    tau = np.asarray(threshold, dtype=np.float64)
    tau = tau[:, None] if tau.ndim else tau
    with np.errstate(invalid="ignore"):
        memorised = target_nll < tau
    masked = np.where(memorised, 0.0, accuracy)
    if not (np.isnan(masked).any() or np.isnan(target_nll).any()):
        return np.minimum(np.maximum.accumulate(masked, axis=1), accuracy)
    zero = memorised | (accuracy == 0)
    unknown = ~zero & (np.isnan(accuracy) | np.isnan(target_nll))
    least = np.where(zero | unknown, 0.0, accuracy)
    most = np.where(zero, 0.0, np.where(np.isnan(accuracy), 1.0, accuracy))
    low = np.minimum(np.maximum.accumulate(least, axis=1), accuracy)
    high = np.minimum(np.maximum.accumulate(most, axis=1), accuracy)
    return np.where(low == high, low, np.nan)  # NaN ≠ NaN: acc_t unknown stays unknown


def group_names(group: np.ndarray) -> np.ndarray:
    """(rows,) text, as a recipe's mapping names the groups: a whole number without a point, None where a row has no value."""
    values = np.asarray(group)
    if values.dtype.kind != "f":
        return values.astype(str)
    return np.array(
        ["None" if v != v else f"{v:.0f}" if v.is_integer() else str(v) for v in values.tolist()], dtype=str
    )


def thresholds(
    threshold: float | Mapping[str, float] | str, group: np.ndarray | None, rows: int, *, per: str = "group"
) -> float | Array:
    """τ as a number, or (rows,) from the rows' groups, which are the values of the column `per`. ValueError where there is no such column, where
    a row's group has no τ, or where τ is still to be calibrated.
    """
    if isinstance(threshold, str):
        raise ValueError(f"threshold {threshold!r} stands for what `curate score` calibrates; give a number here")
    if not isinstance(threshold, Mapping):
        return float(threshold)
    if group is None:
        raise ValueError(
            f"a threshold per group needs a column of the source, and there is no {per!r}; name it: `per: COLUMN`"
        )
    names, where = np.unique(group_names(group), return_inverse=True)
    missing = [str(name) for name in names if name not in threshold]
    if missing:
        raise ValueError(f"no threshold for group {missing[0]!r}; there are thresholds for {', '.join(threshold)}")
    return np.array([threshold[str(name)] for name in names], dtype=np.float64)[where].reshape(rows)


def from_the_start(target_nll: Array, threshold: float | Array, steps: np.ndarray | None) -> Array:
    """(rows,) 1.0 where nll < τ at the first checkpoint of the series, else 0.0; NaN where that one is unmeasured.

    A series of one checkpoint that is not the base model (step 0) cannot tell fluent from memorised: all NaN.
    """
    if target_nll.shape[1] == 0 or (target_nll.shape[1] == 1 and (steps is None or steps[0] != 0)):
        return np.full(len(target_nll), np.nan)
    first = target_nll[:, 0]
    return np.where(np.isnan(first), np.nan, first < threshold)


def premem_series(
    accuracy: Array,
    target_nll: Array,
    group: np.ndarray | None = None,
    *,
    threshold: Threshold = 0.1,
    per: str = "group",
) -> Array:
    """premem at every checkpoint, (rows, K); the arguments are those of `premem_accuracy`."""
    return running(accuracy, target_nll, thresholds(threshold, group, len(accuracy), per=per))


@score(
    needs=("accuracy", "target_nll"),
    optional=("row.{per}",),
    kind="sft",
    over="checkpoints",
    unit="share",
    worst="none",
    high_means="answered right before its solution was memorised: it generalises",
    source=KANG,
    per_checkpoint=premem_series,
)
def premem_accuracy(
    accuracy: Array,
    target_nll: Array,
    group: np.ndarray | None = None,
    *,
    threshold: Threshold = 0.1,
    per: str = "group",
) -> Array:
    """premem at the last checkpoint, 0..1; (rows,) from (rows, K). NULL where the measured checkpoints do not decide it.

    threshold: τ in nats/token, or one per value of the source's column `per`; auto, auto_per_group: calibrated against held-out
    accuracies. 0 also where fluent from the start: see `fluent`.
    """
    if accuracy.shape[1] == 0:
        return np.full(len(accuracy), np.nan)
    return premem_series(accuracy, target_nll, group, threshold=threshold, per=per)[:, -1]


@score(
    needs=("target_nll",),
    optional=("row.{per}",),
    kind="sft",
    over="checkpoints",
    unit="0 or 1",
    worst="none",
    high_means="its solution was likely from the start: its premem_accuracy of 0 says nothing",
    source=KANG,
)
def fluent(
    target_nll: Array,
    group: np.ndarray | None = None,
    *,
    threshold: Threshold = 0.1,
    per: str = "group",
    steps: np.ndarray | None = None,
) -> Array:
    """1 where nll < τ at the base model or, without one, at the first checkpoint; else 0.

    NULL where that one is unmeasured, and everywhere when only one checkpoint, not the base model, is in the series.
    """
    return from_the_start(target_nll, thresholds(threshold, group, len(target_nll), per=per), steps)


@dataset_value(
    needs=("accuracy", "target_nll"),
    optional=("in_train", "row.{per}"),
    kind="sft",
    over="checkpoints",
    source=KANG,
)
def premem_values(
    accuracy: Array,
    target_nll: Array,
    in_train: Array | None = None,
    group: np.ndarray | None = None,
    *,
    threshold: Threshold = 0.1,
    per: str = "group",
    steps: np.ndarray | None = None,
) -> list[Value]:
    """Per checkpoint: premem_accuracy, the mean over the rows trained on; premem_zeros_fluent, the share of its zeros that are fluent.

    For the series: fluent, the share of rows fluent from the start. in_train: 0 where the run did not train on the row; without it all
    count. Rows whose value is NULL are left out, n says how many are in. Intervals: normal for the mean, Wilson for the shares.
    """
    trained = np.ones(len(accuracy), bool) if in_train is None else ~(in_train == 0).any(axis=1)
    tau = thresholds(threshold, group, len(accuracy), per=per)
    tau = tau[trained] if isinstance(tau, np.ndarray) else tau
    values = running(accuracy[trained], target_nll[trained], tau)
    flag = from_the_start(target_nll[trained], tau, steps)
    result = [proportion_value("fluent", flag)]
    for at in range(values.shape[1]):
        result.append(mean_value("premem_accuracy", values[:, at], at=at, bounds=(0.0, 1.0)))
        result.append(proportion_value("premem_zeros_fluent", flag[values[:, at] == 0], at=at))
    return result
