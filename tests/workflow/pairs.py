"""Small preference pairs, and what was scored on them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl

WORDS = ["ada", "bea", "cy", "dot", "eve", "fay", "gil", "hal", "ivy", "jo", "kit", "lea"]


def pairs(n: int, *, start: int = 0) -> list[dict]:
    rng = np.random.default_rng(7)
    words = [" ".join(rng.choice(WORDS, 1 + i % 5)) for i in range(3 * (start + n))]
    return [
        {
            "prompt": f"{words[3 * i]} {i}:",
            "chosen": f" {words[3 * i + 1]}.",
            "rejected": f" {words[3 * i + 2]}!",
            "topic": "ab"[i % 2],
        }
        for i in range(start, start + n)
    ]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scored(
    store, columns="row_id, ranking_gap, flip_loss, ches, ches_ln, edit_distance, chosen_logp, rejected_logp"
) -> pl.DataFrame:
    return store.sql(f"SELECT {columns} FROM scored ORDER BY row_id")
