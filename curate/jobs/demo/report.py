"""What `curate demo` prints at the end: three tables in a newcomer's words, and commands to try next."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from typing import Any

from curate.console import span, table

ARMS = {"all": "all pairs", "selected": "selected: ches_ln's worst 10% dropped", "random": "as many, dropped at random"}


def report(result: dict[str, Any]) -> str:
    """The text of a demo's result (`DemoResult.to_json`)."""
    return "\n\n".join([_checkpoints(result), _cells(result), _pairs(result), _next(result)])


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _checkpoints(result: dict[str, Any]) -> str:
    rows = [
        (line["checkpoint"], _share(line["train"]), _share(line["premem"]), _share(line["test"]), _share(line["nll"]))
        for line in result["checkpoints"]
    ]
    r2 = result["r2"]
    return "\n".join(
        [
            f"Fine-tuning, checkpoint by checkpoint (answers sampled by {result['engine']})",
            "",
            table(
                rows, head=("checkpoint", "train accuracy", "pre-memorization accuracy", "test accuracy", "target NLL")
            ),
            "",
            "Train accuracy counts what is merely recited. Pre-memorization accuracy looks at the same training rows, but only counts an answer",
            "given before the model had memorised that row's solution: it tells from the training run alone how well the model does on new problems.",
            f"How well each predicts test accuracy (R², 1 is exact): pre-memorization accuracy {r2['premem']:.2f}, train accuracy {r2['train']:.2f}.",
        ]
    )


def _cells(result: dict[str, Any]) -> str:
    rows = [
        (line["cell"], _share(line["train"]), _share(line["premem"]), _share(line["test"])) for line in result["cells"]
    ]
    return "\n".join(
        [
            "At the last checkpoint, by kind of problem",
            "",
            table(rows, head=("cell", "train accuracy", "pre-memorization accuracy", "test accuracy")),
            "",
            f"{result['hard_rows']} training rows were answered right only once memorised, or not at all.",
            f"They are in {result['folder']}/hard: rows like these are what to collect more of.",
        ]
    )


def _pairs(result: dict[str, Any]) -> str:
    before = result["checkpoints"][-1]["test"]
    rows: list[tuple[Any, ...]] = [("before DPO", "-", "-", "-", "-", _share(before))]
    rows += [
        (
            ARMS[line["arm"]],
            line["pairs"],
            f"{line['chosen']:+.1f}",
            f"{line['rejected']:+.1f}",
            f"{line['displaced']:.0%}",
            _share(line["test"]),
        )
        for line in result["pairs"]
    ]
    return "\n".join(
        [
            f"DPO on pairs of a right and a wrong answer ({result['n_pairs']} pairs, {result['kept_pairs']} of them selected)",
            "",
            table(rows, head=("trained on", "pairs", "chosen", "rejected", "chosen fell", "test accuracy")),
            "",
            "chosen, rejected: mean change of the answers' log-probability over all pairs, in nats; chosen fell: in how many pairs the right answer",
            "became less likely although the margin was trained to grow (likelihood displacement). One seed of a tiny model, whose test accuracy is",
            "uncertain by about 0.04: judge a filter only from many seeds, and against the random line.",
        ]
    )


def _next(result: dict[str, Any]) -> str:
    folder = result["folder"]
    at, curate = shlex.quote(str(folder)), _command()
    commands = [
        (f"{curate} summary {at}/store --recipe sft", "every dataset-level value with its interval"),
        (
            f'{curate} sql {at}/store --recipe pool "SELECT prompt, text, correct FROM samples JOIN rows USING (row_id) LIMIT 9"',
            "what the model answers",
        ),
        (f"{curate} run {at}/sft.yaml --set select.keep.rows=50", "only the 50 hardest: nothing is measured again"),
        (f"{curate} run {at}/preference.yaml --set select.drop_worst='{{flip_loss: 0.2}}'", "another score decides"),
        (f"{curate} scores", "what else there is to measure"),
        (f"{curate} init sft my.yaml", "a recipe for your own data"),
    ]
    lines = [line for command, what in commands for line in (f"  {command}", f"      {what}")]
    exports = f"Curated datasets: {folder}/hard, {folder}/pairs. All of it took {span(result['seconds'])}."
    return "\n".join([exports, "", "What to try next", *lines])


def _command() -> str:
    """How this command is called here: by its name where the shell finds it, else by its path (`make demo` leaves it in .venv)."""
    if shutil.which("curate") or not sys.argv[0].endswith("curate"):
        return "curate"
    return shlex.quote(os.path.relpath(sys.argv[0]))
