"""When a row has been sampled enough: as soon as its band is decided, looked at after 4, 8, 16, … samples.

    looks     from, 2·from, 4·from, … to
    decided   Wilson's 95% interval of c/n lies wholly inside low..high, below it or above it (`pass_band` is anything but undecided)

Looking several times, the counts that stop a row are not those of a fixed number of samples: a row that stops below the band does so on low
counts, so its c/n is too low on average, above it too high, inside it nearer the middle. docs/rlvr.md has how much, by the exact binomial; a test
computes it.
Source of the question: Wald 1945, doi:10.1214/aoms/1177731118.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from curate.scores.rates import UNDECIDED, bands


def looks(least: int, most: int) -> list[int]:
    """How many samples a row has at every look: least, doubled until most."""
    found = [least]
    while found[-1] < most:
        found.append(min(2 * found[-1], most))
    return found


def undecided(marks: Sequence[bool | None], low: float, high: float) -> bool:
    """Whether more samples are needed of a row with these grades, None for one without a grade."""
    known = [mark for mark in marks if mark is not None]
    if not known:
        return True
    [code] = bands(np.array([float(sum(known))]), np.array([float(len(known))]), low, high)
    return bool(code == UNDECIDED)
