"""How often a run opens the store's database, and who may use it meanwhile."""

from __future__ import annotations

import json
import threading
from contextlib import suppress

import duckdb
import pytest
import yaml

import curate
from curate.errors import StoreError
from curate.store import database, views
from curate.store.openings import kept_open, let_go, waiting
from tests import forked
from tests.tiny_models import make_llama

PAIRS = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": f" {i * 7}?"} for i in range(10)]


@pytest.fixture
def opened(monkeypatch) -> list[bool]:
    """An entry an opening: whether it is for reading alone."""
    found, own = [], database.Database._connect

    def counted(self, opening, read_only, patience):
        found.append(read_only)
        return own(self, opening, read_only, patience)

    monkeypatch.setattr(database.Database, "_connect", counted)
    return found


def test_a_run_over_what_is_measured_opens_the_database_at_most_ten_times(tmp_path, opened, monkeypatch):
    """It was 89: one for every question. With checkpoints, a selection with a control, and an export. Every stored column is read once for all
    scores and dataset values: the reference's too, which is the first of the series.
    """
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    for step in range(2):
        make_llama(tmp_path / "run" / f"checkpoint-{step}", seed=step)
    raw = {
        "kind": "preference",
        "source": "pairs.jsonl",
        "models": {"reference": "run/checkpoint-0", "checkpoints": "run"},
        "engine": {"device": "cpu"},
        "scores": ["flipped", "ches", "ranking_gap"],
        "select": {"drop_worst": {"ches": 0.2}, "control": "random"},
        "export": {"to": "out"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(raw))
    first = curate.run(tmp_path / "recipe.yaml")
    with first.store.database.write() as con:  # else the scores are up to date
        con.execute("DELETE FROM data.meta WHERE key = 'made of recipe'")
    read, series = [], curate.Store.series

    def counted(self, fingerprints, names, row_ids):
        read.extend((f, name) for f in fingerprints for name in names if not name.endswith("_tokens"))  # rows' lengths
        return series(self, fingerprints, names, row_ids)

    monkeypatch.setattr(curate.Store, "series", counted)
    opened.clear()
    again = curate.run(tmp_path / "recipe.yaml")
    openings = len(opened)
    assert not again.measured and again.exported is not None
    assert again.selection.table().equals(first.selection.table())
    assert openings <= 10
    assert len(read) == len(set(read)) and {name for _, name in read} >= {"chosen_logp", "hidden_cc"}


def test_reading_stays_open_until_somebody_writes(tmp_path, opened):
    store = curate.Store(tmp_path / "store", create=True)
    opened.clear()
    with kept_open():
        assert store.sources() == store.recipes() == []
        with kept_open():
            store.measured()
        store.sql("SELECT * FROM scored")
        assert opened == [True]
        store.log_throughput("key", 10, 1.0)
        assert store.throughput("key") == 10 and store.speeds().of("key") == 10
        assert opened == [True, False, True]
        with kept_open(False):
            store.measured(), store.measured()
        assert opened == [True, False, True, True, True]
        with pytest.raises(curate.errors.UsageError, match="no column"):
            store.sql("SELECT nothing FROM scored")
        let_go()
        assert written_by_another_process(store)
        assert store.throughput("key") == pytest.approx(20 / 2)
    assert written_by_another_process(store)


def test_other_processes_read_meanwhile_and_another_thread_writes_afterwards(tmp_path):
    store = curate.Store(tmp_path / "store", create=True)
    with kept_open():
        store.measured()
        code = f"import curate; print(curate.Store({str(store.folder)!r}).sources())"
        done = forked.run(code)
        assert done.stdout.strip() == "[]", done.stderr
    thread = threading.Thread(target=store.log_throughput, args=("key", 10, 1.0))
    thread.start()
    thread.join()
    assert store.throughput("key") == 10


def written_by_another_process(store) -> bool:
    code = f"import curate; curate.Store({str(store.folder)!r}, patience=0.1).log_throughput('key', 10, 1.0)"
    done = forked.run(code)
    return done.returncode == 0


def test_a_new_thread_keeps_it_open_too(tmp_path, opened):
    """As a command's first block does: nothing was read in it before."""
    curate.Store(tmp_path / "s", create=True)
    opened.clear()

    def reads():
        with kept_open():
            store = curate.Store(tmp_path / "s")
            for _ in range(5):
                store.sources()

    thread = threading.Thread(target=reads)
    thread.start()
    thread.join()
    assert opened == [True]


def test_a_read_that_fails_inside_another_leaves_that_one_open(tmp_path):
    store = curate.Store(tmp_path / "s", create=True)
    with kept_open(), store.database.read() as outer:
        with pytest.raises(Exception, match="nothing_like_it"), store.database.read() as inner:
            inner.execute("SELECT nothing_like_it")
        assert outer.execute("SELECT 1").fetchone() == (1,)
        assert store.sources() == []


def test_a_transaction_that_an_error_has_ended_is_not_committed_silently(tmp_path):
    """DuckDB's COMMIT says nothing then, and all that was written before is gone."""
    store = curate.Store(tmp_path / "s", create=True)
    with pytest.raises(StoreError), store.transaction(), store.database.write() as con:
        con.execute("INSERT INTO data.meta VALUES ('a', '1')")
        with suppress(duckdb.Error):
            con.execute("INSERT INTO data.meta VALUES ('a', '2')")
    with store.database.read() as con:
        assert con.execute("SELECT count(*) FROM data.meta WHERE key = 'a'").fetchone() == (0,)


def test_work_before_a_commit_belongs_to_a_transaction(tmp_path):
    store = curate.Store(tmp_path / "s", create=True)
    done = []
    with pytest.raises(RuntimeError, match="outside a transaction"):
        store.database.before_commit(done.append)
    with store.transaction():
        store.database.before_commit(done.append)
        store.database.before_commit(done.append)
        assert curate.Store(tmp_path / "s").sources() == [] and not done  # the same store, once more
    assert len(done) == 1 and not waiting() and not store.database.is_in_transaction


def test_what_a_query_is_about_is_asked_once_and_again_after_a_write(tmp_path, monkeypatch):
    """The views of a recipe are made once for all its questions, and anew when somebody has written."""
    from curate.store import narrowing

    asked, own = [], narrowing.ViewFacts.__init__

    def counted(self, con, recipe=None, sources=None):
        asked.append(recipe)
        own(self, con, recipe, sources)

    store = curate.Store(tmp_path / "s", create=True)
    store.register_recipe("r", "", sources=[], uses=[], plain=[])
    monkeypatch.setattr(narrowing.ViewFacts, "__init__", counted)
    with kept_open():
        for _ in range(3):
            store.sql("SELECT row_id FROM scored", recipe="r")
            store.frame(recipe="r")
        assert asked == ["r"]
        store.write_scores("r", [], {"mine": []})
        asked.clear()  # the views that everybody sees were made
        assert "mine" in store.sql("SELECT * FROM scored", recipe="r").columns
        assert asked == ["r"]


def test_inside_a_transaction_a_question_about_one_source_is_not_the_next_ones(tmp_path):
    store = curate.Store(tmp_path / "s", create=True)
    for name in ("a", "b"):
        store.add_foreign_rows(name, [f"{name}{i}" for i in range(3)])
    count = "SELECT count(*) AS n FROM occurrences"
    with store.transaction():
        assert [store.sql(count, source=source)["n"].item() for source in ("a", None)] == [3, 6]


def test_views_are_remade_where_they_or_the_types_of_their_columns_are_others(tmp_path):
    """A view remembers the types of its columns: DuckDB refuses one whose table has other types now."""
    store = curate.Store(tmp_path / "s", create=True)
    store.register_recipe("r", "", sources=[], uses=[], plain=[])
    ids = store.add_foreign_rows("theirs", ["a", "b"])
    for values in ([1.0, 2.0], ["x", "y"]):
        store.write_scores("r", ids, {"mine": values})
        assert store.sql("SELECT mine FROM scored ORDER BY position")["mine"].to_list() == values
    with store.database.write() as con:
        oids = []
        for _ in range(2):
            views.define(con)
            oids += con.execute(
                "SELECT view_oid FROM duckdb_views() WHERE view_name = 'scored' AND NOT internal"
            ).fetchall()
    assert len(oids) == 2 and oids[0] == oids[1]


def test_what_is_asked_as_it_would_be_leaves_nothing_and_costs_no_engine(tmp_path, monkeypatch):
    from curate.store import engines

    store = curate.Store(tmp_path / "s", create=True)
    store.log_throughput("key", 10, 1.0)
    started, start = [], engines._start
    monkeypatch.setattr(engines, "_start", lambda path: started.append(path) or start(path))
    with store.transaction(undo=True):
        store.log_throughput("key", 1000, 1.0)
        assert store.throughput("key") == 505
        with pytest.raises(curate.errors.UsageError):
            store.sql("SELECT 'x'::DOUBLE FROM (SELECT 1)")
    store.log_throughput("key", 10, 1.0)
    assert store.throughput("key") == 10 and len(started) <= 1  # one for reading
