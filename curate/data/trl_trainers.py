"""Mixins for TRL's trainers that use what an export of curate holds beside its texts. This file is copied beside such exports; it needs only TRL.

    from trl import DPOConfig, DPOTrainer
    from trl_trainers import GivenReference, WeightedRows      # or: from curate.data.trl_trainers

    class Trainer(WeightedRows, GivenReference, DPOTrainer):
        pass

GivenReference    DPO's reference log-probabilities are the columns ref_chosen_logps and ref_rejected_logps: no reference model, no pass of it
WeightedRows      row i's loss counts w_i / mean(w), w the column `weight`: over the rows, Σ w_i·loss_i / Σ w_i (SFT: of its tokens)

Written for TRL 1.16. Evaluation is not weighted.
"""

from __future__ import annotations

from typing import Any

WEIGHT, REFERENCE = "weight", ("ref_chosen_logps", "ref_rejected_logps")


class GivenReference:
    """For DPOTrainer with `precompute_ref_log_probs=True`: a dataset that has the two columns keeps them, and nothing is computed."""

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if set(REFERENCE) <= set(dataset.column_names):
            return dataset
        return super()._precompute_ref_logps(dataset, name, batch_size)  # type: ignore[misc]


class WeightedRows:
    """For DPOTrainer and SFTTrainer: a forward pass a row, so that each row's loss can be weighed. Not with packed rows, which share one."""

    args: Any
    train_dataset: Any
    data_collator: Any
    _signature_columns: Any

    def __init__(self, *args: Any, **given: Any) -> None:
        super().__init__(*args, **given)
        options = self.args
        if getattr(options, "packing", False) or getattr(options, "padding_free", False):
            raise ValueError(
                "WeightedRows: packed rows have one loss together; set packing=False and padding_free=False."
            )
        weights = self.train_dataset[WEIGHT]
        self._mean_weight = sum(weights) / len(weights)
        self.data_collator = _WithWeights(self.data_collator)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if WEIGHT not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, WEIGHT]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        weights = inputs.pop(WEIGHT, None)
        plain = super().compute_loss  # type: ignore[misc]
        if weights is None or return_outputs or not model.training:
            return plain(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        n, tokens = len(weights), num_items_in_batch
        if tokens is None and "labels" in inputs:
            tokens = (inputs["labels"][..., 1:] != -100).sum()
        losses = [plain(model, _row(inputs, i, n), num_items_in_batch=tokens) for i in range(n)]
        total = sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / self._mean_weight
        return total if "labels" in inputs else total / n  # SFT's losses are shares of all tokens' sum


class _WithWeights:
    """A collator that keeps the rows' weights."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        weights = [row[WEIGHT] for row in rows if WEIGHT in row]
        batch = self.collator([{name: value for name, value in row.items() if name != WEIGHT} for row in rows])
        return batch | ({WEIGHT: torch.tensor(weights, dtype=torch.float32)} if len(weights) == len(rows) else {})


def _row(inputs: dict[str, Any], i: int, n: int) -> dict[str, Any]:
    """One row of a batch of n: of DPO's tensors of 2n, the chosen and the rejected one."""
    row = {}
    for name, value in inputs.items():
        size = value.size(0) if getattr(value, "ndim", 0) else 0
        row[name] = value[[i, n + i]] if size == 2 * n else value[i : i + 1] if size == n else value
    return row
