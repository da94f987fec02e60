"""What an export makes of the user's columns and weights: nothing is lost, renamed or trained on wrongly without a word."""

from __future__ import annotations

import json

import polars as pl
import pytest

import curate
from curate.errors import UsageError, ValidationError
from tests.workflow.pairs import pairs, write_rows


def weighted(tmp_path, weights):
    return write_rows(
        tmp_path / "pairs.jsonl", [r | {"w": w} for r, w in zip(pairs(len(weights)), weights, strict=True)]
    )


WRONG = [
    # (weights of six rows, what is said)
    ([1, 2, -1.5, None, 1, -3], r"'w' cannot weight 3 of the 6 kept rows: below 0 in 2 \(pairs.jsonl, row 3: -1.5, pairs.jsonl, row 6: -3\); "
     r"unknown in 1 \(pairs.jsonl, row 4\).*select.where: '\"w\" IS NOT NULL AND \"w\" >= 0'"),
    ([None] * 5 + [1.0], r"unknown in 5 \(pairs.jsonl, row 1, pairs.jsonl, row 2, pairs.jsonl, row 3, …\)"),
    ([0, 0, 0.0, 0, 0, 0], "'w' is 0 in all 6 kept rows"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("weights", "said", "resample"),
    [(*wrong, None) for wrong in WRONG] + [(*WRONG[0], 4)],
    ids=["bad", "unknown", "zero", "drawn"],
)
def test_weights_that_no_trainer_can_use_are_refused(recipe, tmp_path, weights, said, resample):
    weighted(tmp_path, weights)
    asked = {"to": "out", "weight": "w", "resample": resample}
    with pytest.raises(ValidationError, match=said):
        curate.run(recipe(scores=["edit_distance"], select={}, export=asked))
    assert not (tmp_path / "out").exists()


def test_infinite_weights_and_text_are_refused(recipe, tmp_path):
    rows = [json.dumps(r | {"w": 1.0}) for r in pairs(3)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows).replace('"w": 1.0', '"w": 1e999', 1) + "\n")
    path = recipe(scores=["edit_distance"], select={}, export={"to": "out", "weight": "w"})
    with pytest.raises(ValidationError, match="(unknown|infinite) in 1 .pairs.jsonl, row 1"):
        curate.run(path)
    weighted(tmp_path, ["1", "2", "3"])
    with pytest.raises(UsageError, match="the column 'w' holds text, expected numbers"):
        curate.run(path)


def test_rows_with_bad_weights_can_be_left_out(recipe, tmp_path):
    weighted(tmp_path, [1, 2, -1.5, None, 0, 3])
    curate.run(
        recipe(
            scores=["edit_distance"],
            select={"where": '"w" IS NOT NULL AND "w" >= 0'},
            export={"to": "out", "weight": "w"},
        )
    )
    assert sorted(pl.read_parquet(tmp_path / "out/data/*.parquet")["weight"]) == [0, 1, 2, 3]


def test_a_weight_belongs_to_its_occurrence(recipe, tmp_path):
    """A row that stands twice in the source, each time with another weight, is exported as it stands there."""
    first, second = pairs(2)
    write_rows(tmp_path / "pairs.jsonl", [first | {"w": 1.0}, second | {"w": 2.0}, first | {"w": 3.0}])
    asked = {"to": "out", "weight": "w", "columns": ["w"]}
    curate.run(recipe(scores=["edit_distance"], select={"duplicates": "as_found"}, export=asked))
    rows = pl.read_parquet(tmp_path / "out/data/*.parquet").select("prompt", "weight", "w").rows()
    assert sorted(rows) == sorted([(first["prompt"], 1, 1), (second["prompt"], 2, 2), (first["prompt"], 3, 3)])


def test_users_columns_keep_their_names_unless_ours_are_asked_for(recipe, tmp_path):
    """`weight` and `reason` are ours only where the export has them; a score that is asked for does not write over a column of its name."""
    own = {"weight": "heavy", "reason": "mine", "score": 7, "source": "wiki", "kind": "k", "index": 5, "step": 1, "id": "007",
           "rank": 2, "run": "r", "edit_distance": -1.0, "chosen_logp": "text"}  # fmt: skip
    write_rows(tmp_path / "pairs.jsonl", [r | own for r in pairs(4)])
    path = recipe(scores=["edit_distance"], select={"keep": {"rows": 2}}, export={"to": "out"})
    result = curate.run(path)
    kept = pl.read_parquet(tmp_path / "out/data/*.parquet")
    assert kept.select(list(own)).unique().to_dicts() == [own] and result.exported.renamed == {
        "reason": "source_reason"
    }
    left = pl.read_parquet(tmp_path / "out/dropped/*.parquet")
    assert left["source_reason"].unique().to_list() == ["mine"] and "keep" in left["reason"][0]
    asked = {"to": "out", "columns": "scores", "weight": "edit_distance"}
    result = curate.run(recipe(scores=["edit_distance"], select={"keep": {"rows": 2}}, export=asked))
    kept = pl.read_parquet(tmp_path / "out/data/*.parquet")
    assert kept["source_edit_distance"].to_list() == [-1.0] * 2 and kept["source_weight"].to_list() == ["heavy"] * 2
    assert (kept["edit_distance"] > 0).all() and kept["weight"].to_list() == kept["edit_distance"].to_list()
    assert any("`edit_distance` is called `source_edit_distance`" in note for note in result.exported.notes)


