"""The compiled operators against float64, and what happens where they cannot be compiled, loaded or trusted."""

from __future__ import annotations

import ctypes
import math
import os
import subprocess

import numpy as np
import pytest
import torch

from curate.measurements import MEASUREMENTS
from curate.passes import forward
from curate.passes.gradients import mean
from curate.passes.head import NOTHING, STATISTICS, Head
from curate.passes.kernels import attention as packing
from curate.passes.kernels import cpu_kernels
from curate.passes.loading.model import Model
from tests import forked
from tests.passes.forward_models import make, random_pairs
from tests.passes.test_block_mask import random_layout, who_sees_whom

PAIRS = [MEASUREMENTS[name] for name in ("likelihood", "entropy", "hidden")]
needed = pytest.mark.skipif(cpu_kernels.kernels() is None, reason=f"no kernels here: {cpu_kernels.refusal()}")


@pytest.fixture(scope="module", params=["own", "AVX2"])
def kernels(request, tmp_path_factory):
    """This machine's kernels, and those of a processor without AVX-512."""
    if request.param == "own":
        return cpu_kernels.kernels()
    if cpu_kernels.kernels() is None:
        pytest.skip(cpu_kernels.refusal())
    library = tmp_path_factory.mktemp("kernels") / "kernels.so"
    flags = [flag for flag in cpu_kernels.FLAGS if "march" not in flag]
    command = [cpu_kernels._compiler(), *flags, "-mavx2", "-mfma", "-shared", "-o", str(library)]
    subprocess.run([*command, str(cpu_kernels.SOURCE), "-lm"], check=True)
    return cpu_kernels.Kernels(ctypes.CDLL(str(library)))


