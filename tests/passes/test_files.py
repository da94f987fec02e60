"""write_atomically: whole or not at all, whatever happens in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from curate.passes.files import write_atomically

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("sync", [False, True])
def test_the_new_content_is_there_at_the_end_of_the_block_and_not_before(tmp_path, sync):
    file = tmp_path / "kept.json"
    file.write_text("old")
    with write_atomically(file, sync=sync) as new:
        assert new.parent == file.parent
        new.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new" and os.listdir(tmp_path) == ["kept.json"]


@pytest.mark.parametrize("problem", [ValueError, OSError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [None, "old"])
def test_an_exception_in_the_middle_leaves_what_was_there_and_nothing_else(tmp_path, problem, before):
    file = tmp_path / "kept.json"
    if before is not None:
        file.write_text(before)
    with pytest.raises(problem), write_atomically(file) as new:
        new.write_text("ha")
        raise problem("in the middle")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == (
        {} if before is None else {file.name: before}
    )


def test_a_rename_that_is_refused_leaves_nothing(tmp_path):
    """A folder stands where the file should be."""
    (tmp_path / "taken" / "inside").mkdir(parents=True)
    with pytest.raises(OSError), write_atomically(tmp_path / "taken") as new:
        new.write_text("new")
    assert os.listdir(tmp_path) == ["taken"]


def test_a_kill_in_the_middle_leaves_what_was_there(tmp_path):
    file = tmp_path / "kept.json"
    file.write_text("old")
    code = (
        "import os, pathlib, signal, sys\nfrom curate.passes.files import write_atomically\n"
        "with write_atomically(pathlib.Path(sys.argv[1])) as new:\n    new.write_text('ha')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert done.returncode == -signal.SIGKILL and file.read_text() == "old"
    left = [path.name for path in tmp_path.iterdir() if path != file]
    assert [name.startswith(".kept.json.") and name.endswith(".tmp") for name in left] == [True]


def test_every_atomic_write_is_this_one():
    """No other file is renamed into its place: what is left are folders, a database's link and a shard's move to another folder."""
    allowed = {"passes/files.py", "data/replace.py", "store/shards.py", "workflow/runners/directions.py"}
    found = set()
    for file in (REPOSITORY / "curate").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if any(
            word in text for word in ("os.replace(", "os.rename(", "new.replace(", "new.rename(", "unfinished.replace(")
        ):
            found.add(file.relative_to(REPOSITORY / "curate").as_posix())
    assert found == allowed
