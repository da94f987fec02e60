"""Models and a training run's checkpoints: where they are, in step order, with fingerprints of their weights.

A checkpoint is one set of weights that is measured: a whole model, or a LoRA adapter on its base. Checkpoints are folders as transformers and TRL
write them (`checkpoint-400`), or revisions of a hub repository; their step is the number in the name, or `global_step` of trainer_state.json.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from curate.errors import BrokenCheckpoint, ModelError, did_you_mean
from curate.models.fingerprints import FingerprintCache, weights_fingerprint
from curate.models.hub import HUB_ID, fetch_snapshot
from curate.models.layouts import check_folder, no_folder
from curate.models.naming import step_in_name
from curate.models.training_folder import checkpoint_folders
from curate.passes.loading.adapter_config import is_adapter, read_adapter_config, tokenizer_folder
from curate.recipe.bounds import read_object


@dataclass(frozen=True)
class Checkpoint:
    """One set of weights. path: its folder; base: of an adapter, the folder of the model it sits on. run: the training run's name ("" for a lone
    model); checkpoint: its folder's name or its revision; step: None where unknown.

    rate: the mean learning rate since the checkpoint before, None where nobody wrote it down. start: of a warm-up's model, the folder of the one
    that it started from.
    """

    path: str
    fingerprint: str
    run: str = ""
    checkpoint: str = ""
    step: int | None = None
    base: str | None = None
    rate: float | None = None
    start: str = ""

    @property
    def home(self) -> str:
        """The folder that is there before a warm-up has run: with config and tokenizer."""
        return self.start or self.path

    @property
    def label(self) -> str:
        return f"{self.run}/{self.checkpoint}" if self.run else self.checkpoint or Path(self.path).name

    @property
    def tokenizer(self) -> str:
        """The folder that its tokenizer is read from."""
        return tokenizer_folder(self.home, self.base)


def find_model(name: str, folder: Path) -> Path:
    """The folder of a model or adapter: a path (relative to `folder`), or a hub id (`owner/name`, `owner/name@revision`) that is fetched into the
    hub's cache.

    Raises ModelError where there is neither, BrokenCheckpoint where it is incomplete.
    """
    path = folder / Path(name).expanduser()
    if os.path.isdir(path):
        check_folder(path)
        return path.resolve()
    if os.path.islink(path):
        raise ModelError(f"{name}: {no_folder(path)}")
    if os.path.exists(path):
        raise ModelError(f"{name} is a file, expected a model's folder (config.json, *.safetensors, tokenizer.json).")
    of_hub = HUB_ID.fullmatch(name)
    if of_hub and not name.startswith("."):
        try:
            snapshot = fetch_snapshot(of_hub["repo"], of_hub["revision"])
        except ModelError:
            if not os.path.isdir(path.parent):
                raise
        else:
            check_folder(snapshot)
            return snapshot
    above = next(
        (why for p in (path.parent, *path.parents[1:2]) if (why := no_folder(p)) and "no such" not in why), None
    )
    if above:
        raise ModelError(f"{name}: {path.parent}: {above}")
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = did_you_mean(
        path.name, names, sentence=True, before=" ", show=lambda near: Path(name).with_name(near).as_posix()
    )
    raise ModelError(
        f"{name}: no such model folder (looked beside the recipe), and not a hub id like `owner/name` or `owner/name@revision` "
        f"that can be fetched.{hint}"
    )


def find_base(adapter: Path, folder: Path, given: str | None = None) -> Path:
    """The folder of the model that an adapter sits on: `given` (models.base), else what its config names, looked for from the recipe's folder, from
    the adapter's and the three above it, and on the hub. ModelError, with the key to set, where it is not found.
    """
    config = read_adapter_config(adapter)
    places = [folder, *([] if given else [adapter, *list(adapter.parents)[:3]])]
    name = given or config.base
    try:
        if not name:
            raise ModelError("its config names none.")
        here = next((place for place in places if (place / Path(name).expanduser()).is_dir()), None)
        revision = f"@{config.revision}" if config.revision and not (given or here) else ""
        base = find_model(name + revision, here or folder)
    except ModelError as error:
        raise ModelError(
            f"{adapter.name} is a LoRA adapter, and its base is not found: {error}\n"
            "  Say where the model that it was trained on is: models.base (a folder or hub id)."
        ) from None
    if is_adapter(base):
        raise ModelError(
            f"{adapter.name} is a LoRA adapter whose base, {base.name}, is an adapter too. Merge that one into its own base (peft: merge_and_unload, "
            "then save_pretrained) and name the merged model: models.base."
        )
    return base


def find_checkpoints(
    spec: str | Sequence[str],
    folder: Path,
    cache: FingerprintCache | None = None,
    *,
    base: str | None = None,
    skip: Callable[[str], None] | None = None,
) -> list[Checkpoint]:
    """The checkpoints of a run in step order: a trainer's output folder, or a list of model folders and hub ids (in the order given, if no steps;
    one without a step before others that have one is the model that the training began with, step 0).

    base: what LoRA adapters sit on, where their configs do not say it rightly. skip: is told of a broken or half-written checkpoint, which is then
    left out (None: it is an error). Raises ModelError where a folder holds none, or where one of them is broken (named).
    """
    paths: Sequence[str | Path] = checkpoint_folders(spec, folder) if isinstance(spec, str) else spec
    checkpoints = _read(paths, folder, cache, base, skip)
    if isinstance(spec, str):
        run = (folder / Path(spec).expanduser()).resolve().name
        checkpoints = [replace(s, run=run) for s in checkpoints]
    else:
        checkpoints = _as_one_run(checkpoints)
    checkpoints = _in_step_order(checkpoints)
    before = (0, *(s.step for s in checkpoints))
    return [
        replace(s, rate=_mean_rate(Path(s.path), since, s.step)) for s, since in zip(checkpoints, before, strict=False)
    ]


def _read(
    paths: Sequence[str | Path],
    folder: Path,
    cache: FingerprintCache | None,
    base: str | None,
    skip: Callable[[str], None] | None,
) -> list[Checkpoint]:
    """The checkpoints at some places, broken ones left out where `skip` is told of them."""
    checkpoints: list[Checkpoint] = []
    broken: list[BrokenCheckpoint] = []
    for place in paths:
        try:
            path = place if isinstance(place, Path) else find_model(place, folder)
            check_folder(path)
            if skip is not None or not broken:  # else only to see whether leaving out would leave any
                checkpoints.append(_checkpoint(path, folder, cache, name=str(place), base=base))
            else:
                checkpoints.append(Checkpoint(str(path), ""))
        except BrokenCheckpoint as error:
            broken.append(error)
    if broken and not checkpoints:
        kind = type(broken[0])
        every = "every checkpoint is broken" if kind is BrokenCheckpoint else "no checkpoint holds a model's weights"
        first = f"{every} ({len(broken)}). The first: " if len(broken) > 1 or skip else ""
        raise kind(
            f"models.checkpoints: {first}{broken[0]}\n  Wait until the trainer has written one, or name others in models.checkpoints."
        )
    if broken and skip is None:
        raise type(broken[0])(
            f"{broken[0]}\n  `--set models.on_broken_checkpoint=skip` leaves such checkpoints out "
            f"({len(broken)} of {len(paths)} here)."
        )
    for message in broken:
        assert skip is not None
        skip(str(message))
    return checkpoints


def _as_one_run(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """Listed checkpoints under one run's name, each with a step: in the order given, where they have none."""
    runs = {s.run for s in checkpoints}
    run = runs.pop() if len(runs) == 1 else "checkpoints"
    rest = [s.step for s in checkpoints[1:]]
    if checkpoints[0].step is None and rest and all(rest):  # listed before checkpoint-10: what the training began with
        checkpoints = [replace(checkpoints[0], step=0), *checkpoints[1:]]
    if any(s.step is None for s in checkpoints):  # step 0 is a reference's
        checkpoints = [replace(s, step=i) for i, s in enumerate(checkpoints, start=1)]
    return [replace(s, run=run) for s in checkpoints]


