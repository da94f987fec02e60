"""Checkpoints: found in step order, fingerprinted by content, broken ones named."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from curate.errors import BrokenCheckpoint, ModelError, UsageError
from curate.models.checkpoints import find_checkpoints, find_model, single_model
from curate.models.fingerprints import FingerprintCache, weights_fingerprint


def save(folder: Path, value: int = 0, config: str = "{}") -> Path:
    """A model folder with a real (empty but for one byte tensor) safetensors file."""
    folder.mkdir(parents=True)
    header = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes([value]))
    (folder / "config.json").write_text(config)
    return folder


def test_checkpoints_come_in_step_order(tmp_path):
    for step in (1000, 20, 300):
        save(tmp_path / "sft" / f"checkpoint-{step}", step % 7)
    (tmp_path / "sft" / "logs").mkdir()
    found = find_checkpoints("sft", tmp_path)
    assert [(s.run, s.checkpoint, s.step) for s in found] == [
        ("sft", "checkpoint-20", 20),
        ("sft", "checkpoint-300", 300),
        ("sft", "checkpoint-1000", 1000),
    ]


def test_a_list_keeps_its_order_where_steps_are_unknown(tmp_path):
    save(tmp_path / "b")
    save(tmp_path / "a", 1)
    assert [(s.checkpoint, s.step) for s in find_checkpoints(["b", "a"], tmp_path)] == [
        ("b", 1),
        ("a", 2),
    ]  # 0 is a reference's


def test_a_copy_of_the_last_checkpoint_is_no_checkpoint_of_its_own(tmp_path):
    """Trainers' `final/`: of the last one's weights it is left out, of others it comes last, its step unknown."""
    for name, value in (("checkpoint-8", 1), ("checkpoint-9", 2), ("final", 2)):
        save(tmp_path / "sft" / name, value)
    assert [s.checkpoint for s in find_checkpoints("sft", tmp_path)] == ["checkpoint-8", "checkpoint-9"]
    save(tmp_path / "sft" / "merged", 3)
    found = find_checkpoints("sft", tmp_path)
    assert [(s.checkpoint, s.step) for s in found] == [("checkpoint-8", 8), ("checkpoint-9", 9), ("merged", None)]


def test_the_step_of_a_renamed_checkpoint_comes_from_the_trainers_state(tmp_path):
    folder = save(tmp_path / "best")
    (folder / "trainer_state.json").write_text('{"global_step": 77}')
    assert find_checkpoints(["best"], tmp_path)[0].step == 77


def test_the_fingerprint_is_the_contents_not_the_places(tmp_path):
    a, b, c = save(tmp_path / "a", 1), save(tmp_path / "b", 1), save(tmp_path / "c", 2)
    d = save(tmp_path / "d", 1, '{"rope_theta": 5}')
    assert weights_fingerprint(a) == weights_fingerprint(b)
    assert len({weights_fingerprint(x) for x in (a, c, d)}) == 3


def test_the_cache_reads_weights_once_and_sees_a_change(tmp_path):
    folder, store = save(tmp_path / "a", 1), tmp_path / "weights.json"
    first = weights_fingerprint(folder, FingerprintCache(store))
    assert len(json.loads(store.read_text())) == 2
    known = FingerprintCache(store)
    known.known = dict.fromkeys(known.known, "0" * 64)
    assert weights_fingerprint(folder, known) != first  # it came from the cache
    shutil.rmtree(folder)
    save(folder, 2)
    assert weights_fingerprint(folder, FingerprintCache(store)) not in (first,)


def broken(tmp_path: Path, how: str) -> Path:
    folder = save(tmp_path / "run" / "checkpoint-5")
    weights = folder / "model.safetensors"
    if how == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif how == "garbage":
        weights.write_bytes(b"not safetensors at all")
    elif how == "no weights":
        weights.unlink()
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "bad config":
        (folder / "config.json").write_text("{")
    elif how == "shard missing":
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}})
        )
    elif how == "adapter":
        (folder / "config.json").unlink()
        weights.rename(folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("cut", "half-written"),
        ("garbage", "half-written"),
        ("no weights", "no weights"),
        ("no config", "no config.json"),
        ("bad config", "config.json cannot be read"),
        ("shard missing", "model-2.safetensors is missing"),
        ("adapter", "adapter_config.json cannot be read"),
    ],
)
def test_a_broken_checkpoint_is_named(tmp_path, how, says):
    broken(tmp_path, how)
    with pytest.raises(ModelError, match=says) as error:
        find_checkpoints("run", tmp_path)
    assert "checkpoint-5" in str(error.value)


def test_what_is_not_there_is_said_with_the_nearest(tmp_path):
    save(tmp_path / "llama")
    with pytest.raises(ModelError, match="Did you mean lama|Did you mean llama"):
        find_model("lama", tmp_path)
    with pytest.raises(ModelError, match="holds no checkpoint"):
        (tmp_path / "empty").mkdir()
        find_checkpoints("empty", tmp_path)
    with pytest.raises(ModelError, match="is not a folder"):
        find_checkpoints("nowhere", tmp_path)


def test_two_checkpoints_of_one_step_are_refused(tmp_path):
    save(tmp_path / "a" / "checkpoint-5")
    save(tmp_path / "b" / "checkpoint-5", 1)
    with pytest.raises(ModelError, match="are both of step 5"):
        find_checkpoints(["a/checkpoint-5", "b/checkpoint-5"], tmp_path)


def test_a_hub_id_that_cannot_be_fetched_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match="not a folder here"):
        find_model("someone/some-model", tmp_path)


def test_a_real_model(shared):
    checkpoint = single_model("stories260K", shared / "models")
    assert checkpoint.checkpoint == "stories260K" and len(checkpoint.fingerprint) == 20


def test_a_tokenizer_is_loaded_only_where_its_files_changed(tmp_path, monkeypatch):
    import curate.passes.tokenizer
    from tests.tiny_models import make_tokenizer

    make_tokenizer().save_pretrained(tmp_path / "model")
    first = FingerprintCache(tmp_path / "known.json").tokenizer(tmp_path / "model")
    assert first == curate.passes.tokenizer.tokenizer_fingerprint(
        curate.passes.tokenizer.load_tokenizer(tmp_path / "model")
    )
    loaded = []
    load = curate.passes.tokenizer.load_tokenizer
    monkeypatch.setattr(curate.passes.tokenizer, "load_tokenizer", lambda path: loaded.append(path) or load(path))
    assert FingerprintCache(tmp_path / "known.json").tokenizer(tmp_path / "model") == first and not loaded
    make_tokenizer(template=True).save_pretrained(tmp_path / "model")
    assert FingerprintCache(tmp_path / "known.json").tokenizer(tmp_path / "model") != first and len(loaded) == 1


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(
        type(tmp_path), "write_text", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    assert len(FingerprintCache(tmp_path / "known.json").of(tmp_path / "file")) == 64


def save_adapter(folder: Path, base: str = "base", value: int = 0, **values) -> Path:
    """An adapter's folder with a real safetensors file, as PEFT lays it out."""
    save(folder, value)
    (folder / "config.json").unlink()
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    told = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": base, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**told, **values}))
    return folder


