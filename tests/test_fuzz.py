"""A small share of `benchmarks/fuzz.py`: mutated inputs of every kind of file are refused in words, or read as other readers read them."""

from __future__ import annotations

from benchmarks import fuzz


def test_every_seed_that_is_valid_is_accepted(tmp_path):
    refused = []
    for kind in fuzz.kinds():
        for data in kind.seeds:
            (tmp_path / kind.file).write_bytes(data)
            try:
                kind.check(tmp_path / kind.file)
            except fuzz.CurateError as error:
                refused.append(f"{kind.name}: {error}")
    assert (
        len(refused) == 1 and "If the rows are inside an object" in refused[0]
    )  # {data: rows}, which is a message of its own


def test_no_mutated_input_is_a_fault(tmp_path):
    counts = fuzz.fuzz(fuzz.kinds(), 500, 7, tmp_path)
    faults = [f"{name} {number}: {what}" for name, count in counts.items() for number, what in count.faults]
    assert not faults, "\n".join(faults)
    assert all(count.accepted and count.accepted + count.refused == count.inputs for count in counts.values())


def test_a_mutation_is_the_same_by_its_seed():
    import random

    for kind in fuzz.kinds():
        assert [fuzz.mutated(kind, random.Random(f"x{n}")) for n in range(5)] == [
            fuzz.mutated(kind, random.Random(f"x{n}")) for n in range(5)
        ]
