"""Which model is behind `server.url`, asked whenever it matters, and whether this store has met it before.

A URL is no identity: a training loop serves each new policy at the same one. A server's model is known by what the server says of it and by its
answers to a few prompts (passes/sampling/server_probe.py). Models that were met are kept in the store's `servers.json`; one that says the same and
answers
alike, within the noise of the server, is the same, whatever its URL. Any other is measured under an identity of its own.

`curate plan`, `run` and `measure` ask the server. The other commands, which need no server, mean the model that was measured last at this URL.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from curate.errors import CurateError, EngineError, UsageError
from curate.models.checkpoints import Checkpoint, single_model
from curate.models.fingerprints import FingerprintCache
from curate.passes.files import write_atomically
from curate.passes.sampling.server_probe import FIXED, Noise, Probe, Spoken, difference, key_of, measured_noise
from curate.recipe.bounds import read_object
from curate.rows import Row, content_id
from curate.store.openings import let_go

if TYPE_CHECKING:
    from curate.recipe.load import Loaded
    from curate.store import Store

Ask = Literal[
    "no", "look", "keep"
]  # the server is not asked; asked; asked, and its model remembered, since it will be measured
OWN_ROWS = 4  # rows of the recipe whose prompts are part of the probe: training moves a model most where it is trained
LONGEST = 4000  # characters of such a prompt
FILE = "servers.json"


@dataclass(frozen=True)
class Served:
    """A server's model. id: what stands for its weights in fingerprints. description: what the server says of the model. notes: for the user, how the
    model was recognised.
    """

    id: str
    description: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        return str(self.description["model"])

    @property
    def engine(self) -> str:
        """As it stands in fingerprints: "openai policy 3f2a91c0d4e5f607"."""
        return f"openai {self.model} {self.id}"


class Servers:
    """The server of a recipe and the models that a store has met. folder: the store's. rows: a few of the recipe's, whose prompts are asked too."""

    def __init__(self, loaded: Loaded, folder: Path, *, ask: Ask = "no", rows: Sequence[Row] = ()):
        self.loaded, self.server, self.folder, self.ask = loaded, loaded.recipe.server, folder, ask
        self.prompts = [*FIXED, *(row.prompt for row in rows[:OWN_ROWS] if len(str(row.prompt)) < LONGEST)]
        self.chat_only = False  # whether the server was found to take messages alone
        self._known: dict[str, Served] = {}
        self.doubts: list[str] = []  # what --quiet must not hide: whether the server's model is the recipe's

    def of(self, checkpoint: Checkpoint | None = None) -> Served:
        """The model that stands for a checkpoint (None: the recipe names no other model). Asked once an instance.

        UsageError without a URL, and for a server whose model has another name, or other weights, than the checkpoint; EngineError where no server
        answers.
        """
        if not self.server.url:
            from curate.passes.sampling.openai_client import NO_URL

            raise UsageError(NO_URL)
        key = checkpoint.path if checkpoint else ""
        if key not in self._known:
            self._known[key] = self._remembered() if self.ask == "no" else self._asked(checkpoint)
        return self._known[key]

    @property
    def notes(self) -> list[str]:
        """What is said of the models that were asked for."""
        return list(dict.fromkeys(note for served in self._known.values() for note in served.notes))

    # ---- asking ---------------------------------------------------------------------------------------------------------------------------

    def _asked(self, checkpoint: Checkpoint | None) -> Served:
        from curate.passes.sampling.openai import OpenAISampler

        names = _names(checkpoint, self.loaded) if checkpoint else ()
        let_go()  # a server takes its time
        with OpenAISampler(self.server.model_dump(), prefer=names) as sampler:
            description = sampler.description()
            now = sampler.probe(self.prompts)
            proof = self._check_name(description, checkpoint, names, now) if checkpoint else ()
            self.chat_only = sampler.chat_only
            kept = _read(self.folder)
            key_before, why = _known(kept["models"], description, now)
            known = _probe(kept["models"][key_before]["probe"]) if key_before else {}
            new = {key: spoken for key, spoken in now.items() if key not in known}
            again = sampler.probe([p for p in self.prompts if key_of(p) in new], at_once=True) if new else {}
        sure, noise = measured_noise(new, again)
        key = (
            key_before
            or content_id("served", description, {prompt: spoken.to_json() for prompt, spoken in sure.items()})[:16]
        )
        met = _met(kept, key_before, self._place, description, why)
        if self.ask == "keep":
            model = kept["models"].get(key) or {"said": description, "noise": [noise.mean, noise.most], "probe": {}}
            model["probe"] |= {prompt: spoken.to_json() for prompt, spoken in sure.items()}
            kept["models"][key], kept["last"][self._place] = model, key
            self._write(kept)
        return Served(
            key, description, (self._note(description, met), *proof, *(() if known or sure else (UNREPEATABLE,)))
        )

    def _check_name(
        self, description: dict[str, Any], checkpoint: Checkpoint, names: Sequence[str], now: Probe
    ) -> tuple[str, ...]:
        """That the server's model can be the checkpoint: () or a line on what that rests on. UsageError showing both where it cannot.

        A server that gives neither a root nor log-probabilities has a label for its model and no more: another label is a doubt, no proof.
        """
        model, root = str(description["model"]), description.get("root")
        shown = model if not root or root == model else f"{model} (from {root})"
        if root and Path(str(root)).is_dir():  # the server is on this machine: its weights can be read
            try:
                cache = FingerprintCache(self.folder / "weights.json")
                same = single_model(str(root), self.loaded.folder, cache).fingerprint == checkpoint.fingerprint
            except CurateError:
                same = None
            if same:
                return ()
            if same is False:
                raise UsageError(
                    f"{self.server.url} serves {shown}, whose weights are others than those of {checkpoint.label} in the recipe "
                    f"({checkpoint.path}). Serve that model, or name in models.reference the one that is served."
                )
        theirs = {part for name in (model, root) if name for part in (str(name), Path(str(name)).name)}
        if theirs & set(names):
            return (
                f"That {shown} has the weights of {checkpoint.label} is taken from its name; only its answers are the server's own.",
            )
        if self.server.model:
            return (f"{shown} is taken for {checkpoint.label} because server.model says so: the names differ.",)
        if not root and all(spoken.logps is None for spoken in now.values()):
            self.doubts.append(
                f"The recipe's model is {checkpoint.label}, and {self.server.url} calls its model {model}. It gives neither the path that it was "
                f"loaded from nor log-probabilities, so nothing here can tell whether both are one: its answers are kept as {model}'s. "
                f"Where they are one, say so: `--set server.model={model}`."
            )
            return ()
        raise UsageError(
            f"The recipe's model is {checkpoint.label} ({checkpoint.path}), and {self.server.url} serves {shown}. Serve that model, or name in "
            f"models.reference the one that is served; where both are the same under two names, say so: `--set server.model={model}`."
        )

    def _note(self, description: dict[str, Any], met: str) -> str:
        about = [f"from {description['root']}"] if description["root"] not in (None, description["model"]) else []
        about += [f"version {description['version']}"] if description["version"] else []
        details = f" ({', '.join(about)})" if about else ""
        return f"{self.server.url} serves {description['model']}{details}: {met}."

    # ---- memory ---------------------------------------------------------------------------------------------------------------------------

    @property
    def _place(self) -> str:
        return " ".join(filter(None, [str(self.server.url).rstrip("/"), self.server.model]))

    def _remembered(self) -> Served:
        kept = _read(self.folder)
        last = kept["last"].get(self._place)
        if last not in kept["models"]:
            raise EngineError(
                f"{self.server.url}: nothing in {self.folder} was measured on this server's model yet, or only when a server was known by its "
                f"address alone. `curate run {self.loaded.path or 'RECIPE'}` asks the server, and measures."
            )
        return Served(last, kept["models"][last]["said"])

    def _write(self, kept: dict[str, Any]) -> None:
        file = self.folder / FILE
        try:
            with write_atomically(file) as new:
                new.write_text(json.dumps(kept, ensure_ascii=False, indent=1), encoding="utf-8")
        except OSError as error:
            raise EngineError(f"{file}: cannot be written ({error.strerror}).") from None


UNREPEATABLE = (
    "The server answers the same prompt differently each time, even greedily: its model is known by its name alone. Give each new model a "
    "name of its own."
)


def expected(loaded: Loaded, engine: str) -> dict[str, Any]:
    """{said, probe, noise} of the model with this name of an engine, for a sampler to compare with."""
    model: dict[str, Any] = _read(loaded.store)["models"][engine.rpartition(" ")[2]]
    return {**model, "probe": dict(list(model["probe"].items())[: len(FIXED) + OWN_ROWS])}


def of_addresses(store: Store, loaded: Loaded) -> list[str]:
    """A line where the store holds values of this server from when a server was known by its address alone."""
    url = str(loaded.recipe.server.url).rstrip("/")
    old = [m for m in store.measured(reads="sample") if m.engine.startswith(f"openai {url}")]
    if loaded.recipe.engine.sampler != "openai" or not old:
        return []
    return [
        f"{len(old)} measurements of {url} were made when a server was known by its address alone: which model they are of is unknown, so they "
        "are not used, and measured again."
    ]


def first_rows(store: Store, loaded: Loaded, sources: Sequence[str]) -> list[Row]:
    """The recipe's first rows, whose prompts a server is asked too; none where it uses no server."""
    if loaded.recipe.engine.sampler != "openai":
        return []
    row_ids = store.row_ids_of(sources or None, kind=loaded.recipe.kind, limit=OWN_ROWS)
    return [row for row in store.iter_rows(row_ids) if row is not None]


