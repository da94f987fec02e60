"""Inner products of a pair's summed final hidden states: what CHES is made of.

    h± = Σ_t state that predicts y±_t        after the final norm; last prompt token's state in, state at EOS out; T
    states hidden_cc = ⟨h+, h+⟩   hidden_cr = ⟨h+, h−⟩   hidden_rr = ⟨h−, h−⟩
    last_cr   = ⟨last summed state of y+, last summed state of y−⟩        (those that predict EOS)
    hidden_eos_cc, hidden_eos_cr: the same sums with the state at EOS itself in, T + 1 states

The authors' experiments tokenise responses without EOS and sum |y| + 1 states, from the last prompt token to the last
response token: with EOS appended those are the very T states of hidden_cc. The eos columns are what their sum gives on
sequences that do end in EOS. Sums are float64, inner products float64, whatever the model's dtype.

Source: Razin et al. 2024, arXiv:2410.08847, Definition 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from curate.measurements.declare import measurement

if TYPE_CHECKING:
    import torch

    from curate.passes.batch import Batch


@measurement(
    reads="forward",
    kind="preference",
    columns={
        "hidden_cc": "activation²",
        "hidden_cr": "activation²",
        "hidden_rr": "activation²",
        "last_cr": "activation²",
        "hidden_eos_cc": "activation²",
        "hidden_eos_cr": "activation²",
    },
)
def hidden(batch: Batch) -> dict[str, torch.Tensor]:
    """Inner products of the summed final hidden states of the two responses."""
    chosen_states, rejected_states = batch.chosen.states, batch.rejected.states  # (N, d)
    c, r = batch.chosen.sum(chosen_states), batch.rejected.sum(rejected_states)  # (rows, d)
    ce, re = c + batch.chosen.end_states.double(), r + batch.rejected.end_states.double()
    last_c, last_r = batch.chosen.last(chosen_states).double(), batch.rejected.last(rejected_states).double()
    return {
        "hidden_cc": (c * c).sum(-1),
        "hidden_cr": (c * r).sum(-1),
        "hidden_rr": (r * r).sum(-1),
        "last_cr": (last_c * last_r).sum(-1),
        "hidden_eos_cc": (ce * ce).sum(-1),
        "hidden_eos_cr": (ce * re).sum(-1),
    }
