"""The data map as a picture: confidence over variability, a point a row, coloured by region, a panel a run. SVG, written by hand.

`curate summary STORE --data-map FILE.svg` draws it. Regions are those of the score `map_region` (scores/cartography.py), with the recipe's `share`,
over the rows that the run trained on. A point names its row: `curate explain STORE ROW` tells more.
Source: Swayamdipta et al. 2020, arXiv:2009.10795, figure 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

import numpy as np

from curate.errors import UsageError
from curate.report.summary import setting
from curate.scores import SCORES
from curate.scores.cartography import NAMES, regions
from curate.scores.trajectories import confidence, of_training, variability
from curate.store.runs import stored_runs

if TYPE_CHECKING:
    from curate.store import Store

Array = np.ndarray[Any, np.dtype[np.float64]]

POINTS = 5_000  # drawn in all
WIDTH, HEIGHT = 340, 280  # of a panel's axes
LEFT, TOP, GAP = 60, 70, 100
ACROSS = 3  # panels in a line
COLOURS = {"hard": "#0072b2", "ambiguous": "#000000", "easy": "#e69f00"}  # told apart by colour-blind readers too
LARGEST = 0.5  # variability of a row that goes from 0 to 1 half of the time


@dataclass(frozen=True)
class DataMap:
    """One run's rows: (rows,) each, NaN in all three where a checkpoint is unmeasured. region: codes into NAMES."""

    run: str
    checkpoints: int
    row_ids: list[str]
    variability: Array
    confidence: Array
    region: Array


def data_maps(store: Store, *, recipe: str | None = None) -> list[DataMap]:
    """The map of every run with target_nll at two checkpoints of the training or more, by name; step 0, the untrained model, is none of them.

    recipe: as of `summarise`. UsageError where there is none.
    """
    mine = next((r for r in store.recipes() if recipe in (None, r["name"])), None)
    share = setting(mine, "share", of="map_region") or SCORES["map_region"].defaults["share"]
    sources = mine["sources"] or None if mine else None
    maps = []
    for run in stored_runs(store, ("target_nll",), kind="sft", recipe=mine, optional=("trained",), sources=sources):
        nll = run.values["target_nll"]
        if "trained" in run.values:
            nll = np.where(run.values["trained"] != 0, nll, np.nan)
        nll = of_training(nll, np.array([step != 0 for step in run.steps]))
        if nll.shape[1] > 1:
            coordinates = variability(nll), confidence(nll), regions(nll, share)
            maps.append(DataMap(run.run, nll.shape[1], run.row_ids, *coordinates))
    if not maps:
        raise UsageError(
            f"{store.folder}: there is no data map to draw: it needs the column target_nll at two checkpoints of a run or more, "
            "not counting step 0, the untrained model. "
            "The scores map_region, confidence and variability have it measured over models.checkpoints."
        )
    return maps


def write_maps(maps: Sequence[DataMap], file: Path) -> None:
    """The picture into a file. UsageError where it cannot be written."""
    try:
        file.write_text(svg(maps), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--data-map {file}: cannot be written ({error.strerror}).") from None


def svg(maps: Sequence[DataMap], *, points: int = POINTS) -> str:
    """The maps side by side. Of more rows than `points` in all, those of the lowest ids are drawn: ids are hashes, so that is a sample."""
    across = min(len(maps), ACROSS)
    width = LEFT + across * (WIDTH + GAP) - GAP + 30
    height = -(-len(maps) // ACROSS) * (TOP + HEIGHT + 50)
    panels = []
    for i, one in enumerate(maps):
        x, y = LEFT + i % ACROSS * (WIDTH + GAP), TOP + i // ACROSS * (TOP + HEIGHT + 50)
        panels.append(f'<g transform="translate({x},{y})">\n{_panel(one, max(points // len(maps), 1))}\n</g>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n' + "\n".join(panels) + "\n</svg>\n"
    )


def _panel(one: DataMap, points: int) -> str:
    known = np.flatnonzero(~np.isnan(one.region))
    drawn = sorted(known.tolist(), key=lambda at: one.row_ids[at])[:points]
    some = "" if len(drawn) == len(known) else f", {len(drawn):,} drawn"
    about = f"{len(known):,} rows over {one.checkpoints} checkpoints{some}"
    lines = [
        f'<text y="-50" font-size="13">{escape(one.run or "run")}</text>',
        f'<text y="-34">{about}</text>',
        *_axes(),
    ]
    for code, name in enumerate(NAMES):
        here = [at for at in drawn if one.region[at] == code]
        share = float((one.region[known] == code).mean()) if len(known) else 0.0
        x = code * WIDTH / len(NAMES)
        lines.append(f'<circle cx="{x + 4:.0f}" cy="-14" r="4" fill="{COLOURS[name]}"/>')
        lines.append(f'<text x="{x + 13:.0f}" y="-10">{name} {share:.0%}</text>')
        lines.append(f'<g class="{name}" fill="{COLOURS[name]}" fill-opacity="0.5">')
        for at in here:
            cx, cy = one.variability[at] / LARGEST * WIDTH, (1 - one.confidence[at]) * HEIGHT
            lines.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="2"><title>{escape(one.row_ids[at])}</title></circle>')
        lines.append("</g>")
    return "\n".join(lines)


def _axes() -> list[str]:
    lines = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#888"/>']
    for tick in range(6):
        x, y = tick / 5 * WIDTH, HEIGHT - tick / 5 * HEIGHT
        lines.append(f'<text x="{x:.0f}" y="{HEIGHT + 14}" text-anchor="middle">{tick / 5 * LARGEST:.1f}</text>')
        lines.append(f'<text x="-6" y="{y + 4:.0f}" text-anchor="end">{tick / 5:.1f}</text>')
    middle = f'text-anchor="middle" x="{WIDTH // 2}" y="{HEIGHT + 30}"'
    lines.append(f"<text {middle}>variability of the target's probability over checkpoints</text>")
    lines.append(f'<text text-anchor="middle" transform="translate(-34,{HEIGHT // 2}) rotate(-90)">confidence</text>')
    return lines
