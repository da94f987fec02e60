"""A large source is hashed whole, once, and again when anything but its name may have changed."""

from __future__ import annotations

import os

import pytest

from curate.data import sources
from curate.data.reading import read
from curate.models import fingerprints
from curate.models.fingerprints import FingerprintCache

ROW = '{"prompt": "q", "chosen": "a", "rejected": "b"}\n'


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LARGE", 1000)
    monkeypatch.setattr(sources, "END", 100)
    monkeypatch.setattr(fingerprints, "SETTLED", -1.0)
    path = tmp_path / "rows.jsonl"
    path.write_text(ROW * 100)
    os.utime(path, (1e9, 1e9))
    return path


def change_middle(path):
    with path.open("r+b") as opened:
        opened.seek(50 * len(ROW))
        opened.write(ROW.replace("q", "Q").encode())
    os.utime(path, (1e9, 1e9))


def test_a_changed_middle_is_noticed_with_its_old_time(file, tmp_path):
    ends = sources.ends_digest(file)
    cache = FingerprintCache(tmp_path / "weights.json")
    before = read(file, digest_of=cache.source).sources[0].fingerprint
    assert before == read(file).sources[0].fingerprint
    change_middle(file)
    assert sources.ends_digest(file) == ends  # what an earlier curate looked at
    after = read(file, digest_of=FingerprintCache(tmp_path / "weights.json").source).sources[0].fingerprint
    assert after != before and after == read(file).sources[0].fingerprint


def test_it_is_hashed_once(file, tmp_path, monkeypatch):
    first = FingerprintCache(tmp_path / "weights.json").source(file)
    monkeypatch.setattr(sources, "file_digest", lambda path: pytest.fail("hashed again"))
    assert FingerprintCache(tmp_path / "weights.json").source(file) == first


def test_a_file_that_was_just_written_is_not_remembered(file, tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "SETTLED", 60.0)
    FingerprintCache(tmp_path / "weights.json").source(file)
    assert not (tmp_path / "weights.json").exists()


def test_a_target_keeps_the_digest_under_which_it_was_measured(file, tmp_path):
    cache, ends = FingerprintCache(tmp_path / "weights.json"), sources.ends_digest(file)
    assert cache.target(file) == cache.target(file) == ends
    change_middle(file)
    assert FingerprintCache(tmp_path / "weights.json").target(file) == sources.file_digest(file) != ends
