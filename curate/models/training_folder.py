"""Which folders of a trainer's output folder are checkpoints."""

from __future__ import annotations

import os
import re
from pathlib import Path

from curate.errors import ModelError, OtherLayout
from curate.models.layouts import no_folder
from curate.models.naming import natural
from curate.models.other_formats import training_state

VERL = (
    "/actor/huggingface holds a config and no weights. For later trainings: hf_model in actor_rollout_ref.actor.checkpoint.save_contents; "
    "of this one, `python -m verl.model_merger merge` makes them."
)


def checkpoint_folders(spec: str, folder: Path) -> list[Path]:
    """The checkpoints in a trainer's output folder."""
    place = folder / Path(spec).expanduser()
    if why := no_folder(place):
        advice = (
            " Give a trainer's output folder (with checkpoint-<step>/ in it), a list, or revisions of a hub repository: "
            "{repo: owner/name, revisions: [...]}."
        )
        raise ModelError(f"models.checkpoints: {spec} is not a folder that can be read: {why}{advice}")
    try:
        return _checkpoints_in(place.resolve(), spec)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise ModelError(
            f"models.checkpoints: {spec} cannot be read: {(error.strerror or str(error)).lower()}{where}. Ask its owner, or name the checkpoints "
            "that you mean in a list."
        ) from None


def _checkpoints_in(root: Path, spec: str) -> list[Path]:
    """The checkpoints in a folder; those that cannot be looked into too, so that none is left out unsaid."""
    there = sorted(root.iterdir(), key=lambda p: natural(p.name))
    inside = [p for p in there if no_folder(p) is None]
    checkpoints = [
        p
        for p in there
        if re.fullmatch(r"checkpoint-\d+", p.name) or (_has_config(p) if p in inside else os.path.isdir(p))
    ]
    if not checkpoints:  # verl's layout: the actor's model in transformers' format, where it was saved so
        of_verl = [p for p in inside if (p / "actor" / "huggingface" / "config.json").is_file()]
        checkpoints = [
            p / "actor" / "huggingface" for p in of_verl if any((p / "actor" / "huggingface").glob("*.safetensors"))
        ]
        if of_verl and not checkpoints:
            raise OtherLayout(f"models.checkpoints: {training_state(of_verl[0]) or of_verl[0].name + VERL}")
    state = (
        next((format_note for p in (*inside, root) if (format_note := training_state(p))), None)
        if not checkpoints
        else None
    )
    if state is not None:
        raise OtherLayout(f"models.checkpoints: {state}")
    if not checkpoints and _has_config(root):
        raise ModelError(
            f"models.checkpoints: {spec} is one model, not a run's folder with checkpoint-<step>/ in it. Name it as models.reference; or, as one of "
            f"several checkpoints, in a list: `checkpoints: [{spec}, …]`."
        )
    if not checkpoints:
        raise ModelError(
            f"models.checkpoints: {spec} holds no checkpoint (a folder checkpoint-<step> with config.json and weights, or with a LoRA adapter). "
            "For the trainer, set save_strategy and save_steps; for a single model, use models.reference."
        )
    return checkpoints


def _has_config(path: Path) -> bool:
    return any((path / name).exists() for name in ("config.json", "adapter_config.json"))
