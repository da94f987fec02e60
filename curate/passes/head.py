"""The LM head, read by blocks of the vocabulary: never a tokens × vocabulary tensor in float32.

For a state h that predicts token y:  z = logits(h),  log π(y) = z_y − log Σ_v exp z_v

z_y is taken by itself, as a dot product in float32 or wider, and the other tokens' log-sum-exp o (online over blocks)
beside it:

    log π(y) = −softplus(o − z_y)

so that a log-probability near 0, which is what a memorised text has, keeps its digits (1 − π is never rounded away),
and a bf16 head does not round the target's logit. Everything beyond the block's logits is float64 per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import softplus

from curate.passes.kernels import cpu_kernels
from curate.passes.kernels.cpu_products import linear

ROWS = 512  # states per block
COLUMNS = 2048  # tokens of the vocabulary per block: 4 MB of float32 logits stay in the processor's cache
SUMMED = 1024, 512  # the same where a block is summed and let go at once: a twentieth faster so
ON_GPU = 8  # ROWS and COLUMNS are this much wider there
LOG2_E = math.log2(math.e)
NOTHING = -1e37  # stands for a logit of −∞ where 0 · −∞ must be 0

# What can be asked of the head, each (tokens,) float64. One sweep over the vocabulary serves all of them but the last, which takes a second
# sweep (`Head.below_line`) over the tokens it is asked for.
STATISTICS = {
    "logp": "log π(y), nats",
    "top_logp": "largest log-probability, nats",
    "top_token": "its token (int64)",
    "entropy": "−Σ π log π, nats",
    "square": "Σ π², in [1/V, 1]",
    "other_logp": "largest log-probability among tokens other than y, nats",
    "rank": "how many tokens are more probable than y",
    "gap": "z_y − largest other logit",
    "error": "‖π − onehot(y)‖₂, in [0, √2]",
    "lse": "log Σ_v exp z_v",
    "below_line": "share of the vocabulary with π_i < Σπ² − π_y",
}
SECOND_SWEEP = {"below_line": ("logp", "lse", "square")}  # and what of the first it needs
_SQUARES = {"square", "error"}  # what needs Σπ²


@dataclass(frozen=True)
class Head:
    """logits(h) = cap(scale · (W h + b)), cap(z) = c·tanh(z/c) where a model has one."""

    weight: torch.Tensor  # (V, d)
    bias: torch.Tensor | None = None  # (V,)
    scale: float = 1.0
    cap: float | None = None

    def logits(
        self, states: torch.Tensor, columns: slice = slice(None), out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(n, d) states -> (n, width) logits of a block of the vocabulary, in float32 or wider; into `out` where it fits."""
        weight = self.weight[columns]
        states = states.to(weight.dtype)
        room = None if out is None else out[: len(states), : len(weight)]
        if states.is_cuda or states.dtype == torch.float64:
            z = torch.mm(states, weight.T)
        else:
            z = linear(states, weight)
        wide = torch.promote_types(z.dtype, torch.float32)
        if z.dtype != wide:
            z = z.to(wide) if room is None else room.copy_(z)
        if self.bias is not None:
            z = z.add_(self.bias[columns])
        return self._shaped(z)

    def target(self, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """(n, d) states, (n,) tokens -> (n,) float64 logit of each state's own token."""
        wide = torch.promote_types(states.dtype, torch.float32)
        z = (states.to(wide) * self.weight[tokens].to(wide)).sum(-1, dtype=torch.float64)
        if self.bias is not None:
            z = z + self.bias[tokens]
        return self._shaped(z)

    def _shaped(self, z: torch.Tensor) -> torch.Tensor:
        if self.scale != 1.0:
            z = z.mul_(self.scale)
        if self.cap is not None:
            z = z.div_(self.cap).tanh_().mul_(self.cap)
        return z

    def statistics(
        self, states: torch.Tensor, tokens: torch.Tensor, names: Iterable[str], *, at: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """States and the (n,) tokens they predict -> {name: (n,) float64 (top_token: int64)} of the wanted names.

        states (n, d), or with `at` (n,) the rows of any states in which to look; nothing is gathered beyond a block.
        """
        names = frozenset(names)
        parts: list[dict[str, torch.Tensor]] = []
        size, blocks = self._summed()
        columns = max((block.stop - block.start for block in blocks), default=0)
        wide = torch.promote_types(states.dtype, torch.float32)
        room = torch.empty(2, min(size, len(tokens)), columns, dtype=wide, device=states.device)
        for part in _pieces(len(tokens), size) or [slice(0)]:
            h = states[part] if at is None else states[at[part]]
            parts.append(self._of_rows(h, tokens[part], names, blocks, room))
        return {name: torch.cat([part[name] for part in parts]) for name in names}

    def blocks(self) -> list[slice]:
        """The vocabulary in slices of at most COLUMNS."""
        return _pieces(len(self.weight), COLUMNS * ON_GPU if self.weight.is_cuda else COLUMNS)

    def _summed(self) -> tuple[int, list[slice]]:
        """How many states at a time, and the vocabulary in slices, for a sweep that keeps sums alone."""
        if self.weight.is_cuda:
            return ROWS * ON_GPU, self.blocks()
        return SUMMED[0], _pieces(len(self.weight), SUMMED[1])

    def _of_rows(
        self,
        states: torch.Tensor,
        tokens: torch.Tensor,
        names: frozenset[str],
        blocks: Sequence[slice],
        room: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """One sweep over the vocabulary for (n, d) states. room: (2, ≥ n, ≥ width), where blocks are worked on."""
        own = self.target(states, tokens)  # (n,)
        sums = {name: torch.zeros_like(own) for name in ("total", "square", "weighted")}
        sums["best"] = torch.full_like(own, NOTHING)
        if "rank" in names:
            sums["rank"] = torch.zeros_like(own)
        if "top_token" in names:
            sums["best_token"] = torch.zeros_like(tokens)
        kernels = cpu_kernels.kernels() if room.dtype == torch.float32 and room.device.type == "cpu" else None
        for block in blocks:
            z = self.logits(states, block, room[0])  # (n, width)
            if kernels is not None:
                kernels.head_sums(z, block.start, NOTHING, tokens, own, sums)
            else:
                _add(_hide(z, tokens, block), block.start, own, sums, names, room[1])
        return self._read(tokens, names, own, sums)

    def _read(
        self, tokens: torch.Tensor, names: frozenset[str], own: torch.Tensor, sums: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Everything per token, from the sums over the other tokens and the token's own logit; (n,) float64."""
        best, total, square, weighted = (sums[name] for name in ("best", "total", "square", "weighted"))
        others = best + total.log()  # log Σ_{v≠y} exp z_v
        logp = -softplus(others - own)
        lse = torch.logaddexp(others, own)
        statistics = {"logp": logp, "lse": lse, "gap": own - best, "other_logp": best - lse}
        statistics["top_logp"] = torch.maximum(logp, best - lse)
        if "rank" in names:
            statistics["rank"] = torch.where(logp.isnan(), torch.nan, sums["rank"])  # nothing compares with NaN
        if "top_token" in names:
            statistics["top_token"] = torch.where(own >= best, tokens, sums["best_token"])
        pi = logp.exp()
        if "entropy" in names:  # −Σ π log π = lse − Σ π z
            rest = torch.exp(best - lse) * (weighted + total * best)  # Σ_{v≠y} π z
            statistics["entropy"] = lse - rest - pi * own
        if names & _SQUARES:
            of_others = torch.exp(2 * (best - lse)) * square  # Σ_{v≠y} π²
            statistics["square"] = of_others + pi**2
            statistics["error"] = (
                of_others + torch.expm1(logp) ** 2
            ).sqrt()  # 1 − π from log π: exact where π is near 1
        return {name: statistics[name] for name in names}

    def below_line(
        self,
        states: torch.Tensor,
        tokens: torch.Tensor,
        first: Mapping[str, torch.Tensor],
        *,
        at: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(n,) share of the vocabulary with π_i < Σπ² − π_y, y itself counted like any other. first: `logp`, `lse`, `square`."""
        line = first["square"] - first["logp"].exp()
        limit = torch.where(line > 0, line.clamp_min(1e-300).log() + first["lse"], NOTHING)  # of logits
        count = (first["logp"] + first["lse"] < limit).double() - (
            limit > NOTHING
        ).double()  # y stands at NOTHING in its block
        size, blocks = self._summed()
        for part in _pieces(len(tokens), size):
            h = states[part] if at is None else states[at[part]]
            for block in blocks:
                z = _hide(self.logits(h, block), tokens[part], block)
                count[part] += (z < limit[part, None].to(z.dtype)).sum(1)
        known = torch.isfinite(first["logp"]) & torch.isfinite(
            first["square"]
        )  # no count where there is no distribution
        return torch.where(known, count / len(self.weight), torch.nan)


def _pieces(n: int, size: int) -> list[slice]:
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def _hide(z: torch.Tensor, tokens: torch.Tensor, block: slice) -> torch.Tensor:
    """Logits (n, width) of one block with each row's own token at NOTHING, in place."""
    inside = ((tokens >= block.start) & (tokens < block.stop))[:, None]
    at = (tokens - block.start).clamp(0, z.shape[1] - 1)[:, None]
    return z.scatter_(1, at, torch.where(inside, z.new_tensor(NOTHING), z.gather(1, at)))


def _add(
    z: torch.Tensor,
    start: int,
    own: torch.Tensor,
    sums: dict[str, torch.Tensor],
    names: frozenset[str],
    room: torch.Tensor,
) -> None:
    """What `Kernels.head_sums` does, by torch's operators: (n, width) logits, own tokens at NOTHING, into the running sums. z is overwritten.
    What nobody wants is left out.
    """
    best, total = sums["best"], sums["total"]
    if "rank" in sums:
        sums["rank"] += (z > own[:, None].to(z.dtype)).sum(1)
    if "best_token" in sums:
        top, at = z.max(1)
        sums["best_token"].copy_(torch.where(top > best, at + start, sums["best_token"]))
    else:
        top = z.amax(1)
    new = torch.maximum(best, top.double())
    shrink = torch.exp(best - new)
    z.sub_(new[:, None].to(z.dtype)).mul_(LOG2_E)
    e = torch.exp2(z, out=room[: len(z), : z.shape[1]])  # four times as fast as torch's exp on a CPU
    if "entropy" in names:
        added = z.mul_(e).sum(1).double() / LOG2_E
        sums["weighted"].copy_(shrink * (sums["weighted"] + total * (best - new)) + added)
    if names & _SQUARES:
        sums["square"].copy_(sums["square"] * shrink**2 + torch.mul(e, e, out=z).sum(1).double())
    total.copy_(total * shrink + e.sum(1).double())
    best.copy_(new)
