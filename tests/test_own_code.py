"""A model that brings its own code: refused, until a recipe says that it may run; then its code is part of what it is."""

from __future__ import annotations

import json
import sys

import pytest
import yaml

import curate
from curate.console import Progress
from curate.errors import ModelError
from curate.passes.loading.own_code import allowing_own_code, runs_own_code
from curate.recipe.load import load_recipe
from curate.workflow.run import make_plan
from tests.tiny_models import make_llama
from tests.workflow.pairs import pairs

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "llama_of_mine"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own_code")
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs(6))))
    for name in ("native", "own"):
        make_llama(folder / name, seed=0)
    (folder / "own" / "modeling_own.py").write_text(CODE)
    config = json.loads((folder / "own" / "config.json").read_text())
    config |= {"model_type": "llama_of_mine", "architectures": ["OwnForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "own" / "config.json").write_text(json.dumps(config))
    raw = {
        "kind": "preference",
        "source": "pairs.jsonl",
        "models": {"reference": "own"},
        "engine": {"device": "cpu"},
        "scores": ["ranking_gap"],
        "select": {},
        "export": {"to": "out"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return folder / "recipe.yaml"


@pytest.fixture(autouse=True)
def modules(tmp_path_factory, monkeypatch):
    """Where transformers copies such code to, and imports it from."""
    from transformers import dynamic_module_utils

    folder = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
    yield
    sys.path[:] = [path for path in sys.path if path != str(folder)]
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def test_it_is_refused_with_the_key_that_allows_it(recipe):
    with pytest.raises(ModelError, match="brings its own code .modeling_own.py[^$]*models.trust_remote_code: true"):
        curate.run(recipe)


def test_it_runs_where_the_recipe_says_so_and_a_change_of_the_code_is_a_change_of_the_model(recipe):
    allowed = {"models.trust_remote_code": True}
    own = curate.run(recipe, set=allowed)
    card = (own.exported.path / "README.md").read_text()
    native = curate.run(recipe, set={"models.reference": "native"}, store=recipe.parent / "other")
    gaps = [result.store.scored()["ranking_gap"].to_list() for result in (own, native)]
    assert gaps[0] == gaps[1] and not runs_own_code()
    note = "models.trust_remote_code: Python code out of own is run (modeling_own.py)."
    plan = make_plan(load_recipe(recipe, set=allowed), progress=Progress(quiet=True))
    assert not plan.missing and note in plan.notes() and note in card
    code = recipe.parent / "own" / "modeling_own.py"
    code.write_text(CODE + "# changed\n")
    assert (
        make_plan(load_recipe(recipe, set=allowed), progress=Progress(quiet=True)).missing == 2 * 6
    )  # its tokenizer could be code, too
    code.write_text(CODE)


def test_the_key_alone_changes_no_models_fingerprint(recipe):
    other = recipe.parent / "other"
    for trusted in (False, True):
        settings = {"models.reference": "native", "models.trust_remote_code": trusted}
        plan = make_plan(load_recipe(recipe, set=settings, store=other), progress=Progress(quiet=True))
        assert not plan.missing and not any("trust_remote_code" in note for note in plan.notes())


def test_code_of_another_repository_is_refused(recipe):
    from curate.models.layouts import check_config

    with (
        allowing_own_code(True),
        pytest.raises(ModelError, match="in another repository .someone/else, modeling_x.py."),
    ):
        check_config(
            recipe.parent / "own", {"model_type": "x", "auto_map": {"AutoConfig": "someone/else--modeling_x.C"}}
        )
