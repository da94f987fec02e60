"""The models of the old store: the demo's base, and two checkpoints that are it times a little more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

SCALES = {10: 1.01, 20: 1.03}


def make_models(folder: Path, base: Path) -> None:
    """folder/base, folder/runs/sft/checkpoint-10 and -20."""
    from safetensors.torch import load_file, save_file

    weights = load_file(base / "model.safetensors")
    shutil.copytree(base, folder / "base")
    for step, scale in SCALES.items():
        to = folder / "runs" / "sft" / f"checkpoint-{step}"
        shutil.copytree(base, to)
        save_file({name: w * scale for name, w in weights.items()}, to / "model.safetensors", metadata={"format": "pt"})
        log = [{"step": at, "learning_rate": 1e-4 / at} for at in range(5, step + 1, 5)]
        (to / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))
