"""What a step will cost, in tokens and seconds: from what was timed here before, else a rough guess that says so."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.passes.nearest import COUNT
from curate.plan.step import FORWARD

if TYPE_CHECKING:
    from curate.models.checkpoints import Checkpoint
    from curate.plan.lengths import Lengths
    from curate.plan.step import Step
    from curate.recipe.load import Loaded
    from curate.store import Store


def with_cost(
    step: Step,
    loaded: Loaded,
    speed: float | None,
    lengths: Lengths,
    at: np.ndarray,
    answers: float | None = None,
) -> Step:
    """The step with an estimate of its tokens and time, and with how many of its rows cannot be measured. speed: tokens per second of earlier runs
    of such a step, None where there were none. at: where its missing rows stand in `lengths`. answers: tokens of a sampled answer, on average
    over those that are there; None: as many as may be.
    """
    if step.reads in FORWARD and not any(task.measurement.prompt_only for task in step.tasks):
        lost = at[~lengths.measurable[at]]
        known = int(lengths.counted[lost].sum())
        step = replace(step, unmeasurable=known, perhaps_unmeasurable=len(lost) - known)
        at = at[lengths.measurable[at]]
    whole = lengths.whole[at]
    if step.reads == "sample":
        sampling = loaded.recipe.sampling
        prompts = sum(len(rows) * len({t.measurement.perturbed for t in tasks}) for _, rows, tasks in step.blocks)
        prompts -= step.graded  # as if a row had one perturbation
        each = sampling.max_new_tokens if answers is None else min(answers, sampling.max_new_tokens)
        asked = (
            0 if step.is_served else lengths.prompt[at].mean() * prompts
        )  # a server counts its prompts' tokens itself
        run = asked + step.draws * each
    elif step.reads == "neighbours":
        limit = loaded.recipe.tokens.max_length
        run = np.minimum((1 + COUNT) * whole, np.inf if limit is None else limit).sum()
    elif step.reads == "direction":
        directions = [task.measurement.direction for task in step.tasks if task.measurement.direction]
        runs = sum(1 if d.of == "head" else 2 for d in directions if not d.cosine)
        runs += 3 * len({d.step for d in directions if d.cosine})  # a backward for all cosines of one P
        run = whole.sum() * runs
    else:
        run = whole.sum()
    tokens = round(float(run + lengths.whole.mean() * step.ahead))
    rough = speed is None
    speed = speed or _guess(step)
    return replace(step, tokens=tokens, seconds=tokens / speed if speed else None, rough=rough, at_most=answers is None)


def weights_size(checkpoint: Checkpoint) -> int:
    """Bytes of a checkpoint's weights, an adapter's base among them; 0 for a server's model."""
    folders = [Path(place) for place in (checkpoint.home, checkpoint.base) if place]
    return sum(f.stat().st_size for p in folders for kind in ("*.safetensors", "*.bin") for f in p.glob(kind))


def _guess(step: Step) -> float | None:
    """Tokens per second before anything ran here: 2 operations a parameter (a backward pass 6), 40 GFLOP/s a core or 200 TFLOP/s a GPU."""
    if step.reads == "tokens":
        return 3e5
    size = weights_size(step.checkpoint)
    if not size:
        return None
    engine = step.tasks[0].measured.engine
    flops = 2e14 if "cuda" in engine else 4e10 * cores()
    guess = flops / (2 * size / (2 if "16" in engine else 4))
    return min(guess / {"sample": 3, "backward": 3}.get(step.reads, 1), 1e5 if flops > 1e12 else 2e4)


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class AnswerTokens:
    """How long the answers are that a step's settings have drawn so far; the store is asked once for all steps of a plan."""

    def __init__(self, store: Store):
        self.measured = store.measured(reads="sample")
        self.lengths = store.answer_lengths() if self.measured else {}

    def mean(self, step: Step) -> float | None:
        """From its own model, else from any; None where there are none."""
        alike = [
            m
            for m in self.measured
            if any(
                _lengths_alike(m.params, task.measured.params)
                for task in step.tasks
                if m.measurement == task.measurement.name
            )
        ]
        own = [m for m in alike if m.model_fingerprint == step.tasks[0].measured.model_fingerprint]
        for records in (own, alike):
            counted = [self.lengths[m.fingerprint] for m in records if m.fingerprint in self.lengths]
            if counted:
                return sum(tokens for _, tokens in counted) / sum(n for n, _ in counted)
        return None


def _lengths_alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    keys = ("max_new_tokens", "temperature", "system", "few_shot")
    return all(one.get(key) == other.get(key) for key in keys) and list(one.get("stop") or ()) == list(
        other.get("stop") or ()
    )
