"""The trainer's settings that go with an export: `trainer_args.json`, for `DPOConfig(**…)` or `SFTConfig(**…)` of TRL.

Only arguments that the installed TRL has are written: its configuration classes are read as source, not imported (that would take
seconds and torch). Without TRL the file holds what TRL 1.16 takes, and the card says so.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FILE, MIXINS = "trainer_args.json", "trl_trainers.py"
OF = {
    "DPOConfig": "dpo_config.py",
    "SFTConfig": "sft_config.py",
    "KTOConfig": "kto_config.py",
    "GRPOConfig": "grpo_config.py",
}


@dataclass(frozen=True)
class TrainedAs:
    """What the settings follow from: how rows were cut when they were measured, DPO's β, and whether signs of squeezing were scored.

    unlike: sentences on what was measured or scored otherwise than these settings train. turns: whether the last assistant turn of an SFT row was
    measured or all of them (tokens.turns). in_order: the rows are not to be shuffled. given_reference: the rows have the reference's
    log-probabilities. sampling: how answers were sampled, in GRPOConfig's names, where they were. asked_behind: sentences on what stood before the
    prompts then, and is not in these rows.
    """

    max_length: int | None
    truncation: str
    beta: float | None = None
    squeezing: bool = False
    unlike: tuple[str, ...] = ()
    turns: str = "last"
    in_order: bool = False
    given_reference: bool = False
    sampling: tuple[tuple[str, Any], ...] = ()
    asked_behind: tuple[str, ...] = ()

    def args(self, layout: str) -> tuple[str, dict[str, Any]] | None:
        """The configuration class that trains on an export of this layout, and its arguments; None for layouts that neither takes.

        Where signs of squeezing were scored, an NLL term on the chosen response stands beside the DPO loss, with equal weights, which is TRL's
        default for several losses (its NLL is a mean over tokens, DPO's gradient β times a sum over them: a mild term).
        """
        in_order = {"train_sampling_strategy": "sequential"} if self.in_order else {}
        if layout.startswith("trl prompts"):
            args = dict(self.sampling) | ({"shuffle_dataset": False} if self.in_order else {})
            return ("GRPOConfig", args) if args else None
        args = {"max_length": self.max_length, **in_order}
        if self.truncation in ("keep_start", "keep_end"):
            args["truncation_mode"] = self.truncation
        if layout.startswith("trl preference"):
            if self.beta is not None:
                args["beta"] = self.beta
            if self.squeezing:
                args |= {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}
            if self.given_reference:
                args["precompute_ref_log_probs"] = True  # the mixin of trl_trainers.py takes the columns instead
            return "DPOConfig", args
        if layout.startswith("trl unpaired preference"):
            return "KTOConfig", args
        if not layout.startswith(("prompt/completion", "messages")):
            return None
        if self.turns == "all":
            args["assistant_only_loss"] = True
            if layout.startswith("prompt/completion"):  # whose turns before the completion TRL masks by itself
                args["completion_only_loss"] = False
        return "SFTConfig", args


def write_trainer_args(folder: Path, trained: TrainedAs, layout: str) -> list[str]:
    """Write the arguments that the installed TRL's class has. Returns what a reader of the card should know of them."""
    written = trained.args(layout)
    if written is None:
        return []
    config, args = written
    known = fields_of(config)
    kept = {name: value for name, value in args.items() if known is None or name in known}
    (folder / FILE).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    shown = ", ".join(f"{name}={value!r}" for name, value in kept.items())
    does = "samples" if config == "GRPOConfig" else "trains"
    notes = [f"`{config}(output_dir=..., **json.load(open('{FILE}')))` {does} as it was measured: {shown}."]
    if config == "SFTConfig" and layout.startswith("messages") and trained.turns == "last":
        notes = [
            f"`{config}(output_dir=..., **json.load(open('{FILE}')))` trains every token of these conversations, and the last reply alone was "
            f"measured: `export.format: trl` has prompts and completions, of which TRL trains the completions. {shown}."
        ]
    if config == "DPOConfig":
        notes += trained.unlike
    left = sorted(set(args) - set(kept))
    if left:
        notes.append(f"TRL {_installed()} has no argument {', '.join(left)}: {FILE} leaves it out.")
    if known is None:
        notes.append(f"TRL is not installed where this was exported: {FILE} is written for TRL 1.16.")
    return notes


def fields_of(config: str) -> set[str] | None:
    """The fields that the installed TRL's configuration class declares itself, and those of transformers' that it inherits; None without TRL."""
    own = _declared("trl", Path("trainer") / OF[config], config)
    return (
        None
        if own is None
        else own | (_declared("transformers", Path("training_args.py"), "TrainingArguments") or set())
    )


def _declared(package: str, file: Path, name: str) -> set[str] | None:
    """The fields that a class of an installed package declares; None where there is none."""
    spec = importlib.util.find_spec(package)
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        if not (Path(folder) / file).is_file():
            continue
        tree = ast.parse((Path(folder) / file).read_text(encoding="utf-8"))
        definition = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)
        if definition is not None:
            return {
                n.target.id for n in definition.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
            }
    return None


def _installed() -> str:
    try:
        return version("trl")
    except PackageNotFoundError:
        return "(of an unknown version)"