def test_a_run_of_adapters(tmp_path):
    """Its base is looked for beside the recipe, beside the adapter and above it; the fingerprint is base, config and tensors."""
    base = save(tmp_path / "models" / "base")
    for step in (20, 100):
        save_adapter(tmp_path / "runs" / "dpo" / f"checkpoint-{step}", "models/base", step)
    found = find_checkpoints("runs/dpo", tmp_path)
    assert [(s.checkpoint, s.step, s.base) for s in found] == [
        ("checkpoint-20", 20, str(base)),
        ("checkpoint-100", 100, str(base)),
    ]
    elsewhere = find_checkpoints("dpo", tmp_path / "runs")  # a recipe in another folder: above the adapter
    assert [s.fingerprint for s in elsewhere] == [s.fingerprint for s in found]
    lone = single_model("runs/dpo/checkpoint-20", tmp_path)
    assert (lone.fingerprint, lone.base, lone.checkpoint) == (found[0].fingerprint, str(base), "checkpoint-20")
    known = {lone.fingerprint, found[1].fingerprint, weights_fingerprint(base)}
    other = save(tmp_path / "other", 1)
    known.add(single_model("runs/dpo/checkpoint-20", tmp_path, base="other").fingerprint)
    save_adapter(tmp_path / "scaled", "models/base", 20, lora_alpha=16)
    known.add(single_model("scaled", tmp_path).fingerprint)
    assert len(known) == 5 and other.is_dir()
    save_adapter(tmp_path / "same", str(base), 20, target_modules=["v_proj"], peft_version="0.99")
    assert single_model("same", tmp_path).fingerprint == lone.fingerprint


