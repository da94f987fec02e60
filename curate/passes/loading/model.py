"""A causal language model ready for passes: loaded, its head found and checked, packed layout if its attention allows
it.

What is assumed of a model is checked on the spot with a probe of a few dozen tokens: that our head on its last hidden
states gives the model's own logits (soft-cap, scale and bias included), and that packed rows give the states of plain
ones. A head we do not understand is refused by name; an attention we do not understand runs padded, and
`layout_reason` says why.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from curate.errors import ModelError
from curate.passes.descriptions import describe_folder, first_line
from curate.passes.head import Head
from curate.passes.kernels import attention as packing
from curate.passes.kernels import cpu_kernels
from curate.passes.kernels.cpu_products import NARROW, CpuProducts, one_dnn_is_faster
from curate.passes.kernels.cpu_sweeps import Sweeps
from curate.passes.layout import Group, Item, Layout
from curate.passes.loading import weights
from curate.passes.loading.adapter import Adapter, Factors
from curate.passes.loading.adapter_config import own_base
from curate.passes.loading.engine import BETWEEN, find_device, find_dtype
from curate.passes.loading.engine import engine_identity as engine_identity
from curate.passes.loading.facts import (
    REFUSED,
    agree,
    keep_freed_memory,
    learned_positions,
    probe_ids,
    rope_limit,
    with_adapters,
)
from curate.passes.loading.own_code import runs_own_code


def load_model(path: str | Path, *, base: str | Path | None = None, dtype: str = "auto", device: str = "auto") -> Model:
    """Load the causal language model at a folder or hub id, or a LoRA adapter's folder around its base.

    base: the model that an adapter sits on (None: the one its own config names). device auto: cuda, else mps, else
    cpu. dtype auto: bfloat16 where the device is a GPU that computes in it, else float32; what was chosen stands in
    `Model.engine`. ModelError when the folder cannot be read or is no causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    base = base or own_base(path)
    if base:
        model = load_model(base, dtype=dtype, device=device)
        model.use(path, base=base)
        return model
    chosen = find_device(device)
    kind = find_dtype(dtype, chosen)
    packing.register()
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=runs_own_code())
        text = config.get_text_config()
        # sdpa ignores soft-caps and sinks, so their plain path is eager
        eager = getattr(text, "attn_logit_softcapping", None) is not None or text.model_type == "gpt_oss"
        options = {"attn_implementation": "eager"} if eager else {}
        with weights.quiet():
            module, report = AutoModelForCausalLM.from_pretrained(
                str(path), dtype=kind, output_loading_info=True, trust_remote_code=runs_own_code(), **options
            )
    except Exception as problem:  # OSError, ValueError, KeyError, ImportError, safetensors' and json's own
        raise ModelError(
            f"{path}: wanted a folder or hub id with a causal language model (config.json, *.safetensors), found "
            f"{describe_folder(path)}.\n  {type(problem).__name__}: {first_line(problem)}\n"
            "  `curate doctor` says what this machine can run."
        ) from problem
    if report["missing_keys"]:  # transformers fills them with random numbers and goes on
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"{path}: the weights lack {len(missing)} of the model's tensors, {missing[0]} for one; found "
            f"{describe_folder(path)}.\n  A causal language model is needed, not a bare encoder or an adapter."
        )
    return Model(module.to(chosen), path=str(path))


