"""Model folders that are no whole model: each said as what it is, with what turns it into weights; "remove" only on proof."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from curate.errors import BrokenCheckpoint, ModelError, OtherLayout
from curate.models.checkpoints import find_checkpoints, find_model, single_model
from tests.test_checkpoints import save


def put(folder: Path, *names: str, text: str = "x") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def without_weights(folder: Path) -> Path:
    (save(folder) / "model.safetensors").unlink()
    return folder


LAYOUTS = [
    (["global_step5/zero_pp_rank_0_mp_rank_00_model_states.pt", "latest", "zero_to_fp32.py"], "DeepSpeed", "zero_to_fp32.py . ."),
    (["global_step5/mp_rank_00_model_states.pt"], "DeepSpeed", "zero_to_fp32.py . ."),
    (["pytorch_model_fsdp_0/__0_0.distcp"], "FSDP", "merge-weights checkpoint-5/pytorch_model_fsdp_0 checkpoint-5"),
    (["__0_0.distcp", ".metadata"], "FSDP", "merge-weights"),
    (["iter_0000005/mp_rank_00/model_optim_rng.pt"], "Megatron", "export_ckpt"),
    (["actor/model_world_size_8_rank_0.pt"], "verl", "verl.model_merger"),
    (["model-Q4_K_M.gguf"], "GGUF", "llama-server"),
    (["consolidated.00.pth", "params.json"], "Meta", "convert_llama_weights_to_hf"),
    (["consolidated.safetensors"], "Mistral", "model.safetensors"),
    (["flax_model.msgpack"], "Flax", "save_pretrained"),
    (["pytorch_model_fsdp.bin"], "FSDP", "save_pretrained"),
]  # fmt: skip


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize(("files", "what", "advice"), LAYOUTS, ids=[files[0] for files, _, _ in LAYOUTS])
def test_a_known_layout_is_named_with_what_makes_weights_of_it(tmp_path, files, what, advice, with_config):
    folder = tmp_path / "run" / "checkpoint-5"
    if with_config:
        without_weights(folder)
    put(folder, *files)
    with pytest.raises(OtherLayout, match=what) as error:
        find_checkpoints("run", tmp_path)
    said = str(error.value)
    assert "checkpoint-5" in said and advice in said
    assert "skip" not in said and "broken" not in said and "emove" not in said
    with pytest.raises(OtherLayout, match=what):
        single_model("run/checkpoint-5", tmp_path)
    with pytest.raises(OtherLayout, match="no checkpoint holds"):
        find_checkpoints("run", tmp_path, skip=lambda message: None)


@pytest.mark.parametrize("shard", [None, "model-00001-of-00002.safetensors"])
def test_what_a_trainer_keeps_beside_the_weights_is_not_taken_for_them(tmp_path, shard):
    folder = without_weights(tmp_path / "checkpoint-5")
    put(folder, "optimizer.pt", "scheduler.pt", "rng_state_0.pth", *([shard] if shard else []))
    with pytest.raises(BrokenCheckpoint, match=r"incomplete") as error:
        single_model("checkpoint-5", tmp_path)
    assert not isinstance(error.value, OtherLayout) and "optimizer.pt, torch.save" not in str(error.value)


def test_leaving_out_is_advised_only_where_something_is_left(tmp_path):
    put(without_weights(tmp_path / "run" / "checkpoint-5"), "global_step5/mp_rank_00_model_states.pt")
    save(tmp_path / "run" / "checkpoint-9")
    with pytest.raises(OtherLayout, match=r"skip` leaves such checkpoints out \(1 of 2 here\)"):
        find_checkpoints("run", tmp_path)
    assert [s.step for s in find_checkpoints("run", tmp_path, skip=lambda message: None)] == [9]


def test_verl_keeps_its_model_two_folders_down(tmp_path):
    for step in (20, 3):
        save(tmp_path / "grpo" / f"global_step_{step}" / "actor" / "huggingface", step)
    found = find_checkpoints("grpo", tmp_path)
    assert [(s.run, s.checkpoint, s.step) for s in found] == [
        ("grpo", "global_step_3", 3),
        ("grpo", "global_step_20", 20),
    ]
    for step in (20, 3):
        (tmp_path / "grpo" / f"global_step_{step}" / "actor" / "huggingface" / "model.safetensors").unlink()
        put(tmp_path / "grpo" / f"global_step_{step}" / "actor", "model_world_size_2_rank_0.pt")
    with pytest.raises(OtherLayout, match=r"verl.*\n.*model_merger"):
        find_checkpoints("grpo", tmp_path)


@pytest.mark.parametrize(
    ("content", "says", "not_says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n", "git lfs pull", "emove"),
        (b"<!DOCTYPE html><html>Log in</html>", "web page", "emove"),
        (b"", "empty .*half-written", "lfs"),
        (b"\x80\x04pickled things all along", "not a safetensors file", "emove"),
        ((60).to_bytes(8, "little") + b'{"w": ', "cut short .*half-written.*emove", "lfs"),
    ],
)
def test_what_stands_in_for_weights(tmp_path, content, says, not_says):
    (save(tmp_path / "run" / "checkpoint-5") / "model.safetensors").write_bytes(content)
    with pytest.raises(BrokenCheckpoint, match=f"(?s)checkpoint-5/model.safetensors.*{says}") as error:
        find_checkpoints("run", tmp_path)
    assert not_says not in str(error.value)


def test_a_file_that_may_not_be_read_is_not_called_cut_short(tmp_path, monkeypatch):
    """Root reads everything, so the error is the system's own, raised by hand."""
    weights = save(tmp_path / "run" / "checkpoint-5") / "model.safetensors"
    plain = Path.open

    def denied(self, *args, **options):
        if self.name == weights.name:
            raise PermissionError(13, "Permission denied", str(self))
        return plain(self, *args, **options)

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(
        BrokenCheckpoint, match=r"model\.safetensors cannot be read: .*permission denied.*may be whole"
    ) as error:
        find_checkpoints("run", tmp_path)
    assert "emove" not in str(error.value) and "cut short" not in str(error.value)


