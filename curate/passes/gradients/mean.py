"""Directions in weight space: a set's step, a mean gradient, and what an optimizer makes of them.

    Σ_j w_j ∇ log π(y_j)                       one ordinary backward over packed rows, accumulated (`accumulate`); the head's part forward only
    DPO's step  G = mean_j s_j (g+_j − g−_j)     s_j = β σ(−β·margin_j), β/2 at the reference
    v = P·x                                    P diagonal, taken at G: 1 (sgd), 1/|G| (sign: P·G = sign(G), AdamW's first step), 1/(√v̂ + 1e-8) (adam)

What rows do along such a direction is passes/gradients/derivatives.py.

Source: Rafailov et al. 2023, arXiv:2305.18290 (DPO's gradient); Xia et al. 2024, arXiv:2402.04333 (LESS: Adam's P).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from curate.errors import ModelError
from curate.passes.bundles import Bundle, batch_rows, bundle_halves, check_lengths, items_of, states_of
from curate.passes.descriptions import first_line
from curate.passes.files import write_atomically
from curate.passes.gradients.head import head_backward
from curate.passes.gradients.layer_rules import Parameters, parameter_names
from curate.passes.halving import halving
from curate.passes.kernels.cpu_products import NARROW
from curate.passes.layout import Item
from curate.passes.loading.model import Model
from curate.passes.tensor_files import BLANK, sealed_tensors
from curate.passes.tokens import Encoded, EncodedPair

Rows = Sequence[Encoded | EncodedPair]
Vector = dict[str, torch.Tensor]  # parameter's name -> tensor of its shape, on the CPU
Step = Literal["sgd", "sign", "adam"]
Weigh = Callable[
    [np.ndarray, torch.Tensor], torch.Tensor
]  # rows (n,), their log-probabilities (n, sides) -> weights (n, sides), float64

TOKENS_ON_CPU = 1024  # in one graph; more cost memory there and gain nothing
ADAM_EPSILON = 1e-8


def dpo_weights(beta: float, rows: int, reference: np.ndarray | None = None) -> Weigh:
    """Weights of the step on the mean DPO loss of `rows` pairs: ±s_j/rows. reference (len(encoded), 2): the reference's log-probabilities of chosen
    and rejected, None where the model is the reference itself.
    """

    def weigh(at: np.ndarray, logp: torch.Tensor) -> torch.Tensor:
        margin = torch.zeros(len(at), dtype=torch.float64, device=logp.device)
        if reference is not None:
            margin = (logp - torch.from_numpy(reference[at]).to(logp.device)) @ logp.new_tensor([1.0, -1.0])
        s = beta * torch.sigmoid(-beta * margin) / rows
        return torch.stack([s, -s], 1)

    return weigh


def fixed_weights(*of_sides: float) -> Weigh:
    """The same weights for every row: fixed_weights(1, 0) sums ∇ log π of the chosen responses."""
    return lambda at, logp: logp.new_tensor(of_sides).expand(len(at), -1)


def token_mean_weights(encoded: Rows, rows: int) -> Weigh:
    """1/(rows · T_j): the mean over SFT rows of their mean log-probability per token."""
    lengths = np.asarray([row.n_response if isinstance(row, Encoded) else 0 for row in encoded], np.float64)
    return lambda at, logp: torch.from_numpy(1.0 / (rows * lengths[at]))[:, None].to(logp.device)


def accumulate(
    model: Model,
    encoded: Rows,
    weigh: Weigh,
    *,
    token_budget: int = 16384,
    parameters: Parameters | Set[str] = "all",
    count: Callable[[int], object] = lambda n: None,
) -> Vector:
    """Σ_j Σ_side w ∇ log π over the rows that can be measured, all of one kind: an ordinary backward, gradients accumulated in the
    model's dtype, float32 or wider.

    parameters: as of backward.measure, a tied matrix whole; or the parameters' own names. count: called with the number of rows of each batch that
    is done. Where memory is short the batches are halved and the sum begins anew (count then gets a negative number). ModelError where a single row
    does not fit, nothing can be measured, or the model's dtype is narrower: sums over a set's rows do not fit into bfloat16.
    """
    if model.dtype in NARROW:
        raise ModelError(
            f"{model.path or type(model.module).__name__}: gradients are summed over many rows, which {str(model.dtype).removeprefix('torch.')} "
            'cannot hold. Load the model with dtype="float32".'
        )
    names = parameters if isinstance(parameters, Set) else set(parameter_names(model, parameters))
    trained = {name: p for name, p in model.module.named_parameters() if name in names}
    rows = _rows(model, encoded)
    limit = min(token_budget, TOKENS_ON_CPU) if model.device.type == "cpu" else token_budget
    done = 0

    def anew() -> None:
        nonlocal done
        count(-done)
        done = 0
        try:
            for p in trained.values():
                p.requires_grad_(True)
                p.grad = torch.zeros_like(p)
        except torch.OutOfMemoryError:
            raise ModelError(
                f"{model.path}: the weights and a gradient of them do not fit into the memory of {model.device}.\n"
                "  Take the gradients over the last layers alone: `--set gradients.parameters=2`."
            ) from None

    def run(bundle: Bundle) -> None:
        nonlocal done
        _backward(model, bundle, weigh)
        done += len(bundle.rows)
        count(len(bundle.rows))

    def too_long(bundle: Bundle) -> ModelError:
        return ModelError(
            f"{model.path}: forward and backward of one row of {bundle.n_tokens} tokens do not fit into the memory of "
            f"{model.device}.\n  Lower `tokens.max_length`."
        )

    try:
        halving(batch_rows(model, rows, limit), run, bundle_halves, too_long, anew=anew)
        return {name: p.grad.cpu() for name, p in trained.items() if p.grad is not None}
    finally:
        for p in trained.values():
            p.requires_grad_(False)
            p.grad = None


def _rows(model: Model, encoded: Rows) -> dict[int, list[Item]]:
    """The sequences of the rows that can be measured. ModelError where there are none, or rows of both kinds."""
    if len({type(row) for row in encoded}) > 1:
        raise ModelError("a direction is taken of pairs or of SFT rows, not of both at once.")
    rows = {i: items_of(i, row, False, None) for i, row in enumerate(encoded) if row.problem is None}
    if not rows:
        raise ModelError(
            "no row can be measured, so there is no direction to take. The column token_problem of the view `scored` says why "
            "(mostly: longer than `tokens.max_length`)."
        )
    check_lengths(model, rows)
    return rows


def _backward(model: Model, bundle: Bundle, weigh: Weigh) -> None:
    """Forward and backward of one batch; its gradients are added to the parameters' `grad`."""
    with torch.enable_grad(), model.products():
        states, where = states_of(model, bundle)  # (N, d)
    linear = model.module.get_output_embeddings()
    bias = getattr(linear, "bias", None)
    with torch.no_grad():
        at, slope = _head(
            model, bundle, weigh, states.detach(), where, linear.weight.grad, None if bias is None else bias.grad
        )
        if states.requires_grad:
            slopes = torch.zeros_like(states).index_add_(
                0, at, slope.to(states.dtype)
            )  # a shared prompt's end predicts for both
    if states.requires_grad:
        states.backward(slopes)