class Model:
    """A loaded model: `module`, `device`, `dtype`, `head`, `layout` ("packed" or "padded") and `layout_reason`: why it is
    padded, or why packed attention on CUDA runs without its kernel; else None. `adapter`: the LoRA adapter on it, or None. `known`: what passes
    found out about its modules; forgotten where an adapter is put on, taken off, or exchanged for one of other layers or ranks.
    """

    def __init__(self, module: Any, *, path: str = "", layout: str = "auto") -> None:
        packing.register()
        self.module = module.eval().requires_grad_(False)
        self.path = self.base = path
        self.adapter: Adapter | None = None
        self.known: dict[Any, Any] = {}
        self.device: torch.device = self.module.device
        self.dtype: torch.dtype = self.module.dtype
        self.own_attention: str = self.module.config._attn_implementation
        config = self.module.config.get_text_config()
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self.bos: int | None = getattr(config, "bos_token_id", None)
        self.rope_limit = rope_limit(config)
        self.learned_positions = learned_positions(self.module)
        if self.device.type == "cpu":
            keep_freed_memory()
        self._wide = self._keeps_float32()
        self.head = self._find_head()
        self._loop_reason: str | None = None
        self.layout_reason = "asked for" if layout == "padded" else self._why_padded()
        self.layout = "padded" if self.layout_reason else "packed"
        self.layout_reason = self.layout_reason or self._loop_reason

    @property
    def engine(self) -> str:
        """What ran, for fingerprints and for the user: "torch 2.13.0 cpu float32 packed"."""
        version = torch.__version__.split("+")[0]
        between = f" {BETWEEN}" if self._wide else ""
        return f"torch {version} {self.device.type} {str(self.dtype).removeprefix('torch.')}{between} {self.layout}"

    def use(self, path: str | Path, *, base: str | Path | None = None) -> None:
        """Put another checkpoint's weights into this model, in place; of an adapter its own tensors alone, where its base is here already.

        base: the model that an adapter sits on (None: as its config says). ModelError when it is of another architecture or shape; what was
        here is still here then.
        """
        base, before = base or own_base(path), self.adapter
        factors = Factors(path, self.module) if base else None
        if factors is None or str(base) != self.base:
            self._use_whole(path if factors is None else base)
        if factors is not None and not (self.adapter and self.adapter.exchange(factors)):
            self._take_off()
            self.adapter = Adapter(self.module, factors)
            self.known.clear()
        self.path = str(path)
        # other weights in the same places: the head is what was checked when the model was loaded
        self.head = self._read_head() if self.adapter is before else self._find_head()

    def _use_whole(self, path: Any) -> None:
        before = self.adapter
        self._take_off()
        try:
            weights.swap(self.module, path)
        except BaseException:
            if before is not None:
                before.put_on()
                self.adapter = before
            raise
        self.base = str(path)

    def _take_off(self) -> None:
        if self.adapter is not None:
            self.adapter.take_off()
            self.adapter = None
            self.known.clear()

    def refresh(self) -> None:
        """After its weights were changed in place by somebody else, a training: the head is looked up and checked again."""
        self.module.eval()
        self.head = self._find_head()

    def close(self) -> None:
        """Give the memory back; the model is unusable afterwards."""
        self.known.clear()  # it holds weights too
        kept = [weakref.ref(parameter) for parameter in self.module.parameters()]
        del self.module, self.head
        if any(
            parameter() is not None for parameter in kept
        ):  # by a cycle: finding those takes a good part of a second
            gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def states(self, ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """(batch, n) ids -> (batch, n, d) final hidden states, after the final norm: what the head sees."""
        body = self.module.base_model
        self.reset_dynamic_rope()
        with nullcontext() if torch.is_grad_enabled() else self.products():
            return body(input_ids=ids, use_cache=False, return_dict=True, **inputs).last_hidden_state

    @contextmanager
    def products(self) -> Iterator[None]:
        """How a pass computes: as torch does, or on a CPU as passes/kernels/cpu_products.py and cpu_sweeps.py do, under autograd the former in
        float32
        alone.
        """
        graded = torch.is_grad_enabled()
        with ExitStack() as around:
            if self.device.type == "cpu":
                if self._wide or one_dnn_is_faster():
                    around.enter_context(CpuProducts(wide=self._wide and not graded))
                if not graded and (sweeps := self._sweeps()):
                    around.enter_context(sweeps.installed())
            yield

    def _sweeps(self) -> Sweeps | None:
        if "sweeps" not in self.known:
            kernels = cpu_kernels.kernels()
            self.known["sweeps"] = kernels and Sweeps(self.module, kernels)
        sweeps: Sweeps | None = self.known["sweeps"]
        return sweeps

    def _keeps_float32(self) -> bool:
        """Whether a narrow model on a CPU runs with float32 between its products, and gives its own states so."""
        if self.device.type != "cpu" or self.dtype not in NARROW:
            return False
        ids = torch.from_numpy(probe_ids(self.module.config.get_text_config().vocab_size)[0].astype(np.int64))[None]
        self._wide = False
        with torch.inference_mode():
            own_states = self.states(ids)
            self._wide = True
            try:
                return agree(self.states(ids), own_states, self.dtype)
            except (RuntimeError, TypeError, ValueError):  # a model that mixes dtypes in a way of its own
                return False

    def packed_states(self, layout: Layout) -> torch.Tensor:
        """(N, d) final hidden states of one packed row."""
        ids = torch.from_numpy(layout.ids).to(self.device)[None]
        positions = torch.from_numpy(layout.positions).to(self.device)[None]
        self.module.set_attn_implementation(packing.NAME)
        try:
            with packing.packed(layout):
                # the all-ones mask keeps transformers from looking for packed sequences by itself
                return self.states(ids, position_ids=positions, attention_mask=torch.ones_like(ids))[0]
        finally:
            self.module.set_attn_implementation(self.own_attention)

    def padded_states(self, items: Sequence[Item]) -> torch.Tensor:
        """(len(items) · longest, d) final hidden states: one sequence per line, padded on the right."""
        longest = max(len(item.ids) for item in items)
        ids = np.zeros((len(items), longest), np.int64)
        mask = np.zeros((len(items), longest), np.int64)
        for i, item in enumerate(items):
            ids[i, : len(item.ids)] = item.ids
            mask[i, : len(item.ids)] = 1
        inputs = {} if mask.all() else {"attention_mask": torch.from_numpy(mask).to(self.device)}
        return self.states(torch.from_numpy(ids).to(self.device), **inputs).flatten(0, 1)

    def reset_dynamic_rope(self) -> None:
        """Dynamic NTK keeps the longest length it has seen; without this a row's numbers would depend on the rows
        before it.
        """
        if self.rope_limit is None:
            return
        for part in self.module.modules():
            if getattr(part, "rope_type", None) == "dynamic" and hasattr(part, "original_inv_freq"):
                part.register_buffer("inv_freq", part.original_inv_freq.clone(), persistent=False)
                part.max_seq_len_cached = part.original_max_seq_len

    def _find_head(self) -> Head:
        """The LM head, checked against the model's own logits. ModelError where it does not give them."""
        head = self._read_head()
        self._check(head)
        return head

    def _read_head(self) -> Head:
        """The LM head with its bias, scale and soft-cap."""
        config, linear = self.module.config.get_text_config(), self.module.get_output_embeddings()
        name = type(self.module).__name__
        if linear is None or getattr(linear, "weight", None) is None or linear.weight.ndim != 2:
            raise ModelError(f"{name}: wanted a linear LM head, found {type(linear).__name__}. {REFUSED}")
        scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
        scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)  # Falcon H1
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        return Head(with_adapters(linear, name), getattr(linear, "bias", None), scale, cap)

    def _check(self, head: Head) -> None:
        config = self.module.config.get_text_config()
        ids = torch.from_numpy(probe_ids(config.vocab_size)[0][None, :8].astype(np.int64)).to(self.device)
        with torch.inference_mode():
            ours = head.logits(self.states(ids)[0])
            theirs = self.module(input_ids=ids, use_cache=False).logits[0].to(ours.dtype)
        if not agree(ours, theirs, self.dtype):
            raise ModelError(
                f"{type(self.module).__name__}: our reading of its LM head (scale {head.scale:g}, soft-cap {head.cap}, bias "
                f"{head.bias is not None}) does not give the model's own logits. {REFUSED}"
            )

    def _why_padded(self) -> str | None:
        """None when packed rows give this model's own states; else why they do not."""
        if not getattr(self.module, "_can_set_attn_implementation", lambda: True)():
            return f"{type(self.module).__name__}: does not use transformers' attention interface"
        vocabulary = self.module.config.get_text_config().vocab_size
        first, second, third, fourth = probe_ids(vocabulary)
        joined = [np.concatenate([first, second]), np.concatenate([first, third])]
        items = [Item(0, "a", ids, 1) for ids in (*joined, fourth)]
        layout = Layout.of([Group(tuple(items[:2]), len(first)), Group((items[2],), 0)])
        try:
            with torch.inference_mode():
                row = self.packed_states(layout)
                for item, where in zip(items, layout.where):
                    ids = torch.from_numpy(item.ids.astype(np.int64)).to(self.device)[None]
                    if not agree(row[torch.from_numpy(where).to(self.device)], self.states(ids)[0], self.dtype):
                        return f"{type(self.module).__name__}: packed rows do not give its own states"
            if layout.loop_reason:
                self._loop_reason = f"attention branch by branch, not in one kernel: {layout.loop_reason}"
        except packing.NotPackable as reason:
            return f"{type(self.module).__name__}: {reason}"
        except Exception as problem:  # models without the interface fail in ways of their own
            return f"{type(self.module).__name__}: {type(problem).__name__}: {first_line(problem)}"
        return None
