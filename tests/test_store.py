"""The store: rows and occurrences, measurements, every view, NULL for the unknown."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import duckdb
import numpy as np
import pytest

from curate.errors import StoreError, UsageError
from curate.rows import Example, Pair
from curate.store import DatasetValue, Measured, Store, database, shards


def record(index, row, **columns):
    return SimpleNamespace(index=index, row=row, columns=columns)


A, B, C = Pair("2+2?", "4", "5"), Pair("3+3?", "6", "7"), Pair("1+1?", "2", "3")
LIKELIHOOD = Measured(
    "f-ref", "likelihood", "forward", "models/base", "w0", "", "base", None, "torch", {"max_length": 8}
)
LENGTH = Measured("f-len", "length", "tokens")


def step(n, fingerprint=None, measurement="accuracy"):
    return Measured(
        fingerprint or f"f-{measurement}-{n}",
        measurement,
        "sample",
        "m",
        f"w{n}",
        "sft",
        f"checkpoint-{n}",
        n,
        "vllm",
        {},
    )


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store", create=True)
    store.add_source(
        "a.jsonl",
        "1",
        [record(0, A, topic="sum", votes=3), record(1, B, topic=None, votes=4.5), record(2, None), record(3, A)],
    )
    store.add_source("b.jsonl", "1", [record(0, C, topic="x", Source="web"), record(1, A, ID=7)])
    return store


def ids(*rows):
    return [row.row_id for row in rows]


def test_rows_are_kept_once_and_occurrences_all(store):
    assert store.row_ids_of() == ids(A, B, C)
    assert store.row_ids_of(["b.jsonl"]) == ids(A, C)
    assert list(store.iter_rows(ids(C, A, C), batch=2)) == [C, A, C]
    assert store.occurrence_counts(ids(A, B, C)).tolist() == [3, 1, 1]
    assert store.occurrence_counts(ids(A, B, C), ["a.jsonl"]).tolist() == [2, 1, 0]
    assert store.positions([*ids(C, A), "unknown"]).tolist() == [2, 0, -1]
    with pytest.raises(StoreError, match="no row 00000000000000000000"):
        list(store.iter_rows(["0" * 20]))


def test_a_source_is_replaced_and_positions_stay(store):
    assert store.source_is_current("a.jsonl", "1")
    assert not store.source_is_current("a.jsonl", "2")
    found = store.add_source("a.jsonl", "2", [record(0, B), record(1, Pair("new", "y", "n")), record(2, B)])
    assert (found.records, found.new_rows, found.duplicates, found.bad) == (3, 1, 1, 0)
    assert store.source_is_current("a.jsonl", "2")
    assert store.sql("SELECT source, index FROM occurrences ORDER BY ALL").rows() == [
        ("a.jsonl", 0), ("a.jsonl", 1), ("a.jsonl", 2), ("b.jsonl", 0), ("b.jsonl", 1),
    ]  # fmt: skip
    assert store.positions(ids(A, B, C)).tolist() == [0, 1, 2]
    assert store.missing("anything", ["a.jsonl"])[0] == (1, B.row_id)


def test_a_failing_source_changes_nothing(store):
    def broken():
        yield record(0, Pair("q", "y", "n"))
        raise OSError("the file went away")

    with pytest.raises(OSError, match="went away"):
        store.add_source("a.jsonl", "2", broken())
    assert store.source_is_current("a.jsonl", "1")
    assert store.row_ids_of(["a.jsonl"]) == ids(A, B)
    assert list((store.folder / "staging").iterdir()) == []


def test_every_kind_of_text_comes_back(store):
    talk = ({"role": "user", "content": "hi ü"},)
    rows = [
        Pair(talk, ({"role": "assistant", "content": "a\n"},), ({"role": "assistant", "content": ""},)),
        Example("q", "c", "4"),
        Example("q", None, "4"),
        Example("q", "c", None, False),
        Example(talk, ({"role": "assistant", "content": "x"},)),
        Example("with \x00 and '\" ", "c"),
    ]
    store.add_source("kinds", "1", [record(i, row) for i, row in enumerate(rows)])
    assert list(store.iter_rows(ids(*rows))) == rows
    assert [row.row_id for row in store.iter_rows(ids(*rows))] == ids(*rows)
    assert store.row_ids_of(["kinds"], kind="preference") == ids(rows[0])
    store.add_source("broken", "1", [record(0, Example("half \ud83d a pair", "c"))])  # cannot be UTF-8
    assert next(store.iter_rows(store.row_ids_of(["broken"]))).prompt == "half \ufffd a pair"


def test_the_users_columns_are_typed(store):
    frame = store.sql("SELECT * FROM occurrences ORDER BY source, index")
    assert frame.columns == ["row_id", "source", "index", "role", "topic", "user_Source", "votes", "ID"]
    assert frame["votes"].to_list() == [3.0, 4.5, None, None, None]
    assert frame["ID"].to_list() == [None, None, None, None, 7]
    assert frame["user_Source"].to_list() == [None, None, None, "web", None]
    store.add_source(
        "c", "1", [record(0, B, nan=float("nan"), deep=[float("inf"), 1], flag=True, big=2**70, **{"a/b": 1})]
    )
    line = store.sql("SELECT nan, deep, flag, big, \"a/b\" FROM occurrences WHERE source = 'c'").row(0)
    assert line == (None, [None, 1.0], True, str(2**70), 1)


def test_held_out_rows_are_told_apart(store):
    store.add_source("held.jsonl", "1", [record(0, B), record(1, Pair("only", "held", "out"))], role="heldout")
    roles = dict(store.sql("SELECT prompt, role FROM scored").rows())
    assert roles == {"2+2?": "train", "3+3?": "train", "1+1?": "train", "only": "heldout"}
    assert len(store.row_ids_of(role="heldout")) == 2


def test_missing_shrinks_as_shards_are_ingested(store):
    assert [p for p, _ in store.missing("f-ref")] == [0, 1, 2]
    store.write_shard(LIKELIHOOD, 0, ids(A, C), {"chosen_logp": [-1.0, float("nan")], "rejected_logp": [-np.inf, -2.0]})
    assert [p for p, _ in store.missing("f-ref")] == [0, 1, 2]
    assert store.ingest() == 1
    assert store.ingest() == 0
    assert store.missing("f-ref") == [(1, B.row_id)]  # an unknown value is measured too
    assert store.missing("f-ref", ["b.jsonl"]) == []
    assert store.missing("f-ref", row_ids=ids(A)) == []
    found = store.columns("f-ref", ["chosen_logp", "rejected_logp"], ids(C, B, A))
    np.testing.assert_array_equal(found["chosen_logp"], [np.nan, np.nan, -1.0])
    np.testing.assert_array_equal(found["rejected_logp"], [-2.0, np.nan, np.nan])
    unknown = "SELECT count(*) FROM data.m_likelihood WHERE isnan(chosen_logp) OR isinf(rejected_logp)"
    assert store.sql(unknown).item() == 0
    with pytest.raises(UsageError, match="did you mean chosen_logp"):
        store.columns("f-ref", ["chosen_lgp"], ids(A))


def test_a_repeated_shard_counts_once_and_a_new_column_widens(store):
    for value in (-1.0, -3.0):
        store.write_shard(LIKELIHOOD, 0, ids(A, B), {"chosen_logp": [value, value]})
        store.ingest()
    store.write_shard(LIKELIHOOD, 0, ids(A), {"chosen_logp": [-5.0]})
    store.write_shard(LIKELIHOOD, 1, ids(A), {"chosen_logp": [-5.0], "note": ["cut"], "fine": [True]})
    store.ingest()
    assert store.sql("SELECT chosen_logp, note, fine FROM data.m_likelihood ORDER BY 1").rows() == [
        (-5.0, "cut", True),
        (-3.0, None, None),
    ]
    assert store.texts("f-ref", "note", ids(B, A)) == [None, "cut"]
    assert store.columns("f-ref", ["fine"], ids(A))["fine"].tolist() == [1.0]


def test_series_follow_the_order_of_fingerprints(store):
    for n, accuracy in ((1, 0.0), (2, 0.5)):
        store.write_shard(step(n), 0, ids(A, B), {"accuracy": [accuracy, 1.0]})
    store.ingest()
    found = store.series(["f-accuracy-2", None, "f-accuracy-1", "never"], ["accuracy"], ids(B, A))["accuracy"]
    np.testing.assert_array_equal(found, [[1.0, np.nan, 1.0, np.nan], [0.5, np.nan, 0.0, np.nan]])
    assert [m.step for m in store.measured(run="sft")] == [1, 2]
    assert store.measured(fingerprint="f-accuracy-1") == [step(1)]


def test_samples_come_back_in_order(store):
    answers = [
        [
            {"text": "4", "correct": True, "n_tokens": 1, "logp": -0.5, "finished": True},
            SimpleNamespace(text="5", correct=False),
        ],
        [],
    ]
    store.write_shard(step(1), 0, ids(A, B), {"accuracy": [0.5, np.nan]}, answers)
    store.ingest()
    store.register_recipe("r", "", uses=["f-accuracy-1"])
    assert [s["text"] for s in store.samples("f-accuracy-1", ids(B, A))[1]] == ["4", "5"]
    assert store.samples("f-accuracy-1", ids(B)) == [[]]
    assert store.sql("SELECT checkpoint, sample, text, correct, logp FROM samples ORDER BY sample").rows() == [
        ("checkpoint-1", 0, "4", True, -0.5),
        ("checkpoint-1", 1, "5", False, None),
    ]


def scored_store(store):
    store.write_shard(LIKELIHOOD, 0, ids(A, B, C), {"chosen_logp": [-1.0, -2.0, -3.0]})
    store.write_shard(
        Measured("f-old", "likelihood", "forward", "models/old", "w9"), 0, ids(A, B, C), {"chosen_logp": [-7.0] * 3}
    )
    store.write_shard(LENGTH, 0, ids(A, B, C), {"chosen_tokens": [1, 2, 3]})
    for n in (1, 2):
        store.write_shard(step(n), 0, ids(A, B), {"n_samples": [4, 4], "n_correct": [n, 0], "accuracy": [n / 4, 0.0]})
        store.write_shard(step(n, measurement="target"), 0, ids(A), {"target_nll": [0.5 / n]})
    store.ingest()
    uses = ["f-ref", "f-len", *(m.fingerprint for m in store.measured(run="sft"))]
    store.register_recipe(
        "mine", "kind: preference", sources=["a.jsonl"], uses=uses, plain=["f-ref", "f-len", "f-accuracy-2"]
    )
    store.write_scores(
        "mine",
        ids(A, B),
        {
            "flip_loss": [0.5, float("nan")],
            "flip_loss_b5": [np.inf, 2.0],
            "phase": ["learned", None],
            "fluent": [True, False],
        },
    )
    return store


def test_every_view_has_its_columns(store):
    scored_store(store)
    columns = {view: store.sql(f"SELECT * FROM {view} LIMIT 0").columns for view in database_views()}
    assert columns["rows"][:6] == ["row_id", "kind", "source", "prompt", "chosen", "rejected"]
    assert {"completion", "answer", "label", "style", "role", "n_occurrences", "position"} <= set(columns["rows"])
    wanted = {
        "prompt",
        "source",
        "flip_loss",
        "flip_loss_b5",
        "chosen_logp",
        "chosen_tokens",
        "accuracy",
        "topic",
        "votes",
    }
    assert wanted <= set(columns["scored"])
    assert columns["trajectories"][:9] == [
        "row_id", "run", "checkpoint", "step", "n_samples", "n_correct", "accuracy", "target_nll", "trained",
    ]  # fmt: skip
    assert columns["samples"][:5] == ["row_id", "run", "checkpoint", "step", "sample"]
    assert columns["occurrences"][:3] == ["row_id", "source", "index"]
    assert columns["dataset_values"][:7] == ["name", "run", "checkpoint", "value", "low", "high", "n"]
    assert columns["runs"][:3] == ["id", "recipe", "command"]
    assert columns["selections"] == ["selection", "row_id", "kept", "rank", "reason", "rule", "value", "cut"]


def database_views():
    from curate.store.query import VIEWS

    return VIEWS


def test_an_empty_store_has_every_view(tmp_path):
    store = Store(tmp_path / "s", create=True)
    assert [len(store.sql(f"SELECT * FROM {view}")) for view in database_views()] == [0] * 8
    assert store.row_ids_of() == []
    assert store.status()["rows"] == 0


def test_scored_shows_one_fingerprint_a_measurement_and_null_for_the_unknown(store):
    scored_store(store)
    picked = "SELECT prompt, source, chosen_logp, chosen_tokens, accuracy, flip_loss, flip_loss_b5, phase FROM scored ORDER BY position"
    assert store.sql(picked).rows() == [
        ("2+2?", "a.jsonl", -1.0, 1.0, 0.5, 0.5, None, "learned"),
        ("3+3?", "a.jsonl", -2.0, 2.0, 0.0, None, 2.0, None),
        ("1+1?", "b.jsonl", -3.0, 3.0, None, None, None, None),
    ]
    with pytest.raises(ValueError, match="several of likelihood"):
        store.register_recipe("mine", "", plain=["f-ref", "f-old"])


def test_trajectories_put_measurements_of_one_checkpoint_on_one_line(store):
    scored_store(store)
    picked = "SELECT prompt, step, n_correct, accuracy, target_nll FROM trajectories JOIN rows USING (row_id) WHERE run = 'sft' ORDER BY 1, 2"
    assert store.sql(picked).rows() == [
        ("2+2?", 1, 1.0, 0.25, 0.5), ("2+2?", 2, 2.0, 0.5, 0.25), ("3+3?", 1, 0.0, 0.0, None), ("3+3?", 2, 0.0, 0.0, None),
    ]  # fmt: skip
    assert store.sql("SELECT count(*) FROM trajectories WHERE chosen_logp = -7").item() == 0  # not the recipe's
    assert (
        "chosen_tokens" not in store.sql("SELECT * FROM trajectories LIMIT 0").columns
    )  # belongs to no set of weights


def test_views_narrow_to_a_recipe_and_a_source(store):
    scored_store(store)
    store.register_recipe("other", "", sources=["b.jsonl"], uses=["f-old"], plain=["f-old"])
    store.write_scores("other", ids(A, C), {"flip_loss": [9.0, 8.0]})
    picked = "SELECT prompt, chosen_logp, flip_loss FROM scored ORDER BY position"
    assert store.sql(picked).rows() == [
        ("2+2?", -7.0, 9.0),
        ("3+3?", -7.0, None),
        ("1+1?", -7.0, 8.0),
    ]  # the one scored last
    assert store.sql(picked, recipe="mine").rows() == [("2+2?", -1.0, 0.5), ("3+3?", -2.0, None)]
    assert store.sql(picked, recipe="mine", source="b.jsonl").rows() == [("2+2?", -1.0, 0.5), ("1+1?", -3.0, None)]
    assert store.sql("SELECT DISTINCT source FROM rows", source="b.jsonl").rows() == [("b.jsonl",)]
    assert store.sql("SELECT count(*) FROM trajectories", recipe="mine", source="b.jsonl").item() == 4
    with pytest.raises(UsageError, match="Did you mean 'mine'"):
        store.sql("SELECT 1", recipe="mien")
    with pytest.raises(UsageError, match=r"Did you mean 'a\.jsonl'"):
        store.sql("SELECT 1", source="a.json")


def test_dataset_values_runs_and_throughput(store):
    store.register_recipe("r", "")
    for value in (0.1, float("nan")):
        store.write_dataset_values("r", [DatasetValue("ranking_accuracy", value, 0.0, 0.2, 10, "sft", "c1")])
    store.write_dataset_values("import:logs", [DatasetValue("test_accuracy", 0.5)])
    store.write_dataset_values("elsewhere", [DatasetValue("test_accuracy", 0.7)])
    assert store.sql("SELECT name, value, n FROM dataset_values ORDER BY name").rows() == [
        ("ranking_accuracy", None, 10),
        ("test_accuracy", 0.5, None),
    ]
    run = store.begin_run("r", "run", "0.1")
    store.finish_run(run, "done", counts={"rows": 3})
    assert store.sql("SELECT id, outcome, counts FROM runs").rows() == [(run, "done", '{"rows": 3}')]
    assert store.throughput("sample") is None
    store.log_throughput("sample", 100, 2.0)
    store.log_throughput("sample", 300, 2.0)
    assert store.throughput("sample") == 100.0


def test_sql_only_reads_and_names_the_nearest(store):
    scored_store(store)
    for text in (
        "INSERT INTO data.rows VALUES (1)",
        "DROP VIEW rows",
        "SELECT 1; DELETE FROM data.rows",
        "COPY rows TO 'x.csv'",
    ):
        with pytest.raises(UsageError, match="only read"):
            store.sql(text)
    with pytest.raises(UsageError, match="no column 'reason' in this view; it is one of selections"):
        store.sql("SELECT reason FROM rows")
    with pytest.raises(UsageError, match="nearest: flip_loss"):
        store.sql("SELECT flop_loss FROM scored")
    with pytest.raises(UsageError, match="Did you mean scored"):
        store.sql("SELECT * FROM score")
    with pytest.raises(UsageError, match="syntax error"):
        store.sql("SELEC 1")
    assert store.sql("SELECT prompt FROM rows WHERE row_id = ?", [A.row_id]).item() == "2+2?"
    assert store.sql("SELECT prompt FROM rows WHERE row_id = $id", {"id": A.row_id}).item() == "2+2?"


def test_find_row(store):
    assert (
        store.find_row(A.row_id)
        == store.find_row(A.row_id[:8])
        == store.find_row("a.jsonl:3")
        == store.find_row("a.jsonl#4")
        == A.row_id
    )
    for text in ("a.jsonl:2", "a.jsonl#3", "a.jsonl#0", A.row_id[:3], "zzzzzzzz"):
        with pytest.raises(UsageError, match="no row"):
            store.find_row(text)


def test_no_store_there(tmp_path):
    with pytest.raises(StoreError, match="no store there"):
        Store(tmp_path)
    (tmp_path / "curate.duckdb").write_bytes(b"junk" * 5000)
    with pytest.raises(StoreError, match="damaged"):
        Store(tmp_path)


def test_a_database_that_is_cut_short_is_damaged(store):
    file = store.folder / "curate.duckdb"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)
    with pytest.raises(StoreError, match="is damaged .*curate check .* --repair.*run the recipe again"):
        Store(store.folder).sql("SELECT * FROM scored")


def test_a_damaged_database_is_made_again_from_shards(store):
    scored_store(store)
    (store.folder / "curate.duckdb").rename(store.folder / "damaged")
    again = Store(store.folder, create=True)
    again.add_source("a.jsonl", "1", [record(0, A), record(1, B)])
    assert again.missing("f-ref") == []
    assert again.series(["f-accuracy-1", "f-accuracy-2"], ["accuracy"], ids(A))["accuracy"].tolist() == [[0.25, 0.5]]


@pytest.mark.parametrize("version, told", [(0, "older version 0"), (4, "Upgrade")])
def test_stores_of_other_versions(store, version, told):
    with store.database.write() as con:
        con.execute("UPDATE data.meta SET value = ? WHERE key = 'schema_version'", [str(version)])
    before = (store.folder / "curate.duckdb").read_bytes()
    with pytest.raises(StoreError, match=told):
        Store(store.folder)
    assert (store.folder / "curate.duckdb").read_bytes() == before


def test_an_older_store_is_migrated_where_that_is_known(store, monkeypatch):
    with store.database.write() as con:
        con.execute("UPDATE data.meta SET value = '0' WHERE key = 'schema_version'")
        con.execute("ALTER TABLE data.rows DROP COLUMN template_args")
    monkeypatch.setitem(database.MIGRATIONS, 0, "ALTER TABLE data.runs ADD COLUMN mood VARCHAR")
    assert Store(store.folder).row_ids_of() == ids(A, B, C)
    assert "mood" in store.sql("SELECT * FROM data.runs").columns


def test_an_older_store_that_cannot_be_written_says_what_it_waits_for(store, monkeypatch):
    with store.database.write() as con:
        con.execute("UPDATE data.meta SET value = '1' WHERE key = 'schema_version'")
    attached = database.attached

    def read_only_mount(path, *, read_only):
        if not read_only:
            raise duckdb.IOException("Cannot open file: Read-only file system")
        return attached(path, read_only=True)

    monkeypatch.setattr(database, "attached", read_only_mount)
    with pytest.raises(
        StoreError, match="is of version 1, and is brought to version 3 .* open it once where it can be written"
    ):
        Store(store.folder)


def test_a_full_disk_loses_nothing(store, monkeypatch):
    def full(table, file, **_):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards.pq, "write_table", full)
    with pytest.raises(StoreError, match="disk is full"):
        store.write_shard(LIKELIHOOD, 0, ids(A), {"chosen_logp": [1.0]})
    with pytest.raises(StoreError, match="disk is full"):
        store.add_source("c.jsonl", "1", [record(0, A)])
    assert [p for p in store.folder.rglob("*") if p.suffix in (".tmp", ".parquet")] == []
    assert store.row_ids_of() == ids(A, B, C)


def test_two_hundred_thousand_rows(tmp_path):
    n = 200_000
    store = Store(tmp_path / "s", create=True)
    found = store.add_source("big", "1", (record(i, Example(f"question {i % (n // 2)}", "a")) for i in range(n)))
    assert (found.records, found.new_rows, found.duplicates) == (n, n // 2, n // 2)
    row_ids = [row_id for _, row_id in store.missing("f-ref")]
    assert len(row_ids) == n // 2
    store.write_shard(LIKELIHOOD, 0, row_ids[::2], {"target_nll": np.arange(n // 4, dtype=float)})
    store.ingest()
    assert store.missing("f-ref") == list(enumerate(row_ids))[1::2]
    values = store.columns("f-ref", ["target_nll"], row_ids[::-1])["target_nll"][::-1]
    np.testing.assert_array_equal(values[::2], np.arange(n // 4))
    assert np.isnan(values[1::2]).all()