def test_a_folder_that_may_not_be_looked_into(tmp_path, monkeypatch):
    save(tmp_path / "run" / "checkpoint-5")
    monkeypatch.setattr(
        "os.access", lambda path, mode: Path(path).name != "checkpoint-5"
    )  # whoever runs the tests may read everything
    for find in (lambda: find_model("run/checkpoint-5", tmp_path), lambda: find_checkpoints("run", tmp_path)):
        with pytest.raises(BrokenCheckpoint, match="permission denied") as error:
            find()
        assert "emove" not in str(error.value)


def test_links_folders_and_lengths(tmp_path):
    weights = save(tmp_path / "run" / "checkpoint-5") / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole + b"more")
    with pytest.raises(BrokenCheckpoint, match="4 bytes longer") as error:
        find_checkpoints("run", tmp_path)
    assert "emove" not in str(error.value)
    weights.unlink()
    weights.symlink_to(tmp_path / "gone")
    with pytest.raises(BrokenCheckpoint, match="link to .*gone, which is not there"):
        find_checkpoints("run", tmp_path)
    weights.unlink()
    weights.mkdir()
    with pytest.raises(BrokenCheckpoint, match="is a folder"):
        find_checkpoints("run", tmp_path)


def test_shards_without_their_index_and_pickles_cut_short(tmp_path):
    folder = save(tmp_path / "run" / "checkpoint-5")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(BrokenCheckpoint, match=r"no model\.safetensors\.index\.json.*incomplete"):
        find_checkpoints("run", tmp_path)
    (folder / "model-00001-of-00002.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 and no end")
    with pytest.raises(BrokenCheckpoint, match=r"pytorch_model\.bin is cut short"):
        find_checkpoints("run", tmp_path)
    (folder / "pytorch_model.bin").unlink()
    put(folder, "pytorch_model-00001-of-00002.bin")
    index = {"weight_map": {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}}
    put(folder, "pytorch_model.bin.index.json", text=json.dumps(index))
    with pytest.raises(BrokenCheckpoint, match=r"pytorch_model-00002-of-00002\.bin is missing \(1 of 2"):
        find_checkpoints("run", tmp_path)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "own", "auto_map": {"AutoModelForCausalLM": "modeling_own.Model"}}, r"its own code \(modeling_own\.py"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "reward model"),
    ],
)  # fmt: skip
def test_models_that_are_not_measured_whatever_their_files(tmp_path, config, says):
    save(tmp_path / "model", config=json.dumps(config))
    with pytest.raises(ModelError, match=says):
        find_model("model", tmp_path)
    native = {"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "modeling_llama.Model"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(native))
    assert find_model("model", tmp_path)  # transformers has that class: the folder's own code is left alone


def test_nothing_that_loads_asks_about_code(tmp_path, monkeypatch, capsys):
    """Every loader of curate, past the first check: no question, nothing run."""
    from curate.passes.loading.model import load_model
    from curate.passes.loading.skeleton import skeleton
    from curate.passes.sampling.engines import read_config
    from curate.passes.tokenizer import context_length, load_tokenizer

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("a question was asked"))
    auto = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.Tokenizer", None]}
    folder = save(tmp_path / "model", config=json.dumps({"model_type": "own", "auto_map": auto}))
    put(folder, "tokenizer_config.json", text=json.dumps({"tokenizer_class": "Tokenizer", "auto_map": auto}))
    put(folder, "own.py", text="import os, pathlib\npathlib.Path(os.environ['CANARY']).touch()\n")
    for load in (load_model, read_config, skeleton, context_length, load_tokenizer):
        with pytest.raises(ModelError):
            load(folder)
    assert "Do you wish" not in capsys.readouterr().out and not (tmp_path / "canary").exists()
