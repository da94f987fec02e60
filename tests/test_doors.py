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
    """Whatever transformers loads is told so (`runs_own_code` is false but where a recipe says otherwise); torch reads tensors alone. A class of
    transformers' own that is named needs no telling.
    """
    found = []
    for file in sorted((Path(curate.__file__).parent).rglob("*.py")):
        for call in (n for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Call)):
            name, said = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
            own = name.startswith(("LlamaForCausalLM.", "PreTrainedTokenizerFast."))
            if name.endswith(".from_pretrained") and not own and said.get("trust_remote_code") != "runs_own_code()":
                found.append(f"{file.name}:{call.lineno}: {name}")
            if name == "torch.load" and said.get("weights_only") != "True":
                found.append(f"{file.name}:{call.lineno}: {name}")
    assert not found


def test_what_a_server_echoes_is_written_nowhere_and_no_path_of_the_machine_travels(tmp_path, capfd, monkeypatch):
    """A server that repeats the headers in its error: neither its key nor the login, in base64 as HTTP sends it, is kept or shown."""
    pytest.importorskip("openai")
    import base64
    import json

    from tests.served import Served
    from tests.test_servers import write

    key, basic = "geheim-0123456789", base64.b64encode(f"me:{SECRET}".encode()).decode()
    monkeypatch.setenv("MY_SERVERS_KEY", key)
    echoed = f"no such user: Authorization: Basic {basic}; Bearer {key}; token hf_{'x' * 30}"
    with Served("a") as server:
        url = server.url.replace("//", f"//me:{SECRET}@")
        recipe = write(
            tmp_path,
            url,
            source=[str(tmp_path / "rows.jsonl")],
            server={"url": url, "retries": 0, "key_env": "MY_SERVERS_KEY"},
            select={"keep": {"rows": 2}},
            export={"to": str(tmp_path / "out")},
        )
        curate.run(recipe)
        body = json.dumps({"error": {"message": echoed}})
        server.broken = {"/v1/completions": (400, "application/json", body), "/v1/models": (200, "text/plain", echoed)}
        with pytest.raises(EngineError) as error:
            curate.run(recipe, set={"sampling.samples": 3})
    said = str(error.value) + "".join(capfd.readouterr())
    store = curate.Store(tmp_path / "store")
    said += str(store.sql("SELECT * FROM runs").to_dicts())
    secrets = (SECRET, basic, key, "hf_xxxx")
    assert not [secret for secret in secrets if secret in said]
    written = [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "recipe.yaml"]
    assert not [(p, secret) for p in written for secret in secrets if secret.encode() in p.read_bytes()]
    travels = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert len(travels) > 4 and not [p for p in travels if str(tmp_path).encode() in p.read_bytes()]
    assert "| rows.jsonl | fingerprint" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("url", ["http://h/v1?api_key={}", "http://h/v1?a=b&access_token={}"])
def test_a_key_in_an_address_is_refused_and_not_said(url):
    with pytest.raises(UsageError, match=r"server.url: a key stands in the address.*server.key_env") as error:
        load_recipe({"kind": "sft", "server": {"url": url.format(SECRET)}})
    assert SECRET not in str(error.value)


def test_a_text_that_travels_has_no_folders_of_the_machine(tmp_path):
    from curate.recipe.doors import travelling

    folder = tmp_path / "project"
    text = f"a: {folder}/x.jsonl\nb: {tmp_path}/other/y.jsonl, and/or http://h:8000/v1/chat /nosuchroot/a/b (/)"
    assert travelling(text, folder) == "a: x.jsonl\nb: …/y.jsonl, and/or http://h:8000/v1/chat /nosuchroot/a/b (/)"


def test_sources_of_one_name_are_both_named_in_a_card():
    from curate.workflow.export_card import named_sources

    assert named_sources([("…/x", "1"), ("…/x", "2"), ("y", "3")]) == {"…/x": "1", "…/x (2)": "2", "y": "3"}


@pytest.mark.parametrize("to", ["", ".", "/", "..", "x/..", "rows.jsonl"])
def test_a_folder_that_no_export_can_replace_is_refused(tmp_path, to, monkeypatch):
    from curate.data.replace import check_target

    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("x")
    with pytest.raises(UsageError, match="export.to"):
        check_target(tmp_path / to, [tmp_path / "rows.jsonl"])


@pytest.mark.parametrize("split", ["data", "dropped", "README.md", "trainer_args.json", "dataset_dict.json"])
def test_a_split_does_not_take_the_place_of_an_exports_own_files(tmp_path, split):
    from curate.data.export import export
    from curate.data.exported import ExportRow
    from curate.rows import Example

    with pytest.raises(UsageError, match=f"split: '{split}' is what an export calls a part of its own"):
        export(tmp_path / "out", [ExportRow(Example("q", "a"), "1")], split=split)
