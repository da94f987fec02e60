"""The store between processes: killed at every point, locked by others, read while one measures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from curate.errors import StoreError
from curate.rows import Example
from curate.store import Measured, Store

ROWS = [Example(f"question {i}", "answer") for i in range(6)]
IDS = [row.row_id for row in ROWS]
PRELUDE = """
import os, signal, sys
from curate.store import Measured, Store
store = Store(sys.argv[1])
M = Measured("f", "likelihood", "forward", run="r", checkpoint="c")
ids = store.row_ids_of()
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
def say(text):
    print(text, flush=True)
"""


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store", create=True)
    store.add_source("a", "1", [SimpleNamespace(index=i, row=row, columns={"n": i}) for i, row in enumerate(ROWS)])
    return store


def start(store, code):
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, str(store.folder)],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )


def killed(store, code):
    process = start(store, code)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


FIRST = """
with store.measuring():
    store.write_shard(M, 0, ids[:2], {"nll": [0.1, 0.2]}); store.ingest()
"""


@pytest.mark.parametrize(
    "code, left",
    [
        # while the shard is being written: this shard is lost, its temporary file is removed
        (
            FIRST
            + "    from curate.store import shards; shards.os.replace = die; store.write_shard(M, 1, ids[2:4], {'nll': [0.3, 0.4]})",
            4,
        ),
        # between the shard's rename and its ingestion: nothing is lost
        (FIRST + "    store.write_shard(M, 1, ids[2:4], {'nll': [0.3, 0.4]}); die()", 2),
        # in the middle of the transaction: nothing is lost
        (
            FIRST + "    store.write_shard(M, 1, ids[2:4], {'nll': [0.3, 0.4]})\n"
            "    from curate.store import tables; tables.merge = die\n"
            "    M2 = Measured('g', 'other', 'forward'); store.write_shard(M2, 0, ids[:1], {'x': [1.0]}); store.ingest()",
            2,
        ),
        # after the commit, before the file is moved away: it is taken in twice and counts once
        (
            FIRST
            + "    store.write_shard(M, 1, ids[2:4], {'nll': [0.3, 0.4]}); store.shards.ingested = die; store.ingest()",
            2,
        ),
    ],
)
def test_a_kill_loses_at_most_the_shard_being_written(store, code, left):
    killed(store, code)
    assert store.measured_by() is None
    with store.measuring():
        assert len(store.missing("f")) == left
        assert store.columns("f", ["nll"], IDS)["nll"][:2].tolist() == [0.1, 0.2]
    assert store.sql("SELECT count(*), count(DISTINCT row_id) FROM data.m_likelihood").row(0) == (6 - left, 6 - left)
    assert list(store.folder.rglob("*.tmp")) == []
    assert store.shards.pending() == []


def test_a_kill_while_a_source_is_read_in(store):
    code = """
from types import SimpleNamespace as R
from curate.rows import Example
from curate.store import sources
{}
store.add_source("b", "1", (R(index=i, row=Example(f"new {{i}}", "a"), columns={{}}) for i in range(5)))
"""
    killed(store, code.format("sources._ingest = die"))
    killed(
        store,
        code.format("inner = sources._ingest\ndef after(*a, **k): inner(*a, **k); die()\nsources._ingest = after"),
    )
    assert store.row_ids_of() == IDS
    assert not store.source_is_current("b", "1")
    assert len(list((store.folder / "staging").iterdir())) == 2
    with store.measuring():
        assert list((store.folder / "staging").iterdir()) == []


def test_only_one_process_measures_and_others_read(store):
    code = """
with store.measuring():
    store.write_shard(M, 0, ids[:2], {"nll": [0.1, 0.2]}); store.ingest()
    say("measured one")
    sys.stdin.readline()
    store.write_shard(M, 1, ids[2:], {"nll": [0.3] * 4}); store.ingest()
say("done")
"""
    with start(store, code) as process:
        assert process.stdout.readline() == "measured one\n"
        assert len(store.missing("f")) == 4  # read while the other process holds the store for measuring
        assert store.measured_by() == process.pid
        with pytest.raises(StoreError, match=f"process {process.pid} is measuring"):
            with store.measuring():
                pass
        run = store.begin_run("r", "select", "0")  # short writes of others go through
        store.finish_run(run, "done")
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "done\n"
    with store.measuring():
        assert store.missing("f") == []


def test_waiting_for_a_writer(store):
    code = """
with store.database.write() as con:
    say("open")
    sys.stdin.readline()
"""
    with start(store, code) as process:
        assert process.stdout.readline() == "open\n"
        impatient = Store.__new__(Store)
        with pytest.raises(StoreError, match=f"process {process.pid} has had it open"):
            impatient.__init__(store.folder, patience=0.05)
        lines = []

        def waits(line):
            lines.append(line)
            process.stdin.write("\n")  # the writer ends once the waiting is said
            process.stdin.flush()

        patient = Store(store.folder, patience=60, on_wait=waits)
        assert patient.row_ids_of() == IDS
    assert lines == [f"waiting for {store.folder / 'curate.duckdb'}: process {process.pid} has it open"]


def test_threads_share_a_store(store):
    errors = []

    def work(k):
        try:
            for j in range(4):
                store.log_throughput(f"key {k}", 10, 1.0)
                assert store.row_ids_of() == IDS
                assert store.throughput(f"key {k}") == 10, j
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert store.sql("SELECT count(*) FROM data.throughput").item() == 16


def test_many_processes_write_at_once(store):
    code = """
for i in range(5):
    store.log_throughput("k", 1, 1.0)
"""
    writers = [start(store, code) for _ in range(3)]
    for writer in writers:
        writer.communicate(timeout=120)
        assert writer.returncode == 0
    assert store.sql("SELECT count(*) FROM data.throughput").item() == 15


def test_a_connection_of_ones_own_in_this_process_is_named(store):
    import duckdb

    con = duckdb.connect(str(store.folder / "curate.duckdb"), read_only=True)
    with pytest.raises(StoreError, match="this process has it open"):
        store.begin_run("r", "run", "0")
    con.close()
    store.begin_run("r", "run", "0")


def test_an_unfinished_run_of_a_dead_process_is_marked(store):
    killed(store, "store.begin_run('r', 'run', '0'); die()")
    mine = store.begin_run("r", "run", "0")
    assert store.sql("SELECT id, outcome FROM runs ORDER BY id").rows() == [(1, "killed"), (mine, None)]


def test_a_shard_that_is_no_shard_is_named_and_set_aside(store):
    path = store.write_shard(Measured("f", "m", "forward"), 0, IDS[:1], {"x": [1.0]})
    path.write_bytes(os.urandom(100))
    with pytest.warns(UserWarning, match=f"{path.name} is damaged: its checksum is"):
        assert store.ingest() == 0
    assert store.shards.damaged() == [store.folder / "damaged" / path.name] and not path.exists()


def test_what_did_not_fit_into_memory_lay_beside_the_store_and_is_gone(store, monkeypatch):
    from curate.store import engines

    monkeypatch.setattr(engines, "_idle", defaultdict(list))  # the small memory is this test's alone
    monkeypatch.setattr(engines, "MEMORY", "30MB")
    beside = store.folder / "curate.duckdb.tmp"
    with store.database.read() as con:
        con.execute("CREATE TEMP TABLE big AS SELECT i, hash(i) AS h FROM range(3_000_000) t(i)")
        assert any(beside.iterdir())
    assert not beside.exists()
    assert store.row_ids_of() == IDS  # the next opening is as good as the first
