"""A full disk, a read-only one and a limit on files, met for real: a message, nothing lost, and the same command goes on."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import curate
from curate.errors import CurateError, StoreError, disk_trouble
from curate.report.explain import explain_row
from curate.report.summary import summarise
from curate.rows import Example
from curate.store import Store
from tests.tiny_models import make_llama
from tests.workflow.pairs import pairs, write_rows

MESSAGE = r"disk is full|No space left|larger than this system allows|File too large|disk quota"


@pytest.fixture
def disk(tmp_path) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A file system in memory of 3 MB, and what mounts it anew with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True, capture_output=True)

    try:
        mount("size=3m")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no small file system can be mounted here ({error}); test_a_limit_on_files goes the same ways")
    try:
        yield folder, lambda options: mount(f"remount,{options}")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "base", seed=0)


def recipe(folder: Path, model: Path) -> Path:
    write_rows(folder / "pairs.jsonl", pairs(12))
    raw = {
        "kind": "preference",
        "source": "pairs.jsonl",
        "models": {"reference": str(model)},
        "engine": {"device": "cpu"},
        "scores": ["ranking_gap", "ches_ln"],
        "select": {"keep": {"rows": 6}, "order_by": "ches_ln"},
        "export": {"to": "out", "columns": "scores"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw))
    return folder / "recipe.yaml"


def example(i: int) -> SimpleNamespace:
    return SimpleNamespace(
        index=i, row=Example(f"question {i} " + f"{i * 7919 % 99991:05d}" * 80, "yes"), columns={"n": i}
    )


def test_a_database_that_fills_its_disk(disk):
    """DuckDB writes its log and then fails to write the file, when it is closed."""
    folder, remount = disk
    store = Store(folder / "store", create=True)
    with pytest.raises(StoreError, match="disk is full"):
        for part in range(1000):
            store.add_source(f"part {part}", "1", map(example, range(500 * part, 500 * part + 500)))
    known = len(store.row_ids_of())
    assert known >= 500 and len(store.sql("SELECT * FROM rows")) == known
    remount("size=60m")
    for part in range(6):
        store.add_source(f"part {part}", "1", map(example, range(500 * part, 500 * part + 500)))
    assert len(store.scored()) == max(known, 3000) and not list((folder / "store").glob("*.wal"))


def test_a_run_on_a_disk_that_grows(disk, model, tmp_path):
    """At whatever point the space runs out: one message each time, and the same command goes on."""
    folder, remount = disk
    path, failed = recipe(folder, model), []
    for size in range(10, 200, 6):
        remount(f"size={size * 100}k")
        try:
            result = curate.run(path)
            break
        except CurateError as error:
            failed.append(str(error))
    assert len(failed) > 5 and all("disk is full" in text or "No space left" in text for text in failed), failed
    (tmp_path / "whole").mkdir()
    whole = curate.run(recipe(tmp_path / "whole", model))
    assert result.store.scored().equals(whole.store.scored())
    assert result.dataset.to_list() == whole.dataset.to_list()
    remount("ro")  # what reads goes on
    store = Store(folder / "store")
    assert (
        explain_row(store, store.scored()["row_id"][0], None).text()
        and summarise(store).text()
        and store.status()["rows"] == 12
    )
    with pytest.raises(StoreError, match="read-only|Read-only"):
        curate.run(path)


@pytest.mark.parametrize("limit", [2_000, 30_000, 600_000, 2_500_000])
def test_a_limit_on_files(model, tmp_path, limit):
    path, before = recipe(tmp_path, model), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(CurateError, match=MESSAGE):
            curate.run(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert curate.run(path).exported.n_rows == 6


@pytest.mark.parametrize("limit", [3_000, 100_000, 600_000])
def test_a_store_that_cannot_be_made_leaves_nothing(tmp_path, limit):
    """Its file is written when it is closed: whatever part of it was there goes, with its log."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(StoreError, match=MESSAGE) as failed:
            Store(tmp_path / "store", create=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir()) and "\n" not in str(failed.value)
    assert Store(tmp_path / "store", create=True).row_ids_of() == []


def test_what_was_committed_before_the_file_could_not_be_written_is_taken_in_later(tmp_path):
    store, before = Store(tmp_path / "store", create=True), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_100_000, before[1]))
    try:
        for _ in range(2):
            with pytest.raises(StoreError, match=MESSAGE):
                store.add_source("part", "1", map(example, range(1500)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(Store(tmp_path / "store").row_ids_of()) == 1500
    store.add_source("part", "1", map(example, range(1500)))
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["curate.duckdb", "staging"]
    assert not list((tmp_path / "store" / "staging").iterdir())


def test_what_other_libraries_say_of_a_full_disk():
    told = RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    failed = ValueError("generating failed")
    failed.__cause__ = OSError(28, "No space left on device", "/cache/x.arrow")
    assert "/cache/x.arrow: the disk is full" in str(disk_trouble(failed))
    assert "disk is full" in str(disk_trouble(told)) and disk_trouble(ValueError("28")) is None
