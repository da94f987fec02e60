"""A folder for one process at a time."""

from __future__ import annotations

import errno
import fcntl
import os

import pytest

from curate.errors import CurateError, StoreError
from curate.store import locks


def taken(holder: str) -> CurateError:
    return CurateError(f"taken by {holder}")


def test_one_at_a_time_and_free_at_the_end_whatever_happens(tmp_path):
    file = tmp_path / "lock"
    assert locks.holder(file) is None
    with pytest.raises(KeyError), locks.locked(file, taken):
        assert locks.holder(file) == os.getpid()
        with pytest.raises(CurateError, match=f"taken by {os.getpid()}"), locks.locked(file, taken):
            pass
        raise KeyError
    assert locks.holder(file) is None
    with locks.locked(file, taken):
        assert file.read_text() == str(os.getpid())


@pytest.mark.parametrize("number, is_taken", [(errno.EAGAIN, True), (errno.EACCES, True), (errno.ENOLCK, False)])
def test_a_folder_that_knows_no_locks_is_not_another_process(tmp_path, monkeypatch, number, is_taken):
    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(CurateError) as said, locks.locked(tmp_path / "lock", taken):
        pass
    assert (str(said.value) == "taken by of another machine") == is_taken
    assert isinstance(said.value, StoreError) != is_taken


def test_where_no_file_can_be_made(tmp_path):
    with pytest.raises(StoreError, match="cannot be written or locked"), locks.locked(tmp_path / "no" / "lock", taken):
        pass
