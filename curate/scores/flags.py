"""Flags that a user can act on: is this pair squeezing-prone, why, in words, and what to do about it.

    reason           holds where                                                      needs
    states alike     CHES is among the highest `share` of the pairs                   a forward pass
    valley deep      valley depth is among the highest `share`                        a forward pass
    share negative   displacement share ρ < 0                                         a backward pass: used where it was measured
    forecast low     the batch forecast (sign) is below 0 and among the lowest `share`   a direction: used where batch_forecast was scored

    squeezing_prone  = how many reasons hold
    squeezing_weight = 1/(1 + squeezing_prone): a weight for training

Ranks, not forecasts: how far a chosen response falls is not told by any of them, and by its ranks alone up to three times `share` of the
pairs are flagged. What each sign is worth after real DPO runs: benchmarks/after_dpo.py. In trials with small models ρ < 0 seldom fired and
was nearly always right, the batch forecast ranked best, CHES was weak, and no drop filter beat an NLL term on the chosen response or an
earlier stop: ADVICE is in that order.
Source: Razin et al. 2024, arXiv:2410.08847; Ren & Sutherland 2024, arXiv:2407.10490.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from curate.scores.declare import dataset_value, score
from curate.scores.declared import Array, Value
from curate.scores.displacement import PRODUCTS, RAZIN
from curate.scores.gradients import KERNEL, REN, displacement_share
from curate.scores.intervals import proportion_value
from curate.scores.parameters import Share

ADVICE = (
    "keep the pairs and add an NLL term on the chosen response (TRL: loss_type=['sigmoid', 'sft'] with loss_weights), or stop earlier",
    "then give flagged pairs less weight (`export.weight: squeezing_weight`, with `export.resample`, since TRL's trainers take no weights)",
    "then drop by displacement_contribution, measured after a short warm-up of DPO",
    "or train on both responses first (`export.format: extend`), and start DPO from that model",
)


FORECAST = "forecast_sign_chosen"
NEEDS = (*PRODUCTS, "valley_depth")
OPTIONAL = (*KERNEL, f"reference.{FORECAST}")


@dataclass(frozen=True)
class Reason:
    """One sign of squeezing. columns: the arguments of `value_of`. below: the sign holds only where the value is below this. end: it holds only
    among the `share` of the rows at this end; None: whatever the rank. words: a text with {value}, and {percentile} where it is a rank.
    """

    name: str
    columns: tuple[str, ...]
    value_of: Callable[..., Array]
    words: str
    below: float = np.inf
    end: Literal["high", "low"] | None = None

    def holds(self, values: Array, share: float) -> Array:
        """(rows,) 1.0, 0.0, or NaN where the value is unknown."""
        known = ~np.isnan(values)
        if not known.any():
            return np.full(values.shape, np.nan)
        holds = values < self.below
        if self.end == "high":
            holds &= values > np.quantile(values[known], 1 - share)
        elif self.end == "low":
            holds &= values < np.quantile(values[known], share)
        return np.where(known, holds, np.nan)

    def says(self, values: Array, row: int) -> str:
        """The reason in words, of one row where it holds."""
        known = values[~np.isnan(values)]
        beyond = known > values[row] if self.end == "low" else known < values[row]
        return self.words.format(value=values[row], percentile=100 * float(beyond.mean()))


REASONS = (
    Reason(
        "states alike",
        PRODUCTS,
        lambda cc, cr: cr - cc,
        "the hidden states of its two responses are alike: ches {value:.4g}, above {percentile:.0f}% of the pairs",
        end="high",
    ),
    Reason(
        "valley deep",
        ("valley_depth",),
        np.asarray,
        "its rejected response lies deep in a valley: valley_depth {value:.3g} nats a token, above {percentile:.0f}% of the pairs",
        end="high",
    ),
    Reason(
        "share negative",
        KERNEL,
        displacement_share.function,
        "its own gradient pushes the chosen response down: displacement_share {value:.3g} nats per nat of margin",
        below=0.0,
    ),
    Reason(
        "forecast low",
        (FORECAST,),
        np.asarray,
        "the set's first step pushes its chosen response down: batch_forecast {value:.3g} nats per unit of step, below {percentile:.0f}% "
        "of the pairs",
        below=0.0,
        end="low",
    ),
)


def reasons(columns: Mapping[str, Array | None], share: float) -> dict[str, tuple[Reason, Array, Array]]:
    """name -> (reason, its values, where it holds), each (rows,), of the reasons whose columns are there. `share` of the rows is the worst end."""
    signs = {}
    for reason in REASONS:
        given = [columns.get(name) for name in reason.columns]
        if all(column is not None for column in given):
            values = np.asarray(reason.value_of(*(np.asarray(column, float) for column in given)))
            signs[reason.name] = (reason, values, reason.holds(values, share))
    return signs


def count(columns: Mapping[str, Array | None], share: float) -> Array:
    """(rows,) how many reasons hold; NaN where one that needs no backward pass is unknown."""
    signs = reasons(columns, share)
    total = np.sum([np.nan_to_num(holds) for _, _, holds in signs.values()], axis=0)
    unknown = np.any([np.isnan(signs[name][2]) for name in ("states alike", "valley deep")], axis=0)
    return np.where(unknown, np.nan, total)


@score(
    needs=NEEDS,
    optional=OPTIONAL,
    kind="preference",
    unit="reasons",
    worst="high",
    high_means="several signs say that DPO may push its chosen response down",
    source=f"{RAZIN}; {REN}",
)
def squeezing_prone(*columns: Array | None, share: Share = 0.1) -> Array:
    """How many reasons hold, (rows,); `curate explain` says which. NULL where CHES or the valley depth is. share: the worst end of a rank."""
    return count(_named(*columns), share)


@score(
    needs=NEEDS,
    optional=OPTIONAL,
    kind="preference",
    unit="weight",
    worst="low",
    high_means="no sign of squeezing: full weight",
    source=f"{RAZIN}; {REN}",
)
def squeezing_weight(*columns: Array | None, share: Share = 0.1) -> Array:
    """1/(1 + squeezing_prone), (rows,): for `export.weight`. NULL where squeezing_prone is."""
    return 1 / (1 + count(_named(*columns), share))


@dataset_value(needs=NEEDS, optional=OPTIONAL, kind="preference", source=REN)
def squeezing_flags(*columns: Array | None, share: Share = 0.1) -> list[Value]:
    """The share of pairs with at least one reason, and with at least two; Wilson intervals."""
    counts = count(_named(*columns), share)
    return [
        proportion_value(name, np.where(np.isnan(counts), np.nan, counts >= least))
        for name, least in (("squeezing_prone_any", 1), ("squeezing_prone_two", 2))
    ]


def _named(*columns: Array | None) -> dict[str, Array | None]:
    return dict(zip((*NEEDS, *KERNEL, FORECAST), columns, strict=True))