def test_the_tokenizer_of_an_adapter_is_its_own_or_its_bases(tmp_path):
    base, adapter = save(tmp_path / "base"), save_adapter(tmp_path / "a")
    assert single_model("a", tmp_path).tokenizer == str(base)
    (adapter / "tokenizer_config.json").write_text("{}")
    assert single_model("a", tmp_path).tokenizer == str(adapter)


def test_a_base_that_is_not_found_says_which_key_to_set(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    for name, words in (
        ("gone", "gone: no such model folder"),
        ("someone/model", "cannot be reached|refused"),
        ("", "names none"),
    ):
        save_adapter(tmp_path / "a", name)
        with pytest.raises(ModelError, match=words) as error:
            single_model("a", tmp_path)
        assert "models.base" in str(error.value)
        shutil.rmtree(tmp_path / "a")
    save_adapter(tmp_path / "one", "two")
    save_adapter(tmp_path / "two", "base")
    with pytest.raises(ModelError, match="is an adapter too"):
        single_model("one", tmp_path)


@pytest.mark.parametrize("how", ["cut", "no tensors", "bad config"])
def test_a_half_written_adapter_is_named(tmp_path, how):
    save(tmp_path / "base")
    folder = save_adapter(tmp_path / "run" / "checkpoint-5")
    tensors, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if how == "cut":
        tensors.write_bytes(tensors.read_bytes()[:-1])
    elif how == "no tensors":
        tensors.unlink()
    else:
        config.write_text(config.read_text()[:20])
    with pytest.raises(BrokenCheckpoint, match=r"checkpoint-5.*(half-written|incomplete|cannot be read)"):
        find_checkpoints("run", tmp_path)


def test_broken_checkpoints_are_left_out_only_when_asked(tmp_path):
    broken(tmp_path, "cut")
    for step in (10, 20):
        save(tmp_path / "run" / f"checkpoint-{step}", step)
    with pytest.raises(BrokenCheckpoint, match="on_broken_checkpoint=skip"):
        find_checkpoints("run", tmp_path)
    skipped: list[str] = []
    assert [s.step for s in find_checkpoints("run", tmp_path, skip=skipped.append)] == [10, 20]
    assert len(skipped) == 1 and "checkpoint-5/model.safetensors is cut short" in skipped[0]
    listed = [f"run/checkpoint-{step}" for step in (20, 5, 10)]
    assert [s.step for s in find_checkpoints(listed, tmp_path, skip=skipped.append)] == [10, 20]
    with pytest.raises(
        ModelError, match="no such model folder"
    ):  # a name that is not there is a mistake, not a broken checkpoint
        find_checkpoints([*listed, "run/checkpoint-30"], tmp_path, skip=skipped.append)
    with pytest.raises(ModelError, match="every checkpoint is broken"):
        find_checkpoints(listed[1:2], tmp_path, skip=skipped.append)


def cached(cache: Path, repo: str, revisions: dict[str, int]) -> None:
    """The hub's cache as huggingface_hub lays it out: blobs aside, a ref per revision to the snapshot of its commit."""
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    for revision, value in revisions.items():
        commit = f"{value:040x}"
        save(root / "snapshots" / commit, value)
        (root / "refs" / revision).write_text(commit)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached(tmp_path / "cache", "owner/model", {"step1000": 1, "step20": 2, "stage2-step300-tokens4B": 3, "main": 4})
    return tmp_path


def test_revisions_of_a_hub_repository(hub):
    names = [f"owner/model@{revision}" for revision in ("step1000", "step20", "stage2-step300-tokens4B")]
    found = find_checkpoints(names, hub)
    assert [(s.run, s.checkpoint, s.step) for s in found] == [
        ("model", "step20", 20),
        ("model", "stage2-step300-tokens4B", 300),
        ("model", "step1000", 1000),
    ]
    assert len({s.fingerprint for s in found}) == 3
    lone = single_model("owner/model@step20", hub)
    assert (lone.fingerprint, lone.checkpoint, lone.run) == (found[0].fingerprint, "owner/model@step20", "")
    assert single_model("owner/model", hub).checkpoint == "owner/model"  # main
    save_adapter(hub / "a", "owner/model", revision="step20")
    assert single_model("a", hub).base == lone.path
    with pytest.raises(ModelError, match=r"owner/model@step7: .*cannot be reached"):
        find_checkpoints([*names, "owner/model@step7"], hub)


def test_revisions_in_a_recipe(hub):
    from curate.plan.roles import find_roles
    from curate.recipe.load import load_recipe

    models = {
        "reference": "owner/model@main",
        "checkpoints": {"repo": "owner/model", "revisions": ["step1000", "step20"]},
    }
    loaded = load_recipe({"kind": "sft", "models": models, "scores": ["confidence"]})
    found = find_roles(loaded, FingerprintCache(None))
    assert [(s.label, s.step) for s in found.series] == [
        ("model/owner/model@main", 0),
        ("model/step20", 20),
        ("model/step1000", 1000),
    ]
    for wrong in (
        {"repo": "model", "revisions": ["a"]},
        {"repo": "owner/model"},
        {"repo": "owner/model", "revision": ["a"]},
    ):
        with pytest.raises(UsageError, match="revisions of a hub repository are"):
            load_recipe({"kind": "sft", "models": {"checkpoints": wrong}, "scores": []})
    numbers = load_recipe({"kind": "sft", "models": {"checkpoints": {"repo": "owner/model", "revisions": [1000]}}})
    assert numbers.recipe.models.checkpoints.revisions == ["1000"]  # as YAML reads it


def test_shards_in_a_trainers_folder(tmp_path):
    """Every shard counts in the fingerprint; a cut one is named."""
    from tests.passes.forward_models import make

    for step, seed in ((200, 2), (30, 1)):
        make("llama", seed=seed).save_pretrained(tmp_path / "run" / f"checkpoint-{step}", max_shard_size="10KB")
    found = find_checkpoints("run", tmp_path)
    assert [s.step for s in found] == [30, 200] and found[0].fingerprint != found[1].fingerprint
    shard = sorted((tmp_path / "run" / "checkpoint-30").glob("model-*.safetensors"))[2]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert find_checkpoints("run", tmp_path)[0].fingerprint != found[0].fingerprint
    shard.write_bytes(content[:-1])
    with pytest.raises(BrokenCheckpoint, match=shard.name):
        find_checkpoints("run", tmp_path)


# ---- what is no folder, or may not be looked into --------------------------------------------------------------------------------------------


@pytest.fixture
def somebody():
    """A folder that everybody may enter, and a function that makes this process a user who owns nothing in it."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    root = os.geteuid() == 0
    try:
        yield folder, (lambda: os.setresuid(65534, 65534, 0)) if root else (lambda: None)
    finally:
        if root:
            os.setresuid(0, 0, 0)
        for path in folder.rglob("*"):
            if path.is_dir():
                path.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.parametrize("closed", ["run", "run/checkpoint-5", "run/other"])
def test_a_folder_that_may_not_be_looked_into_is_said(somebody, closed):
    folder, become = somebody
    save(folder / "run" / "checkpoint-10")
    (folder / closed).mkdir(exist_ok=True)
    (folder / closed).chmod(0)
    become()
    with pytest.raises(ModelError, match="may not look into this folder.*chmod a.rx") as error:
        find_checkpoints("run", folder)
    assert "emove" not in str(error.value) and closed in str(error.value)
    if closed != "run/other":
        with pytest.raises(ModelError, match="may not look into|cannot be looked at"):
            find_model("run/checkpoint-5", folder)


def test_links_to_nowhere_and_files_are_no_folders(tmp_path):
    save(tmp_path / "run" / "checkpoint-10")
    (tmp_path / "run" / "checkpoint-5").symlink_to(tmp_path / "gone")
    for name in ("run", "run/checkpoint-5"):
        with pytest.raises(ModelError, match="checkpoint-5: a link to .*gone, which is not there"):
            find_checkpoints(name, tmp_path) if name == "run" else find_model(name, tmp_path)
    left: list[str] = []
    assert [s.step for s in find_checkpoints("run", tmp_path, skip=left.append)] == [10] and len(left) == 1
    (tmp_path / "run" / "checkpoint-5").unlink()
    (tmp_path / "run" / "checkpoint-5").write_text("")
    with pytest.raises(ModelError, match="checkpoint-5: a file, where a folder is expected"):
        find_checkpoints("run", tmp_path)
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "file").write_text("")
    for name, says in (
        ("link", "a link to nowhere"),
        ("circle", "link"),
        ("file", "a file, where"),
        ("file/run", "not a folder|not a directory"),
    ):
        with pytest.raises(ModelError, match=says):
            find_checkpoints(name, tmp_path)
        with pytest.raises(ModelError):
            find_model(name, tmp_path)
