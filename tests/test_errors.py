"""What a user may have meant: one function for all messages."""

from __future__ import annotations

import pytest

from curate.errors import did_you_mean, nearest


@pytest.mark.parametrize(
    ("name", "cutoff", "found"),
    [("flip_los", 0.6, "flip_loss"), ("accuracy", 0.6, "accuracy"), ("xyz", 0.6, None), ("flp", 0.5, "flip_loss")],
)
def test_the_nearest_name(name, cutoff, found):
    assert nearest(name, iter(["flip_loss", "accuracy"]), cutoff=cutoff) == found


def test_how_it_is_asked():
    known = ["flip_loss"]
    assert did_you_mean("flip_los", known) == "did you mean 'flip_loss'?"
    assert did_you_mean("flip_los", known, sentence=True, before=" ", after=" ") == " Did you mean 'flip_loss'? "
    assert did_you_mean("flip_los", known, show=lambda name: f"--map {name}=") == "did you mean --map flip_loss=?"
    assert did_you_mean("zzz", known, "there are: flip_loss.", before="; ") == "there are: flip_loss."
    assert did_you_mean("zzz", known, before="; ") == ""
