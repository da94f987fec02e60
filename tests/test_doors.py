"""What is looked at as it comes in: names that become part of a file's, and addresses with a password."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import curate
from curate.errors import EngineError, UsageError
from curate.recipe.load import load_recipe

SECRET = "pa55word-4711"


@pytest.mark.parametrize("split", ["../../x", "a/b", "/tmp/x", "..", ".hidden", "", " ", "a\\b", "a\nb", "x" * 300])
@pytest.mark.parametrize("key", ["source", "heldout"])
def test_a_split_that_leads_elsewhere_is_refused(key, split):
    raw = {"kind": "sft", "source": "rows.jsonl", key: {"path": "rows", "split": split}}
    with pytest.raises(UsageError, match=r"(source|heldout).split: wanted a name, which becomes part of a file's"):
        load_recipe(raw)


@pytest.mark.parametrize("split", ["train", "train_sft", "1.10", "test-2", "train[:10]"])
def test_a_split_is_a_name(split):
    loaded = load_recipe({"kind": "sft", "source": {"path": "rows", "split": split}})
    assert loaded.recipe.source.split == split


def test_a_password_is_sent_and_not_kept(tmp_path):
    pytest.importorskip("openai")
    from curate.passes.sampling.openai_client import Server

    url = f"http://me:{SECRET}@127.0.0.1:9/v1"
    raw = {"kind": "sft", "source": "rows.jsonl", "engine": {"sampler": "openai"}, "server": {"url": url}}
    loaded = load_recipe(raw)
    assert loaded.recipe.server.url == "http://127.0.0.1:9/v1"
    assert all(SECRET not in str(x) for x in (loaded.text, loaded.raw, loaded.recipe, loaded.recipe.model_dump_json()))
    assert raw["server"]["url"] == url  # the caller's own stays as it is
    for server in (Server(loaded.recipe.server.model_dump()), Server({"url": url})):
        assert server.url == "http://127.0.0.1:9/v1"
        assert str(server.client().base_url) == f"http://me:{SECRET}@127.0.0.1:9/v1/"
        said = str(server.explained(RuntimeError(f"no route to {url}, nor {SECRET}")))
        assert SECRET not in said and "no route to" in said


@pytest.mark.parametrize("url", ["https://me:{}/x@h/v1", "http://me:{}#x@h/v1", "me:{}@h:8000/v1"])
def test_a_password_that_does_not_come_off_is_refused_and_not_said(tmp_path, url):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"kind: sft\nsource: rows.jsonl\nserver: {{url: '{url.format(SECRET)}'}}\n")
    with pytest.raises(UsageError, match="line 3: server.url: an @ is left in the address") as error:
        load_recipe(recipe)
    assert SECRET not in str(error.value)


def test_a_key_that_a_server_echoes_is_not_said(monkeypatch):
    pytest.importorskip("openai")
    from curate.passes.sampling.openai_client import Server

    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server = Server({"url": "http://127.0.0.1:9/v1"})
    server.client()
    assert SECRET not in str(server.explained(RuntimeError(f"wrong key {SECRET}")))


def test_nothing_that_a_run_writes_has_the_password(tmp_path, capfd):
    pytest.importorskip("openai")
    from tests.served import Served
    from tests.test_servers import write

    with Served("a") as server:
        recipe = write(
            tmp_path, server.url.replace("//", f"//me:{SECRET}@"), select={"keep": {"rows": 2}}, export={"to": "out"}
        )
        curate.run(recipe)
    with pytest.raises(EngineError) as error:  # nobody answers any more
        curate.run(recipe, set={"sampling.samples": 3})
    out = "".join(capfd.readouterr())
    assert SECRET not in str(error.value) + out
    written = [p for p in tmp_path.rglob("*") if p.is_file() and p.name not in ("recipe.yaml",)]
    assert len(written) > 4 and not [p for p in written if SECRET.encode() in p.read_bytes()]


def test_no_model_brings_code_or_pickles():
    """Whatever transformers loads is told so; torch reads tensors alone. A class of transformers' own that is named needs no telling."""
    found = []
    for file in sorted((Path(curate.__file__).parent).rglob("*.py")):
        for call in (n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)):
            name, said = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
            own = name.startswith(("LlamaForCausalLM.", "PreTrainedTokenizerFast."))
            if name.endswith(".from_pretrained") and not own and said.get("trust_remote_code") != "False":
                found.append(f"{file.name}:{call.lineno}: {name}")
            if name == "torch.load" and said.get("weights_only") != "True":
                found.append(f"{file.name}:{call.lineno}: {name}")
    assert not found
