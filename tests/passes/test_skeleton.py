"""What is known of a model before its weights are: the same names and shapes as the model that is loaded, of every architecture."""

from __future__ import annotations

import pytest

from curate.errors import ModelError
from curate.passes.gradients.layer_rules import parameter_names
from curate.passes.loading.model import Model, load_model
from curate.passes.loading.skeleton import skeleton
from tests.passes.forward_models import FAMILIES, make
from tests.tiny_models import make_llama


def shapes(module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(p.shape)) for name, p in module.named_parameters()]


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_the_loaded_model(family, tmp_path):
    module = make(family)
    module.save_pretrained(tmp_path)
    bare = skeleton(tmp_path)
    assert shapes(bare.module) == shapes(module)
    assert all(p.is_meta for p in bare.module.parameters())
    assert parameter_names(bare, 1) == parameter_names(Model(module), 1)


def test_an_adapter_lies_on_its_base(tmp_path):
    pytest.importorskip("peft", reason="PEFT is not installed (extra: prove)")
    from tests.passes.test_adapter import adapt

    make_llama(tmp_path / "base", seed=0)
    adapt(tmp_path / "base", tmp_path / "adapter", {"r": 4, "target_modules": ["q_proj", "down_proj"]}, seed=1)
    bare = skeleton(tmp_path / "adapter", base=tmp_path / "base")
    with load_model(tmp_path / "adapter", base=tmp_path / "base", dtype="float32", device="cpu") as model:
        assert shapes(bare.module) == shapes(model.module)
        for parameters in ("all", "lora"):
            assert parameter_names(bare, parameters) == parameter_names(model, parameters)


def test_a_folder_without_a_model(tmp_path):
    with pytest.raises(ModelError, match=r"wanted a folder or hub id .*config\.json, found an empty folder"):
        skeleton(tmp_path)
