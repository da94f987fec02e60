"""One batch of sequences through the model and back: what every gradient that is read off its layers has in common.

The tokens lie side by side in the graph, packed or padded; a taker (capture.py) is handed each layer's part on the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from curate.errors import ModelError
from curate.passes.gradients.capture import Capture, Taker
from curate.passes.gradients.graph_memory import Arena
from curate.passes.gradients.layer_rules import Rules
from curate.passes.kernels import attention
from curate.passes.layout import Group, Item, Layout
from curate.passes.loading.model import Model

APART = 192 << 20  # bytes of a graph from which on it is kept apart: a few percent of time for a third of the memory


@dataclass(frozen=True)
class Graph:
    """Where a batch's tokens lie among the N tokens of the graph.

    starts: the position of each sequence's first token. where: for each sequence the positions (its length,) of its tokens. at, tokens (n,): the
    positions that predict a response token, and those tokens.
    """

    model: Model
    sequences: list[Item]
    layout: Layout
    n_tokens: int
    starts: list[int]
    where: list[np.ndarray]
    at: torch.Tensor
    tokens: torch.Tensor

    @classmethod
    def of(cls, model: Model, groups: Sequence[Group]) -> Graph:
        """The graph of groups of sequences. A group's common beginning is there once; in the padded layout each sequence is whole."""
        sequences = [item for group in groups for item in group.items]
        layout = Layout.of(groups)
        longest = max(len(item.ids) for item in sequences)
        n_tokens, where = len(layout.ids), layout.where
        if model.layout == "padded":
            n_tokens = longest * len(sequences)
            where = [np.arange(i * longest, i * longest + len(item.ids)) for i, item in enumerate(sequences)]
        at = np.concatenate([w[i.targets - 1] for w, i in zip(where, sequences)])
        tokens = np.concatenate([i.ids[i.targets] for i in sequences])
        predicting, predicted = (torch.from_numpy(x.astype(np.int64)).to(model.device) for x in (at, tokens))
        return cls(model, sequences, layout, n_tokens, [int(w[0]) for w in where], where, predicting, predicted)

    @property
    def padded(self) -> bool:
        return self.model.layout == "padded"

    def backward(
        self,
        rules: Rules,
        taker: Taker,
        slope: Callable[[torch.Tensor], torch.Tensor],
        *,
        first: torch.Tensor | None = None,
        line: torch.Tensor | None = None,
        checkpointed: bool = False,
        apart: bool = False,
    ) -> torch.Tensor:
        """Forward, then backward from slope(states); (N, d) final states.

        slope: (N, d) states -> their gradients. first, line: of the Capture. checkpointed: layers are run again on the way back. apart:
        activations are kept as in graph_memory.py, where they can be told from other tensors.
        """
        apart &= not self.padded and self.n_tokens not in _heads(self.model)
        arena = Arena(self.n_tokens, first, line) if apart else None
        around = None if self.padded else lambda: attention.packed(self.layout)
        capture = Capture(rules, taker, self.n_tokens, first, line, checkpointed, arena, around)
        with torch.enable_grad(), capture.installed():
            with arena.keeping() if arena else nullcontext():
                states = self._states()
            capture.forward_done()
            with torch.no_grad():
                gradient = slope(states.detach())
            with _packed_attention(self.model) if checkpointed and not self.padded else nullcontext():
                states.backward(gradient)
        return states.detach()

    def _states(self) -> torch.Tensor:
        """(N, d) final states of all tokens of the graph."""
        return self.model.padded_states(self.sequences) if self.padded else self.model.packed_states(self.layout)


def _heads(model: Model) -> set[int]:
    """The numbers of attention heads. In a batch of exactly that many tokens, attention's own (1, heads, …) tensors look like (1, N, …) ones."""
    config = model.module.config.get_text_config()
    return {getattr(config, name, 0) for name in ("num_attention_heads", "num_key_value_heads")}


@contextmanager
def _packed_attention(model: Model) -> Iterator[None]:
    """While inside, the model uses the attention of packed rows: for layers that are run again on the way back."""
    model.module.set_attn_implementation(attention.NAME)
    try:
        yield
    finally:
        model.module.set_attn_implementation(model.own_attention)


def check_angles(model: Model, items: dict[int, list[Item]]) -> None:
    """ModelError where a row is so long that its rotary angles would depend on the other rows of its batch."""
    longest = max(len(item.ids) for row in items.values() for item in row)
    if model.rope_limit is not None and longest >= model.rope_limit:
        raise ModelError(
            f"{model.path}: a row has {longest} tokens; from {model.rope_limit} on this model's rotary angles depend on the longest row of a batch, "
            f"and gradients of such rows are not taken.\n  Set `--set tokens.max_length={model.rope_limit - 1}`."
        )