def test_bytes_that_are_not_kept_are_said_even_quietly(recipe, tmp_path, capsys):
    """An image's column says only how many bytes there were: in the card, and on stderr whatever --quiet says."""
    rows = [r | {"picture": {"bytes": b"0123", "path": None}, "id": "007"} for r in pairs(4)]
    pl.DataFrame(rows).write_parquet(tmp_path / "pairs.parquet")
    path = recipe(source="pairs.parquet", scores=["edit_distance"], select={}, export={"to": "out"})
    result = curate.run(path)
    assert (
        "`picture` held bytes" in capsys.readouterr().err
        and "`picture` held bytes" in (tmp_path / "out/README.md").read_text()
    )
    assert (
        len(result.exported.warnings) == 1
        and pl.read_parquet(tmp_path / "out/data/*.parquet")["id"].to_list() == ["007"] * 4
    )


def test_a_card_of_a_persons_own_stays_over_a_second_export(recipe, tmp_path):
    """The case of huggingface_hub#797: `no` and `1.10` are text to whoever wrote them."""
    path = recipe(scores=["edit_distance"], select={}, export={"to": "out"})
    curate.run(path)
    card = tmp_path / "out" / "README.md"
    mine = "language:\n- no\n- nn\nversion: 1.10  # mine\nannotations_creators: [on]\n"
    card.write_text(card.read_text().replace("---\n", f"---\n{mine}", 1))
    before = card.read_text()
    curate.run(path)
    assert card.read_text() == before


@pytest.mark.parametrize("name", ["value", "rank"])
def test_a_weight_may_be_called_as_a_column_of_selections(recipe, tmp_path, name):
    write_rows(tmp_path / "pairs.jsonl", [r | {name: i + 1} for i, r in enumerate(pairs(3))])
    curate.run(recipe(scores=["edit_distance"], select={}, export={"to": "out", "weight": name}))
    assert sorted(pl.read_parquet(tmp_path / "out/data/*.parquet")["weight"]) == [1, 2, 3]


def test_infinite_weights_of_a_score_name_a_way_out_that_works(recipe, tmp_path):
    weighted(tmp_path, [1, 1, 1])
    (tmp_path / "boundless.py").write_text(
        "from curate import score\n\n@score(needs=('chosen_tokens',))\ndef heavy(chosen_tokens):\n"
        "    return [float('inf')] + [1.0] * (len(chosen_tokens) - 1)\n"
    )
    asked = {"to": "out", "weight": "heavy"}
    with pytest.raises(ValidationError, match="(unknown|infinite) in 1 .pairs.jsonl, row 1") as refused:
        curate.run(recipe(scores=["boundless:heavy"], select={}, export=asked))
    hint = str(refused.value).split("select.where: '")[1].split("', or name")[0]
    curate.run(recipe(scores=["boundless:heavy"], select={"where": hint}, export=asked))
    assert list(pl.read_parquet(tmp_path / "out/data/*.parquet")["weight"]) == [1.0, 1.0]


def test_types_of_a_typed_source_come_back(recipe, tmp_path):
    """Times with their unit and zone, dates, small integers, lists and mappings; a csv's or jsonl's text stays text."""
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    zoned = datetime.datetime(2026, 3, 1, 12, 30, 0, 250_000, tzinfo=datetime.UTC)
    columns = {
        "at": pa.array([zoned, None, zoned], pa.timestamp("ms", tz="Europe/Oslo")),
        "naive": pa.array([1, 2, 3], pa.timestamp("ns")),
        "day": pa.array([zoned.date()] * 3, pa.date32()),
        "small": pa.array([1, 2, None], pa.int16()),
        "seen": pa.array([[zoned], [], None], pa.list_(pa.timestamp("us", tz="UTC"))),
        "view": pa.array([[zoned.date()], [], None], pa.list_(pa.date32())),
        "meta": pa.array([{"n": 1, "on": zoned.date()}] * 3, pa.struct([("n", pa.int8()), ("on", pa.date32())])),
    }
    texts = {name: [r[name] for r in pairs(3)] for name in ("prompt", "chosen", "rejected")}
    given = pa.table(texts | columns)
    pq.write_table(given, tmp_path / "pairs.parquet")
    curate.run(recipe(scores=["edit_distance"], select={}, export={"to": "out"}, source={"path": "pairs.parquet"}))
    found = pq.read_table(tmp_path / "out/data/train-00000.parquet")
    for name in columns:
        assert (name, found.schema.field(name).type) == (name, given.schema.field(name).type)
        assert found[name].cast(given.schema.field(name).type).equals(given[name]), name
    write_rows(tmp_path / "pairs.jsonl", [r | {"at": "2026-03-01T12:30:00"} for r in pairs(3)])
    curate.run(recipe(scores=["edit_distance"], select={}, export={"to": "text"}))
    assert pq.read_schema(tmp_path / "text/data/train-00000.parquet").field("at").type == pa.string()