def _head(
    model: Model,
    bundle: Bundle,
    weigh: Weigh,
    states: torch.Tensor,
    where: list[np.ndarray],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    slope: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The LM head's backward of one batch: the positions (n,) of the states that predict a response token, and the gradients (n, d) there. The head's
    own gradient is added to weight (V, d) and bias (V,), where they are given.
    """
    items, rows = bundle.items, np.asarray(bundle.rows)
    sides = len(items) // len(rows)
    counts = torch.tensor([len(item.targets) for item in items])
    at = torch.from_numpy(np.concatenate([w[i.targets - 1] for i, w in zip(items, where)])).to(model.device)
    tokens = torch.from_numpy(np.concatenate([i.ids[i.targets] for i in items]).astype(np.int64)).to(model.device)
    side_of = torch.arange(len(items)).repeat_interleave(counts).to(model.device)  # (N,)
    ends = counts.view(-1, sides).sum(1).cumsum(0)

    def of_tokens(first: int, stop: int, logp: torch.Tensor) -> torch.Tensor:
        begin = int(ends[first - 1]) if first else 0
        own = side_of[begin : int(ends[stop - 1])] - first * sides
        sums = logp.new_zeros((stop - first) * sides).index_add_(0, own, logp)
        return weigh(rows[first:stop], sums.view(-1, sides)).reshape(-1)[own]

    return at, head_backward(model.head, states[at], tokens, ends.tolist(), of_tokens, weight, bias, slope=slope)


def accumulate_head(model: Model, encoded: Rows, weigh: Weigh, *, token_budget: int = 16384) -> Vector:
    """The LM head's part of `accumulate`'s sum, {"weight": (V, d), "bias": (V,)}, float32 or wider, by forward passes alone. Where the head is the
    embedding too, only its use as a head counts.
    """
    wide = torch.promote_types(model.dtype, torch.float32)
    weight = torch.zeros_like(model.head.weight, dtype=wide)
    bias = None if model.head.bias is None else torch.zeros_like(model.head.bias, dtype=wide)
    with torch.inference_mode():
        for bundle in batch_rows(model, _rows(model, encoded), token_budget):
            states, where = states_of(model, bundle)
            _head(model, bundle, weigh, states, where, weight, bias, slope=False)
    return {"weight": weight.cpu()} | ({} if bias is None else {"bias": bias.cpu()})


def save_vector(vector: Vector, file: Path) -> None:
    """Write a vector as a safetensors file, whole or not at all. ModelError where it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with write_atomically(file) as new:
            save_file({name: value.contiguous() for name, value in vector.items()}, new, metadata=BLANK)
            sealed_tensors(new)
    except (OSError, SafetensorError) as problem:  # the second is how a full disk is said
        raise ModelError(f"{file}: a direction cannot be kept there ({first_line(problem)}).") from None


def load_vector(file: Path) -> Vector:
    """Read a vector that `save_vector` wrote; its tensors are read from the disk as they are used. ModelError where that fails."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (OSError, SafetensorError) as problem:
        raise ModelError(
            f"{file}: unreadable ({type(problem).__name__}). Delete its folder, it is made anew."
        ) from problem


def precondition(x: Vector, step: Step, at: Vector, second_moment: Vector | None = None) -> Vector:
    """P·x, for the diagonal P of an optimizer step.

    at: the gradient G that sign's diagonal 1/|G| is taken at (0 where G is 0). second_moment: Adam's v̂ by parameter, bias-corrected. Parameters
    that it lacks, and weights where it is 0 (they never had a gradient), become 0. ModelError where it lacks all of x.
    """
    if step == "sgd":
        return x
    if step == "sign":
        return {name: torch.where(at[name] == 0, 0, value / at[name].abs()) for name, value in x.items()}
    if second_moment is None:
        raise ModelError("step adam needs Adam's second moments: a checkpoint's optimizer.pt, or a warm-up.")
    check_same(second_moment, x)
    still = torch.zeros(())
    moments = {name: second_moment.get(name, still) for name in x}
    return {
        name: torch.where(moments[name] > 0, value / (moments[name].sqrt() + ADAM_EPSILON), 0)
        for name, value in x.items()
    }


def check_same(held: Iterable[str], moved: Iterable[str]) -> None:
    """ModelError where Adam's state and the gradients share no parameter. held, moved: the parameters' names of each."""
    held, moved = list(held), list(moved)
    if not set(held) & set(moved):
        raise ModelError(
            f"Adam's state is of other parameters ({next(iter(held), 'none')}, …) than the gradients ({moved[0]}, …): nothing moves.\n"
            "  Of a LoRA run the optimizer holds the adapter alone: `--set gradients.parameters=lora`."
        )