def _read(folder: Path) -> dict[str, Any]:
    try:
        stored = read_object(folder / FILE)
        return {"models": dict(stored["models"]), "last": dict(stored["last"])}
    except FileNotFoundError:
        return {"models": {}, "last": {}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError(
            f"{folder / FILE}: cannot be read ({error}). It says which servers' models were measured; without it they are measured "
            "again: move it away to do that."
        ) from None


def _known(models: dict[str, Any], description: dict[str, Any], now: Probe) -> tuple[str | None, str]:
    """The model that says the same and answers alike, and, where there is none, how the answers of the last one that says the same differ."""
    why = ""
    for key, model in reversed(models.items()):
        known = _probe(model["probe"])
        if model["said"] != description or (known and not known.keys() & now.keys()):
            continue
        differs = difference(known, now, Noise(*model["noise"]))
        if differs is None:
            return key, ""
        why = why or differs
    return None, why


def _met(kept: dict[str, Any], known_key: str | None, place: str, description: dict[str, Any], why: str) -> str:
    """In words, whether this store has met the model."""
    if known_key:
        return "the model that was measured here before"
    before = kept["models"].get(kept["last"].get(place))
    if before and before["said"] != description:
        why = "; ".join(
            f"{name} was {before['said'].get(name)}"
            for name in description
            if before["said"].get(name) != description[name]
        )
    return (
        f"another model than was measured here before, so its values are measured anew ({why})"
        if why
        else "new to this store"
    )


def _probe(kept: dict[str, Any]) -> Probe:
    return {key: Spoken.from_json(spoken) for key, spoken in kept.items()}


def _names(checkpoint: Checkpoint, loaded: Loaded) -> tuple[str, ...]:
    """What a server may call a checkpoint."""
    given = [
        name for name in (loaded.recipe.models.reference, loaded.recipe.models.checkpoints) if isinstance(name, str)
    ]
    mine = given if len(given) == 1 else []
    return tuple(
        dict.fromkeys([checkpoint.path, Path(checkpoint.path).name, checkpoint.checkpoint, checkpoint.label, *mine])
    )
