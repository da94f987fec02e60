"""Where a row stands: percentiles against a plain count, with as many queries for twenty scores as for two."""

from __future__ import annotations

import json

import pytest
import yaml

import curate
from curate.report.explain import explain_row
from tests.tiny_models import make_llama


@pytest.fixture
def line(tmp_path):
    """line(scores) -> the store of a run over nine pairs, one of which cannot be measured."""
    make_llama(tmp_path / "model", seed=0)
    texts = [f"{i} + 1 =" for i in range(8)] + ["a" * 200]
    rows = [{"prompt": text, "chosen": f" {i + 1}", "rejected": f" {i * 7}?"} for i, text in enumerate(texts)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def line(scores):
        raw = {"kind": "preference", "source": "pairs.jsonl", "models": {"reference": "model"}, "scores": scores}
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**raw, "tokens": {"max_length": 64}}))
        return curate.run(tmp_path / "recipe.yaml").store

    return line


def test_percentiles_are_counted_in_one_query(line, monkeypatch):
    few = ["ranking_gap", {"flip_loss": {"as": "weak", "beta": 0.1}}]
    many = [*few, *({"flip_loss": {"as": f"f{i}", "beta": 0.1 + i}} for i in range(18))]
    asked = []
    sql = curate.Store.sql

    def counted(store, text, *args, **kwargs):
        asked.append(text)
        return sql(store, text, *args, **kwargs)

    queries = []
    for scores in (few, many):
        store = line(scores)
        frame = store.sql("SELECT * FROM scored WHERE prompt < 'a' ORDER BY row_id")
        for row in frame.to_dicts():
            with monkeypatch.context() as patched:
                patched.setattr(curate.Store, "sql", counted)
                told = explain_row(store, row["row_id"]).scores
            queries.append(len(asked))
            asked.clear()
            for score in told:
                column = frame[score["name"]]
                assert score["value"] == row[score["name"]]
                assert score["percentile"] == round(100 * int((column <= row[score["name"]]).sum()) / 8, 1)
    assert len(told) == 20 and len(set(queries)) == 1
    long = store.sql("SELECT row_id FROM scored WHERE ranking_gap IS NULL").item()
    assert {score["percentile"] for score in explain_row(store, long).scores} == {None}
