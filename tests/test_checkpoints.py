"""Checkpoints: found in step order, fingerprinted by content, broken ones named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from curate.checkpoints import FingerprintCache, find_checkpoints, find_model, single_model, weights_fingerprint
from curate.errors import ModelError


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
        ("adapter", "LoRA adapter"),
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
    with pytest.raises(ModelError, match="two checkpoints have step 5"):
        find_checkpoints(["a/checkpoint-5", "b/checkpoint-5"], tmp_path)


def test_a_hub_id_that_cannot_be_fetched_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ModelError, match="not a folder here"):
        find_model("someone/some-model", tmp_path)


def test_a_real_model(shared):
    subject = single_model("stories260K", shared / "models")
    assert subject.checkpoint == "stories260K" and len(subject.fingerprint) == 20


def test_a_tokenizer_is_loaded_only_where_its_files_changed(tmp_path, monkeypatch):
    import curate.tokens
    from tests.tiny_models import make_tokenizer

    make_tokenizer().save_pretrained(tmp_path / "model")
    first = FingerprintCache(tmp_path / "known.json").tokenizer(tmp_path / "model")
    assert first == curate.tokens.tokenizer_fingerprint(curate.tokens.load_tokenizer(tmp_path / "model"))
    loaded = []
    load = curate.tokens.load_tokenizer
    monkeypatch.setattr(curate.tokens, "load_tokenizer", lambda path: loaded.append(path) or load(path))
    assert FingerprintCache(tmp_path / "known.json").tokenizer(tmp_path / "model") == first and not loaded
    make_tokenizer(template=True).save_pretrained(tmp_path / "model")
    assert FingerprintCache(tmp_path / "known.json").tokenizer(tmp_path / "model") != first and len(loaded) == 1


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(
        type(tmp_path), "write_text", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    assert len(FingerprintCache(tmp_path / "known.json").of(tmp_path / "file")) == 64
