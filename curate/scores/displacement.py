"""Likelihood displacement: how alike a pair's two responses look to the model, from its final hidden states.

    ches    = ⟨h+, h−⟩ − ‖h+‖²                    h = sum of final states over the T positions that predict the response
    ches_ln = ⟨h+, h−⟩/(T+·T−) − ‖h+‖²/T+²        the last prompt token's state is in, the state at the EOS position is out

With eos_state the state at the EOS position is in too, T + 1 states: what the authors' experiments without EOS sum.
CHES is a difference of large numbers: judge an error against |⟨h+, h−⟩| + ‖h+‖², not against the difference.
Source: Razin et al. 2024, arXiv:2410.08847, Definition 2. Published use: train on the 5% of pairs with the lowest ches_ln. Which chosen responses of
held-out pairs fall, `batch_forecast` told better (docs/results.md).
"""

from __future__ import annotations

from curate.scores.arithmetic import ratio
from curate.scores.declare import score
from curate.scores.declared import Array

RAZIN = "Razin et al. 2024, arXiv:2410.08847"
PRODUCTS = ("hidden_cc", "hidden_cr")
WITH_EOS = ("hidden_eos_cc", "hidden_eos_cr")


@score(
    needs=PRODUCTS,
    optional=WITH_EOS,
    kind="preference",
    unit="activation²",
    worst="high",
    high_means="DPO tends to push the chosen response down",
    source=RAZIN,
)
def ches(
    hidden_cc: Array,
    hidden_cr: Array,
    hidden_eos_cc: Array | None = None,
    hidden_eos_cr: Array | None = None,
    *,
    eos_state: bool = False,
) -> Array:
    """⟨h+, h−⟩ − ‖h+‖², (rows,). NULL where one is. eos_state: sum the state at the EOS position too."""
    cc, cr = _convention(hidden_cc, hidden_cr, hidden_eos_cc, hidden_eos_cr, eos_state)
    return cr - cc


@score(
    needs=(*PRODUCTS, "chosen_tokens", "rejected_tokens"),
    optional=WITH_EOS,
    kind="preference",
    unit="activation²",
    worst="high",
    high_means="DPO tends to push the chosen response down, whatever the lengths",
    source=RAZIN,
)
def ches_ln(
    hidden_cc: Array,
    hidden_cr: Array,
    chosen_tokens: Array,
    rejected_tokens: Array,
    hidden_eos_cc: Array | None = None,
    hidden_eos_cr: Array | None = None,
    *,
    eos_state: bool = False,
) -> Array:
    """CHES of the mean states, (rows,). NULL where one is, or a response has no token. eos_state: means over T + 1 states."""
    cc, cr = _convention(hidden_cc, hidden_cr, hidden_eos_cc, hidden_eos_cr, eos_state)
    states_c, states_r = chosen_tokens + eos_state, rejected_tokens + eos_state
    return ratio(cr, states_c * states_r) - ratio(cc, states_c**2)


@score(
    needs=("last_cr",),
    kind="preference",
    unit="activation²",
    worst="high",
    high_means="the two responses end in like states",
    source=RAZIN,
)
def last_state_product(last_cr: Array) -> Array:
    """The inner product of the two last summed states, those that predict EOS. NULL where it is."""
    return last_cr.copy()


@score(
    needs=("edit_distance",),
    kind="preference",
    unit="share",
    worst="low",
    high_means="the two responses share few tokens in order",
    source="Pal et al. 2024, arXiv:2402.13228; Razin et al. 2024, arXiv:2410.08847",
)
def edit_distance(edit_distance: Array) -> Array:
    """Levenshtein distance of the two token sequences over the longer length, 0..1. NULL where it is."""
    return edit_distance.copy()


def _convention(
    cc: Array, cr: Array, eos_cc: Array | None, eos_cr: Array | None, eos_state: bool
) -> tuple[Array, Array]:
    if not eos_state:
        return cc, cr
    if eos_cc is None or eos_cr is None:
        raise ValueError("eos_state: true needs hidden_eos_cc and hidden_eos_cr, which nobody measured; leave it out")
    return eos_cc, eos_cr