def attention(q, k, v, seen, scaling):
    """(1, heads, N, ·) by definition, in float64 -> (1, N, heads, dv)."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3) * scaling).masked_fill(~torch.from_numpy(seen), -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@needed
@pytest.mark.parametrize(("seed", "groups", "longest"), [(3, 3, 60), (14, 1, 700)])  # one block of keys, and several
@pytest.mark.parametrize("window", [None, 1, 20, 300])
@pytest.mark.parametrize(("kv_heads", "d", "dv"), [(4, 64, 64), (1, 24, 80), (2, 7, 128)])
def test_attention_is_the_definition(kernels, seed, groups, longest, window, kv_heads, d, dv):
    layout = random_layout(seed, groups, longest=longest)
    assert longest < 512 or (layout.longest > 512 and len(layout.where) > 1)
    generator = torch.Generator().manual_seed(0)
    n = len(layout.ids)
    q, k, v = (
        torch.randn(1, n, heads, size, generator=generator).transpose(1, 2)  # laid out as models do
        for heads, size in ((4, d), (kv_heads, d), (kv_heads, dv))
    )
    low = None if window is None else (torch.arange(layout.longest) - window + 1).clamp_min(0)
    found = kernels.attend(q, k, v, cpu_kernels.stretches_of(layout), low, d**-0.5)
    wanted = attention(q, k, v, who_sees_whom(layout, window), d**-0.5)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=3e-6)
    torch.set_num_threads(3)
    try:
        torch.testing.assert_close(
            kernels.attend(q, k, v, cpu_kernels.stretches_of(layout), low, d**-0.5), found, rtol=0, atol=0
        )
    finally:
        torch.set_num_threads(1)


@needed
def test_chunks_longer_than_a_block_of_keys(kernels):
    """Two queries side by side: one sees all of a block, the other begins far behind it."""
    layout = random_layout(5, 2, longest=900)
    chunk = torch.arange(layout.longest) // 700
    q, k, v = (torch.randn(1, 2, len(layout.ids), 16) for _ in range(3))
    found = kernels.attend(q, k, v, cpu_kernels.stretches_of(layout), chunk * 700, 0.25)
    seen = who_sees_whom(layout, None)
    for where in layout.where:
        own = chunk[: len(where)].numpy()
        seen[np.ix_(where, where)] &= own[:, None] == own[None, :]
    assert layout.longest > 1200
    torch.testing.assert_close(found.double(), attention(q, k, v, seen, 0.25), rtol=0, atol=3e-6)


@needed
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_so_and_stays_where_it_is(kernels, value):
    layout = random_layout(1, 2)
    q, k, v = (torch.randn(1, 2, len(layout.ids), 16) for _ in range(3))
    spoilt = len(layout.ids) // 2
    k[0, 1, spoilt, 3] = value
    found = kernels.attend(q, k, v, cpu_kernels.stretches_of(layout), None, 0.3)
    seen = torch.from_numpy(who_sees_whom(layout, None))[:, spoilt]
    if math.isnan(value):
        assert torch.equal(found[0, :, 1].isnan().any(-1), seen)
    else:  # a score of +∞ has no softmax, one of −∞ has no weight
        assert torch.equal(found[0, :, 1].isnan().any(-1), seen & (q[0, 1, :, 3] > 0))
    assert found[0, :, 0].isfinite().all()


def sums_of(n):
    sums = {name: torch.zeros(n, dtype=torch.float64) for name in ("total", "square", "weighted", "rank")}
    return sums | {"best": torch.full((n,), NOTHING, dtype=torch.float64), "best_token": torch.zeros(n).long()}


@needed
@pytest.mark.parametrize("width", [1, 5, 16, 33, 200])
def test_sums_of_two_blocks_are_the_definition(kernels, width):
    generator = torch.Generator().manual_seed(width)
    n = 9
    z = torch.randn(n, 2 * width, generator=generator) * 8
    tokens = torch.randint(0, 2 * width, (n,), generator=generator)
    own = z.gather(1, tokens[:, None])[:, 0].double()
    others = z.double().scatter(1, tokens[:, None], -math.inf)
    wanted_best, wanted_token = others.max(1)
    rank = (others > own[:, None]).sum(1)
    sums = sums_of(n)
    for start in (0, width):
        block = torch.cat([z[:, start : start + width], torch.full((n, 3), 1e9)], 1)[:, :width]  # wider apart than wide
        kernels.head_sums(block, start, NOTHING, tokens, own, sums)
    torch.testing.assert_close(sums["best"], wanted_best, rtol=0, atol=0)
    assert torch.equal(sums["best_token"], wanted_token)
    assert torch.equal(sums["rank"], rank.double())
    x = others - wanted_best[:, None]
    e = x.exp()
    close = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(sums["total"], e.sum(1), **close)
    torch.testing.assert_close(sums["square"], (e * e).sum(1), **close)
    torch.testing.assert_close(sums["weighted"], torch.where(e > 0, x * e, 0).sum(1), **close)


@needed
def test_sums_take_a_nan_for_what_it_is(kernels):
    z = torch.zeros(2, 20)
    z[0, 17] = math.nan
    sums = sums_of(2)
    kernels.head_sums(z, 0, NOTHING, torch.tensor([1, 1]), torch.zeros(2).double(), sums)
    for name in ("best", "total", "square", "weighted"):
        assert torch.equal(sums[name].isnan(), torch.tensor([True, False])), name


@needed
@pytest.mark.parametrize("cap", [None, 3.0])
def test_statistics_are_those_of_torchs_operators(monkeypatch, cap):
    monkeypatch.setattr("curate.passes.head.SUMMED", (20, 70))
    generator = torch.Generator().manual_seed(0)
    weight, states = (torch.randn(n, 40, generator=generator) for n in (333, 50))
    head, tokens = Head(weight, torch.randn(333, generator=generator), 0.5, cap), torch.arange(50) * 6
    names = set(STATISTICS) - {"below_line"}
    ours = head.statistics(states, tokens, names)
    monkeypatch.setattr(cpu_kernels, "kernels", lambda: None)
    theirs = head.statistics(states, tokens, names)
    for name in names:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6, msg=name)


@needed
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_window", "mistral_window", "gemma2", "gemma3", "gpt2"])
def test_families_give_the_numbers_that_they_give_without(monkeypatch, family):
    module, pairs = make(family), random_pairs(8)
    wanted_kernels, ran = cpu_kernels.kernels(), []
    with monkeypatch.context() as patch:
        patch.setattr(cpu_kernels, "kernels", lambda: None)
        wanted = forward.measure(Model(module), pairs, PAIRS)
    monkeypatch.setattr(packing, "_refusals", {})
    attend = wanted_kernels.attend
    monkeypatch.setattr(cpu_kernels.Kernels, "attend", lambda self, *a: ran.append(1) or attend(*a))
    model = Model(module)
    found = forward.measure(model, pairs, PAIRS)
    assert model.layout == "packed"
    assert bool(ran) == (model.layout_reason is None)
    if family.startswith("qwen3"):
        assert ran
    else:
        assert "soft-cap" in model.layout_reason or "whole vectors" in model.layout_reason
    for name, values in found.items():
        scale = wanted["hidden_cc"] + wanted["hidden_rr"] if "hidden" in name else np.abs(wanted[name])
        np.testing.assert_array_less(np.abs(values - wanted[name]) / scale, 1e-5, err_msg=name)


@needed
def test_keys_and_values_alone_get_their_gradients():
    """Of the first layer, where the queries ask for none."""
    model, pairs = Model(make("qwen3")), random_pairs(3)
    assert model.layout_reason is None
    names = {f"model.layers.0.self_attn.{name}_proj.weight" for name in "kv"}
    both = [
        mean.accumulate(model, pairs, mean.fixed_weights(1, 0), parameters=parameters) for parameters in (names, "all")
    ]
    for name in names:
        torch.testing.assert_close(both[0][name], both[1][name], msg=name)
        assert both[0][name].norm() > 0


def test_a_models_own_mask_is_refused():
    """Numbers to add to the scores, as Doge makes them: no positions to read keys at."""
    layout = random_layout(0, 1)
    n = len(layout.ids)
    q, k, v = (torch.randn(1, 2, n, 16) for _ in range(3))
    with packing.packed(layout), pytest.raises(packing.NotPackable, match="mask of its own"):
        packing.attention(torch.nn.Identity(), q, k, v, torch.full((1, 1, n, n), -1e30))


@needed
def test_a_kernel_that_errs_leaves_the_loop_and_says_why(monkeypatch):
    module, pairs = make("qwen3"), random_pairs(4)
    with monkeypatch.context() as patch:
        patch.setattr(cpu_kernels, "serves", lambda device: False)
        wanted = forward.measure(Model(module), pairs, PAIRS)
    monkeypatch.setattr(packing, "_refusals", {})
    monkeypatch.setattr(cpu_kernels.Kernels, "attend", lambda self, q, *a: torch.zeros_like(q).transpose(1, 2))
    model = Model(module)
    assert "the kernel differs from the loop" in model.layout_reason
    found = forward.measure(model, pairs, PAIRS)
    for name in found:
        np.testing.assert_array_equal(found[name], wanted[name])


@needed
@pytest.mark.parametrize("name", ["total", "square", "weighted", "best"])
def test_sums_that_err_are_not_used(monkeypatch, name):
    assert cpu_kernels._adds_up(cpu_kernels.kernels())
    add = cpu_kernels.Kernels.head_sums

    def wrong(self, *given):
        add(self, *given)
        given[-1][name][1] *= 1.001

    monkeypatch.setattr(cpu_kernels.Kernels, "head_sums", wrong)
    assert not cpu_kernels._adds_up(cpu_kernels.kernels())


def in_a_new_process(code, **environment):
    """What a process prints that has compiled nothing yet."""
    done = forked.run(f"from curate.passes.kernels import cpu_kernels\n{code}", environment=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@needed
def test_compiled_once_into_the_users_cache(tmp_path):
    made = []
    for _ in range(2):
        assert in_a_new_process("print(cpu_kernels.refusal())", XDG_CACHE_HOME=str(tmp_path)) == "None"
        (library,) = (tmp_path / "curate").iterdir()
        made.append((library.stat().st_ino, library.stat().st_mtime_ns))
    assert made[0] == made[1]


@needed
def test_a_home_that_cannot_be_written_to(tmp_path):
    home = tmp_path / "a-file"
    home.write_text("")
    code = "print(cpu_kernels.refusal())"
    assert in_a_new_process(code, XDG_CACHE_HOME=str(home), TMPDIR=str(tmp_path)) == "None"
    assert list(tmp_path.glob("curate-*/*.so"))


@needed
def test_no_home_at_all(tmp_path):
    """A user that the system does not know, in a container."""
    code = """