def _in_step_order(checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """By step, copies left out. ModelError where two are of one step."""
    ordered = sorted(checkpoints, key=lambda s: (s.step is None, s.step or 0))
    checkpoints = []
    for s in ordered:  # a trainer's `final/` is often a copy of the last checkpoint: that one counts
        if not any(s.fingerprint == other.fingerprint and s.step in (None, other.step) for other in checkpoints):
            checkpoints.append(s)
    twice = {s.step for s in checkpoints if s.step is not None and [x.step for x in checkpoints].count(s.step) > 1}
    if twice:
        both = " and ".join(s.path for s in checkpoints if s.step == min(twice))
        raise ModelError(
            f"models.checkpoints: {both} are both of step {min(twice)}: keep one, or list the checkpoints that you mean."
        )
    return checkpoints


def _mean_rate(path: Path, since: int | None, step: int | None) -> float | None:
    """Mean of the learning rates that a trainer logged after step `since` up to `step`; None where it logged none."""
    try:
        log = read_object(path / "trainer_state.json")["log_history"]
        rates = [
            float(e["learning_rate"]) for e in log if "learning_rate" in e and (since or 0) < e["step"] <= (step or 0)
        ]
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return sum(rates) / len(rates) if rates else None


def single_model(
    name: str,
    folder: Path,
    cache: FingerprintCache | None = None,
    *,
    base: str | None = None,
    step: int | None = None,
) -> Checkpoint:
    """The checkpoint of a lone model, such as `models.reference`. base: as of `find_checkpoints`."""
    path = find_model(name, folder)
    checkpoint = _checkpoint(path, folder, cache, name=name, base=base)
    return replace(checkpoint, run="", checkpoint=name if _of_hub(path) else path.name, step=step)


def _checkpoint(path: Path, folder: Path, cache: FingerprintCache | None, *, name: str, base: str | None) -> Checkpoint:
    """A checkpoint as one of the run whose folder, or repository, it is in."""
    check_folder(path)
    on = find_base(path, folder, base) if is_adapter(path) else None
    run, checkpoint = path.parent.name, path.name
    if path.parts[-2:] == ("actor", "huggingface"):  # verl: RUN/global_step_10/actor/huggingface
        run, checkpoint = path.parents[2].name, path.parents[1].name
    if _of_hub(path):
        repo, _, revision = name.partition("@")
        run, checkpoint = repo.rpartition("/")[2], revision or name
    fingerprint = weights_fingerprint(path, cache, base=on)
    return Checkpoint(str(path), fingerprint, run, checkpoint, _step(path, checkpoint), str(on) if on else None)


def _of_hub(path: Path) -> bool:
    return path.parent.name == "snapshots"


def _step(path: Path, name: str) -> int | None:
    """The step in a checkpoint's name, or in its trainer's state."""
    named = step_in_name(name)
    if named is not None:
        return named
    try:
        return int(read_object(path / "trainer_state.json")["global_step"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
