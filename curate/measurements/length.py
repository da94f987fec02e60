"""Token counts, and how far apart a pair's responses are.

    edit_distance = Levenshtein(chosen tokens, rejected tokens) / longer length        in [0, 1]

Counts are of what is measured, after truncation, EOS included. A row on which nothing can be measured keeps the counts
of what there is.

Source: Razin et al. 2024, arXiv:2410.08847 (normalised token edit distance).
"""

from __future__ import annotations

import numpy as np

from curate.measurements.declare import measurement
from curate.passes.tokens import Encoded, EncodedPair


@measurement(
    reads="tokens",
    kind="preference",
    columns={
        "prompt_tokens": "tokens",
        "chosen_tokens": "tokens",
        "rejected_tokens": "tokens",
        "edit_distance": "share of the longer response",
        "truncated": "0 or 1",
    },
)
def length(pair: EncodedPair) -> dict[str, float]:
    """Tokens of prompt and responses, their normalised edit distance, and whether max_length cut the pair."""
    chosen, rejected = pair.chosen, pair.rejected
    a, b = chosen.ids[chosen.start :], rejected.ids[rejected.start :]
    return {
        "prompt_tokens": max(chosen.start, rejected.start),
        "chosen_tokens": chosen.n_response,
        "rejected_tokens": rejected.n_response,
        "edit_distance": edit_distance(a, b) / max(len(a), len(b)) if len(a) or len(b) else float("nan"),
        "truncated": float(pair.truncated),
    }


@measurement(
    reads="tokens",
    kind="sft",
    columns={"prompt_tokens": "tokens", "completion_tokens": "tokens", "truncated": "0 or 1"},
)
def completion_length(example: Encoded) -> dict[str, float]:
    """Tokens of prompt and completion, and whether max_length cut the row. Where all assistant turns count, every other token is the prompt's."""
    return {
        "prompt_tokens": len(example.ids) - example.n_response,
        "completion_tokens": example.n_response,
        "truncated": float(example.truncated),
    }


def edit_distance(a: np.ndarray, b: np.ndarray) -> int:
    """Levenshtein distance of two sequences of ids.

    One column of the dynamic programme is held in the bits of a Python integer (vertical +1 and −1 steps), so a
    response of a few hundred tokens costs a few hundred word-wide operations. Source: Myers 1999, J. ACM 46(3); Hyyrö
    2003 for the distance at the last line.
    """
    a, b = np.asarray(a).tolist(), np.asarray(b).tolist()
    if not a or not b:
        return len(a) + len(b)
    occurs: dict[int, int] = {}
    for i, token in enumerate(a):
        occurs[token] = occurs.get(token, 0) | 1 << i
    full, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, distance = full, 0, len(a)
    for token in b:
        equal = occurs.get(token, 0)
        diagonal = (((equal & up) + up) ^ up) | equal | down
        grows = down | ~(diagonal | up) & full
        shrinks = up & diagonal
        distance += bool(grows & last) - bool(shrinks & last)
        grows = grows << 1 & full | 1
        shrinks = shrinks << 1 & full
        up = shrinks | ~(diagonal | grows) & full
        down = grows & diagonal
    return distance
