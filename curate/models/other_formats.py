"""Weights that are no transformers checkpoint, told by their files: trainers' state in shards, other formats; and what makes a model of each."""

from __future__ import annotations

from pathlib import Path

OTHER_FILES = {
    "*.gguf": (
        "llama.cpp's quantised GGUF",
        "Name the model that it was made from, or serve it (`llama-server`) and sample with engine.sampler: openai.",
    ),
    "consolidated*.pth": (
        "Meta's own layout",
        "Turn it into transformers' (python -m transformers.models.llama.convert_llama_weights_to_hf).",
    ),
    "consolidated*.safetensors": (
        "Mistral's own layout",
        "Name the repository's transformers files (model.safetensors) instead.",
    ),
    "pytorch_model_fsdp.bin": (
        "FSDP's whole state in one pickle",
        "Load it into the model (model.load_state_dict(torch.load(…))) and `save_pretrained` that.",
    ),
    "flax_model*.msgpack": (
        "Flax weights",
        "Save them from Flax with transformers 4 (from_flax=True, then save_pretrained).",
    ),
    "tf_model*.h5": (
        "TensorFlow weights",
        "Save them from TensorFlow with transformers 4 (from_tf=True, then save_pretrained).",
    ),
    "*.onnx": ("an ONNX graph", "Name the model that it was exported from."),
    "weights*.npz": (
        "MLX weights",
        "Convert them (mlx_lm.fuse --export…, or name the model that they were made from).",
    ),
    "*.pt": ("torch.save pickles of a training script", "Load them into the model and `save_pretrained` that."),
    "*.pth": ("torch.save pickles of a training script", "Load them into the model and `save_pretrained` that."),
}
OF_TRAINERS = ("optimizer*.pt", "scheduler*.pt", "scaler*.pt", "rng_state*.pth")  # beside a checkpoint's weights


def training_state(path: Path) -> str | None:
    """Which trainer's sharded state a folder holds, and what turns it into weights; None where it holds none that is known."""
    name = path.name
    of_zero = [p for p in path.glob("global_step*") if p.is_dir() and any(p.glob("*_states.pt"))]
    if of_zero or (path / "zero_to_fp32.py").is_file() or any(path.glob("*zero_pp_rank_*_states.pt")):
        tag = of_zero[0].name if of_zero else "zero_to_fp32.py"
        return (
            f"{name} holds DeepSpeed's training state in shards ({tag}), not the model's weights.\n"
            f"  In that folder, `python zero_to_fp32.py . . --safe_serialization` writes them. For later trainings: "
            "stage3_gather_16bit_weights_on_model_save: true in DeepSpeed's config."
        )
    shards = next((p for p in (*path.glob("*.distcp"), *path.glob("*/*.distcp"))), None)
    if shards is not None:
        inside = shards.parent if shards.parent == path else Path(shards.parent.name)
        where = name if shards.parent == path else f"{name}/{inside.name}"
        return (
            f"{name} holds FSDP's training state in shards ({shards.name} in {where}), not the model's weights.\n"
            f"  `accelerate merge-weights {where} {name}` writes them. For later trainings: "
            "fsdp_state_dict_type: FULL_STATE_DICT in accelerate's config."
        )
    if (
        any(path.glob("mp_rank_*/*.pt"))
        or any(path.glob("iter_*/mp_rank_*"))
        or (path / "latest_checkpointed_iteration.txt").is_file()
    ):
        return (
            f"{name} holds Megatron's training state (mp_rank_…), not a transformers model.\n"
            "  Export it: Megatron Bridge's AutoBridge.export_ckpt, or Megatron-LM's tools/checkpoint/convert.py."
        )
    actor = next((p for p in (path, path / "actor") if any(p.glob("model_world_size_*_rank_*.pt"))), None)
    if actor is not None:
        local = name if actor == path else f"{name}/actor"
        return (
            f"{name} holds verl's training state in shards (model_world_size_…_rank_….pt), not the model's weights.\n"
            f"  `python -m verl.model_merger merge --backend fsdp --local_dir {local} --target_dir {local}/huggingface` writes them. "
            "For later trainings: hf_model in actor_rollout_ref.actor.checkpoint.save_contents."
        )
    return None


def other_weights(path: Path) -> str | None:
    """Weights of another format in a model folder, and what to do; None where there are none that are known."""
    for pattern, (what, advice) in OTHER_FILES.items():
        files = [
            file
            for file in sorted(path.glob(pattern))
            if not any(file.match(pattern_of_trainers) for pattern_of_trainers in OF_TRAINERS)
        ]
        if files:
            return f"{path.name} holds {files[0].name}, {what}, and no model.safetensors.\n  {advice}"
    return None