import pathlib
def home(): raise RuntimeError("Could not determine home directory.")
pathlib.Path.home = home
print(cpu_kernels.refusal())"""
    assert in_a_new_process(code, XDG_CACHE_HOME="", TMPDIR=str(tmp_path)) == "None"
    assert list(tmp_path.glob("curate-*/*.so"))


@needed
def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.fstat(file).st_ino))
    cpu_kernels._compile(cpu_kernels._compiler(), tmp_path / "kernels.so")
    assert done == [
        (tmp_path / "kernels.so").stat().st_ino,
        tmp_path.stat().st_ino,
    ]  # and the name itself, in its folder


@needed
def test_vectors_are_as_long_as_the_compiler_makes_them():
    """torch may be told to use less of the processor than the compiler does."""
    found = in_a_new_process("print(cpu_kernels.kernels().width)", ATEN_CPU_CAPABILITY="avx2")
    assert int(found) == cpu_kernels.kernels().width


def test_without_a_compiler_torchs_operators_run_and_doctor_says_so(tmp_path):
    empty = {"PATH": str(tmp_path), "CC": "", "XDG_CACHE_HOME": str(tmp_path)}
    code = """
import numpy as np
from curate.cli import doctor
from curate.measurements import MEASUREMENTS
from curate.passes import forward
from curate.passes.loading.model import Model
from tests.passes.forward_models import make, random_pairs
print(doctor._cpu_kernels().text)
model = Model(make("llama"))
print(model.layout, model.layout_reason)
print(np.isfinite(forward.measure(model, random_pairs(3), [MEASUREMENTS["likelihood"]])["chosen_logp"]).all())
"""
    said, ran, finite = in_a_new_process(code, **empty).splitlines()
    assert "no C compiler" in said or "AVX" in said
    assert (ran, finite) == ("packed None", "True")


def test_left_out_on_demand_and_where_the_compiler_fails(tmp_path):
    code = "print(cpu_kernels.refusal())"
    assert in_a_new_process(code, CURATE_CPU_KERNELS="0") == "CURATE_CPU_KERNELS=0"
    if cpu_kernels.kernels() is None:
        return
    broken = tmp_path / "cc"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "kernels.c:1: error: no such instruction" >&2; exit 1\n'
    )
    broken.chmod(0o755)
    assert "no such instruction" in in_a_new_process(code, CC=str(broken), XDG_CACHE_HOME=str(tmp_path))
