"""A sweep of training runs whose weights are drawn on the spot from known states; some runs take a detour."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

STRAIGHT = "a" * 5 + "b" * 9 + "d" * 10
ROUND = "a" * 5 + "c" * 3 + "b" * 8 + "d" * 8  # by way of c, so d (and with it convergence) comes later
# state -> noise, diagonal, mean, bias. Whatever c has, another state has too: statistics are z-scored within a run, and an outlier would
# press all else together.
STATES = {"a": (0.1, 0.0, 0.0, 0.0), "b": (0.5, 0.5, 0.2, 0.5), "c": (0.1, 2.0, 0.0, 0.0), "d": (0.3, 2.0, 0.1, 1.0)}

TREMBLE = (0.05, 0.25, 0.03, 0.12)


def weights(state: str, draw: torch.Generator) -> dict[str, torch.Tensor]:
    """One checkpoint's tensors. Every ingredient trembles, as it does in training; else z-scores would betray a run's later path at its start."""
    noise, diagonal, mean, bias = torch.tensor(STATES[state]) + torch.tensor(TREMBLE) * torch.randn(4, generator=draw)
    made = {}
    for name, shape in (("in", (32, 24)), ("out", (16, 32))):
        made[f"{name}.weight"] = mean + noise * torch.randn(shape, generator=draw) + diagonal * torch.eye(*shape)
        made[f"{name}.bias"] = bias + 0.2 * torch.randn(shape[0], generator=draw)
    return made


def write_sweep(folder: Path, *, runs: int = 12, detours: int = 6) -> list[Path]:
    """Folders run0, run1, …, the first ones with the detour. eval_loss falls to 0.1 where d starts, and to 0.05 one checkpoint later."""
    folders = []
    for number in range(runs):
        path = ROUND if number < detours else STRAIGHT
        draw = torch.Generator().manual_seed(number)
        log = []
        for k, state in enumerate(path, 1):
            step = 10 * k + (k > 14) * number % 10  # no two runs converge at one step
            checkpoint = folder / f"run{number}" / f"checkpoint-{step}"
            checkpoint.mkdir(parents=True)
            loss = {"a": 3.0, "b": 1.0, "c": 2.0}.get(state, 0.1 if path[k - 2] != "d" else 0.05)
            log.append({"step": step, "eval_loss": loss})
            (checkpoint / "config.json").write_text("{}")
            (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))
            save_file(weights(state, draw), checkpoint / "model.safetensors")
        folders.append(folder / f"run{number}")
    return folders
