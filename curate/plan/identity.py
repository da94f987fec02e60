"""What a measured value depends on, as a fingerprint: weights, tokenizer and template, engine and version, measurement and version, parameters.

Values of different fingerprints are never mixed, and a value under a known fingerprint is never measured again. Parameters of scores
(a threshold, a β) are not in it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.errors import UsageError
from curate.measurements.perturbations import perturbation
from curate.models.checkpoints import Checkpoint
from curate.models.fingerprints import FingerprintCache
from curate.plan.engines import engine_name
from curate.plan.kept import Kept
from curate.plan.rendering import Renderings
from curate.plan.sampling_checks import check_sampling
from curate.plan.servers import Servers
from curate.plan.step import Task
from curate.recipe.bounds import read_object, read_text
from curate.recipe.doors import path
from curate.rows import content_id
from curate.store import Measured

if TYPE_CHECKING:
    from curate.passes.contract import Measurement
    from curate.recipe.load import Loaded
    from curate.store import Store


class Identity:
    """The fingerprints of measurements: everything that their values depend on."""

    def __init__(
        self,
        loaded: Loaded,
        cache: FingerprintCache,
        servers: Servers | None = None,
        *,
        styles: Collection[str] | None = None,
        store: Store | None = None,
        kept: Kept | None = None,
    ):
        """styles: of the recipe's rows, as `rows.style` has them (None: not known)."""
        self.servers = servers or Servers(loaded, loaded.store)
        self.kept = kept or Kept()
        self.loaded, self.recipe, self.cache = loaded, loaded.recipe, cache
        self.pool: Callable[[], Sequence[str]] = tuple  # gives the rows that a row's neighbours are taken from
        self.renderings = Renderings(loaded, cache, styles, store)
        self._tokenizers: dict[str, str] = {}
        self._engines: dict[tuple[str, str], str] = {}

    def task(
        self, measurement: Measurement, checkpoint: Checkpoint, direction: Mapping[str, Any] | None = None
    ) -> Task:
        """direction: of a measurement along a direction, `Directions.identity` of that."""
        engine = "" if measurement.reads == "tokens" else self.engine(measurement.reads, checkpoint)
        params = self._settings(measurement, self.tokenizer(checkpoint))
        params |= self._rendering(measurement, checkpoint)
        if measurement.direction is not None:
            assert direction is not None
            params |= direction
        if measurement.reads == "neighbours":
            params["neighbours"] = self._neighbours
        if measurement.reads == "sample":
            if ends := self.ends(checkpoint):
                params["end_tokens"] = ends
            if self.kept.anew:
                check_sampling(self.recipe.sampling, self.renderings.of(checkpoint), checkpoint.label)
        return task_of(measurement, checkpoint, engine, params)

    @cached_property
    def _neighbours(self) -> str:
        from curate.passes.nearest import pool_fingerprint

        return pool_fingerprint(self.pool())

    def _settings(self, measurement: Measurement, tokenizer: str) -> dict[str, Any]:
        """`params_of`, of files and modules of the user's too: a grader, a few-shot prompt."""
        recipe = self.recipe
        about = [recipe.tokens, recipe.sampling, recipe.gradients] if measurement.reads != "tokens" else [recipe.tokens]
        settings = content_id(tokenizer, recipe.engine.seed, *(one.settings() for one in about))
        shots = recipe.sampling.few_shot
        gone = bool(shots) and "\n" not in str(shots) and not self.loaded.resolve(str(shots)).is_file()
        few_shot: str | None = None
        if measurement.reads == "sample":  # asked by itself, so that another grader needs no file again
            question = f"few-shot text {content_id(shots)}"
            if not gone or question in self.kept.known:
                few_shot = self.kept.ask(question, lambda: few_shot_text(self.loaded), gone=gone)
        find = lambda: params_of(self.loaded, measurement, tokenizer, few_shot)  # noqa: E731
        return dict(self.kept.ask(f"settings of {measurement.name} {settings}", find, gone=gone))

    def _rendering(self, measurement: Measurement, checkpoint: Checkpoint) -> dict[str, Any]:
        turns = ", all turns" if self.recipe.tokens.turns == "all" else ""
        tags = self.recipe.sampling.thinking_tags
        turns += f", thinking in {tags}" if measurement.reads == "sample" and tags != "auto" else ""
        question = f"rendering ({self.recipe.tokens.chat}{turns}, {measurement.name})"
        find = lambda: self.renderings.of(checkpoint).params(measurement)  # noqa: E731
        return self.kept.of_model(question, checkpoint, find, before=self.loaded.formats is None)

    def ends(self, checkpoint: Checkpoint) -> list[int]:
        return self.kept.of_model(
            "end tokens", checkpoint, lambda: end_tokens(Path(checkpoint.base or checkpoint.path))
        )

    def tokenizer(self, checkpoint: Checkpoint) -> str:
        return self.kept.of_model("tokenizer", checkpoint, lambda: self._tokenizer(checkpoint))

    def _tokenizer(self, checkpoint: Checkpoint) -> str:
        if not Path(checkpoint.home).is_dir():  # a server's model: its tokenizer is its own
            return "server"
        folder = checkpoint.tokenizer
        if folder not in self._tokenizers:
            self._tokenizers[folder] = self.cache.tokenizer(Path(folder))
        return self._tokenizers[folder]

    def engine(self, reads: str, checkpoint: Checkpoint) -> str:
        key = (reads, checkpoint.path)
        if key not in self._engines:
            engine = self.recipe.engine
            settings = [engine.dtype, engine.device]
            if reads == "sample":
                settings += [engine.sampler, str(self.recipe.server.url or ""), str(self.recipe.server.model or "")]
            question = f"engine ({reads}, {', '.join(settings)})"

            def find() -> str:
                return engine_name(self.recipe, reads, checkpoint, self.cache, self.servers)

            # scores are of what was measured, not of what this machine would measure with
            self._engines[key] = self.kept.of_model(question, checkpoint, find, before=True)
        return self._engines[key]


