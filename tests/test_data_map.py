"""The data map's picture against values worked out by hand: where a row's point is, its colour's group, and what is left out."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import numpy as np
import polars as pl
import pytest

import curate
from curate.cli import main
from curate.errors import UsageError
from curate.report.data_map import HEIGHT, LARGEST, WIDTH, DataMap, data_maps, svg, write_maps
from curate.store.importing.importing import import_file

SVG = "{http://www.w3.org/2000/svg}"
MAP = {"row": "id", "run": "run", "checkpoint": "step", "nll": "nll", "trained": "trained"}
# p at two checkpoints -> (variability, confidence, region with share 1/3 of the six rows trained on)
ROWS = {
    "0": ((0.1, 0.9), (0.4, 0.5, "ambiguous")),
    "1": ((0.2, 0.8), (0.3, 0.5, "ambiguous")),
    "2": ((0.9, 0.9), (0.0, 0.9, "easy")),
    "3": ((0.8, 0.9), (0.05, 0.85, "easy")),
    "4": ((0.1, 0.1), (0.0, 0.1, "hard")),
    "5": ((0.2, 0.3), (0.05, 0.25, "hard")),
    "6": ((0.0001, 0.9999), None),  # not trained on
    "7": ((0.5, None), None),  # a checkpoint is unmeasured
}


def points(panel) -> dict[str, tuple[float, float, str]]:
    """row id -> (variability, confidence, region), read off the picture."""
    found = {}
    for group in panel.iter(f"{SVG}g"):
        for circle in group.findall(f"{SVG}circle") if group.get("class") else ():
            x, y = float(circle.get("cx")), float(circle.get("cy"))
            found[circle.find(f"{SVG}title").text] = (x / WIDTH * LARGEST, 1 - y / HEIGHT, group.get("class"))
    return found


def test_every_row_is_where_its_probabilities_put_it(tmp_path, monkeypatch, capsys):
    lines = [
        {
            "id": row,
            "run": run,
            "step": step,
            "nll": None if p is None else -math.log(p),
            "acc": 1.0,
            "trained": row != "6",
        }
        for run in ("first", "second <run>")
        for row, (of_row, _) in ROWS.items()
        for step, p in zip((10, 20), of_row if run == "first" else of_row[::-1], strict=True)
    ]
    pl.DataFrame(lines).write_parquet(tmp_path / "logs.parquet")
    import_file(
        tmp_path / "other",
        tmp_path / "logs.parquet",
        {"accuracy": "acc", **{k: v for k, v in MAP.items() if k != "nll"}},
    )
    with pytest.raises(UsageError, match="no data map to draw: it needs the column target_nll at two checkpoints"):
        data_maps(curate.Store(tmp_path / "other"))
    import_file(tmp_path / "store", tmp_path / "logs.parquet", MAP)
    command = ["curate", "summary", str(tmp_path / "store"), "--data-map", str(tmp_path / "map.svg")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit, match="0"):
        main()
    assert "The data map is in" in capsys.readouterr().err
    picture = ET.parse(tmp_path / "map.svg").getroot()
    panels = [p for p in picture.findall(f"{SVG}g") if p.get("transform")]
    assert [panel.find(f"{SVG}text").text for panel in panels] == ["first", "second <run>"]
    keys = dict(curate.Store(tmp_path / "store").sql("SELECT row_id, key FROM occurrences").rows())
    for panel in panels:
        found = {keys[row_id]: at for row_id, at in points(panel).items()}
        assert found.keys() == {row for row, (_, at) in ROWS.items() if at}
        for row, (x, y, region) in found.items():
            assert (x, y) == pytest.approx(ROWS[row][1][:2], abs=2e-4) and region == ROWS[row][1][2]
        legend = [t.text for t in panel.findall(f"{SVG}text")]
        assert {"6 rows over 2 checkpoints", "hard 33%", "ambiguous 33%", "easy 33%"} <= set(legend)
    with pytest.raises(UsageError, match="--data-map .* cannot be written"):
        write_maps(data_maps(curate.Store(tmp_path / "store")), tmp_path / "nowhere" / "map.svg")


def test_of_many_rows_a_sample_by_id_is_drawn():
    """The shares in the legend are of all rows all the same."""
    rng = np.random.default_rng(0)
    ids = [f"{i:05d}" for i in rng.permutation(1000)]
    region = np.array([2.0] * 100 + [0.0] * 900)
    one = DataMap("r", 3, ids, rng.random(1000) / 2, rng.random(1000), region)
    panel = ET.fromstring(svg([one], points=50))
    drawn = points(panel)
    assert sorted(drawn) == sorted(ids)[:50]
    at = {row_id: i for i, row_id in enumerate(ids)}
    assert all((region[at[row_id]] == 2) == (where[2] == "easy") for row_id, where in drawn.items())
    texts = [t.text for t in panel.iter(f"{SVG}text")]
    assert "1,000 rows over 3 checkpoints, 50 drawn" in texts and {"hard 90%", "easy 10%"} <= set(texts)
