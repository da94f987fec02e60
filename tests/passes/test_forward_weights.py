"""Loading and swapping weights: another checkpoint in place gives what loading it afresh gives; what does not fit is said."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

from curate.errors import ModelError
from curate.measurements import MEASUREMENTS
from curate.passes import forward
from tests.passes.forward_models import make, random_pairs

PAIRS = [MEASUREMENTS["likelihood"]]


def measured(model) -> np.ndarray:
    return forward.measure(model, random_pairs(4), PAIRS)["chosen_logp"]


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2", "gpt_neox", "phi3"])
@pytest.mark.parametrize("shards", [False, True])
def test_use_equals_a_fresh_load(tmp_path, family, shards):
    for seed in (0, 1):
        size = {"max_shard_size": "10KB"} if shards else {}
        make(family, seed=seed).save_pretrained(tmp_path / str(seed), **size)
    assert (tmp_path / "0" / "model.safetensors.index.json").exists() == shards
    with forward.load_model(tmp_path / "0", device="cpu") as model:
        first = measured(model)
        model.use(tmp_path / "1")
        second = measured(model)
        model.use(tmp_path / "0")
        np.testing.assert_array_equal(measured(model), first)
    with forward.load_model(tmp_path / "1", device="cpu") as fresh:
        np.testing.assert_array_equal(measured(fresh), second)
    assert abs(first - second).max() > 1


def test_bin_files_and_other_dtypes(tmp_path):
    for seed in (0, 1):
        make("llama", seed=seed).bfloat16().save_pretrained(tmp_path / str(seed))
    module = make("llama", seed=1).bfloat16()
    (tmp_path / "1" / "model.safetensors").unlink()
    torch.save(module.state_dict(), tmp_path / "1" / "pytorch_model.bin")
    with forward.load_model(tmp_path / "0", device="cpu", dtype="float32") as model:
        assert model.engine.endswith("cpu float32 packed")
        model.use(tmp_path / "1")
        second = measured(model)
    with forward.load_model(tmp_path / "1", device="cpu", dtype="float32") as fresh:
        np.testing.assert_array_equal(measured(fresh), second)


def test_what_does_not_fit(tmp_path):
    make("llama").save_pretrained(tmp_path / "llama")
    make("qwen2").save_pretrained(tmp_path / "qwen2")
    model = forward.load_model(tmp_path / "llama", device="cpu")
    before = measured(model)
    with pytest.raises(ModelError, match="same llama model, but"):
        model.use(tmp_path / "qwen2")
    with pytest.raises(ModelError, match="no such folder"):
        model.use(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="an empty folder"):
        model.use(tmp_path / "empty")
    bare = tmp_path / "wrong_shape"  # weights without a config: only the shapes can tell
    bare.mkdir()
    wider = make("llama")
    wider.lm_head.weight = torch.nn.Parameter(torch.zeros(90, 32))
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in wider.state_dict().items()}, bare / "model.safetensors")
    with pytest.raises(ModelError, match=r"lm_head.weight has shape \(90, 32\)"):
        model.use(bare)
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "llama", cut)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ModelError, match="unreadable weights"):
        model.use(cut)
    np.testing.assert_array_equal(measured(model), before)  # whatever failed left the weights alone


def test_missing_shard(tmp_path):
    make("llama").save_pretrained(tmp_path / "a", max_shard_size="10KB")
    model = forward.load_model(tmp_path / "a", device="cpu")
    gone = sorted((tmp_path / "a").glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ModelError, match=gone.name):
        model.use(tmp_path / "a")


def test_unreadable_folders(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        forward.load_model(tmp_path / "gone")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("hello")
    with pytest.raises(ModelError, match=r"a folder with readme\.txt"):
        forward.load_model(tmp_path / "notes")
    make("llama").save_pretrained(tmp_path / "part", max_shard_size="10KB")
    index = tmp_path / "part" / "model.safetensors.index.json"
    body = json.loads(index.read_text())
    body["weight_map"].pop("lm_head.weight")
    index.write_text(json.dumps(body))
    with pytest.raises(ModelError, match="lack"):  # transformers would fill it with random numbers
        forward.load_model(tmp_path / "part")
    make("llama").save_pretrained(tmp_path / "good")
    with pytest.raises(ModelError, match="auto or one of float32"):
        forward.load_model(tmp_path / "good", dtype="float8")