def params_of(loaded: Loaded, measurement: Measurement, tokenizer: str, few_shot: str | None = None) -> dict[str, Any]:
    """The settings that a measurement's values depend on. tokenizer: its fingerprint. few_shot: the text, where it is known already."""
    tokens, sampling = loaded.recipe.tokens, loaded.recipe.sampling
    params: dict[str, Any] = {
        "tokenizer": tokenizer,
        "max_length": tokens.max_length,
        "truncation": tokens.truncation,
    }
    if measurement.reads == "sample":
        from curate.measurements.grading import grader

        params |= {
            "samples": sampling.samples
            if isinstance(sampling.samples, int)
            else sampling.samples.model_dump(mode="json"),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_new_tokens": sampling.max_new_tokens,
            "stop": sampling.stop,
            "system": sampling.system,
            "few_shot": few_shot if few_shot is not None else few_shot_text(loaded),
            "seed": loaded.recipe.engine.seed,
            "grader": grader(sampling.grader, folder=loaded.folder).fingerprint,
        }
        further = ("top_k", "min_p", "repetition_penalty", "thinking_tokens", "chat_template_kwargs", "extra_body")
        params |= {name: value for name in further if (value := getattr(sampling, name))}
        if isinstance(sampling.thinking_tags, list):
            params["thinking"] = sampling.thinking_tags
        if sampling.unfinished != "wrong" and measurement.kind == "sft":
            params["unfinished"] = sampling.unfinished
    if measurement.perturbed and sampling.perturb is not None:
        params["perturb"] = perturbation(sampling.perturb, folder=loaded.folder).fingerprint
    if measurement.reads in ("backward", "direction") and loaded.recipe.gradients.parameters != "all":
        params["parameters"] = loaded.recipe.gradients.parameters
    return params


def task_of(measurement: Measurement, checkpoint: Checkpoint, engine: str, params: dict[str, Any]) -> Task:
    """A measurement of a checkpoint under its fingerprint. Values of tokens alone belong to no weights, run or engine."""
    weights = "" if measurement.reads == "tokens" else checkpoint.fingerprint
    fingerprint = content_id(measurement.name, measurement.version, weights, engine, params)
    run, name, step = (checkpoint.run, checkpoint.checkpoint, checkpoint.step) if weights else ("", "", None)
    return Task(
        measurement,
        Measured(
            fingerprint,
            measurement.name,
            measurement.reads,
            checkpoint.label,
            weights,
            run,
            name,
            step,
            engine,
            params,
        ),
    )


def end_tokens(folder: Path) -> list[int]:
    """The ids that end an answer by generation_config.json and not by config.json, which is fingerprinted with the weights; sorted."""
    stops = []
    for name in ("generation_config.json", "config.json"):
        try:
            ids = read_object(folder / name).get("eos_token_id")
        except (OSError, ValueError):  # none, or of a server's model
            ids = None
        stops.append({i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int})
    own, of_config = stops
    return sorted(own) if own != of_config else []


def _can_name_a_file(text: str) -> bool:
    try:
        return bool(path(text))
    except ValueError:
        return False


def few_shot_text(loaded: Loaded) -> str | None:
    """sampling.few_shot: the text itself, or that of the file it names. UsageError for a file's name that is none."""
    given = loaded.recipe.sampling.few_shot
    if not given or "\n" in given:
        return given
    file = loaded.resolve(given)
    try:
        if _can_name_a_file(given) and file.is_file():
            return read_text(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"sampling.few_shot: {given} cannot be read ({error}).") from None
    if re.fullmatch(r"\S*[\w)]\.(txt|md|jinja2?|prompt|json|jsonl|yaml|yml|csv)", given):
        raise UsageError(
            f"sampling.few_shot: {given} is no file here (looked in {loaded.folder}), and as a text it would stand before every prompt. Name the "
            "file, or write the text itself."
        )
    return given
