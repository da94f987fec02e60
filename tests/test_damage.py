"""What has rotted in a store is seen: bits flipped, files cut short, blocks of zeros, files swapped. Never other values, never a traceback."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from curate.errors import CurateError, DamagedStore, StoreError
from curate.report.checked import checked_text
from curate.rows import Example
from curate.store import Measured, Store
from curate.store.checking import check
from curate.store.wholeness import fault_of, has_checksum, number_of, stem_of
from tests import forked

ROWS = [Example(f"question {i} " + "x" * (i % 50), f"answer {i}") for i in range(60)]
IDS = [row.row_id for row in ROWS]
FORWARD = [
    Measured(f"f{k}", "likelihood", "forward", "m", f"w{k}", "run", f"checkpoint-{k}", k, "torch", {"max_length": 8})
    for k in range(2)
]
SAMPLED = Measured("fs", "accuracy", "sample", "m", "w1", "run", "checkpoint-1", 1)
TABLES = ("m_likelihood", "m_accuracy", "samples")
ANSWERS = [
    [
        {"text": f"t{i} {j}", "correct": bool(j % 2), "n_tokens": j, "logp": -1.0 * i, "finished": True}
        for j in range(i % 3)
    ]
    for i in range(60)
]


def records():
    return [SimpleNamespace(index=i, row=row, columns={"n": i}) for i, row in enumerate(ROWS)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "store"
    store, rng = Store(folder, create=True), np.random.default_rng(0)
    store.add_source("a", "1", records())
    for measured in FORWARD:
        for block in (0, 1):
            ids = IDS[block * 30 : block * 30 + 30]
            nll = np.where(np.arange(30) % 7, rng.normal(size=30), np.nan)
            store.write_shard(measured, block, ids, {"nll": nll, "tokens": np.arange(30), "note": [None, "cut"] * 15})
    store.write_shard(SAMPLED, 0, IDS, {"accuracy": rng.random(60)}, ANSWERS)
    store.ingest()
    return folder


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "store"))


def shards_of(folder: Path) -> list[Path]:
    return sorted((folder / "shards").glob("*/*.parquet"))


def values(store: Store) -> dict[str, list[tuple]]:
    """Everything measured, by table, as text: NULL is NULL and 1.0 is 1.0."""
    found = {}
    with store.database.read() as con:
        there = {name for (name,) in con.execute("SELECT table_name FROM duckdb_tables()").fetchall()}
        for table in TABLES:
            found[table] = con.execute(f"SELECT * FROM data.{table} ORDER BY ALL").fetchall() if table in there else []
    return found


def as_before(folder: Path) -> None:
    """Take the checksums out of the names, as an earlier curate wrote them."""
    for path in shards_of(folder):
        path.rename(path.with_name(path.name.split(".")[0] + ".parquet"))


def damage(file: Path, seed: int, others: list[Path] = ()) -> str:
    rnd, content = random.Random(seed), bytearray(file.read_bytes())
    kind = rnd.choice(["flip", "flip", "flip", "cut", "zeros", "swap"] if others else ["flip", "flip", "cut", "zeros"])
    at = rnd.randrange(len(content))
    if kind == "flip":
        content[at] ^= 1 << rnd.randrange(8)
    elif kind == "cut":
        del content[at:]
    elif kind == "zeros":
        content[at : at + 64] = bytes(len(content[at : at + 64]))
    else:
        content[:] = rnd.choice([other for other in others if other != file]).read_bytes()
    file.write_bytes(content)
    return kind


def test_a_damaged_shard_never_gives_other_values(whole, folder):
    expected, kept = values(Store(whole)), shards_of(folder)
    original = {path: path.read_bytes() for path in kept}
    for seed in range(12):
        for name in ("curate.duckdb", "damaged"):  # the database is lost: all is taken in again
            shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink(missing_ok=True)
        for left in shards_of(folder):
            left.unlink()
        for path, content in original.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        victim, told = random.Random(seed).choice(kept), []
        damage(victim, seed, kept)
        changed = victim.read_bytes() != original[victim]
        store = Store(folder, create=True, on_damage=told.append)
        assert [victim.name in text for text in told] == [True] * changed, seed
        found = values(store)
        assert all(set(map(repr, found[table])) <= set(map(repr, expected[table])) for table in TABLES), seed
        assert (found == expected) is not changed
        assert [path.name for path in (folder / "damaged").glob("*")] == [victim.name] * changed


def test_no_damage_of_a_shard_is_missed(folder):
    kept = shards_of(folder)
    original = {path: path.read_bytes() for path in kept}
    for seed in range(300):
        victim = random.Random(seed).choice(kept)
        damage(victim, seed, kept)
        assert (fault_of(victim) is None) is (victim.read_bytes() == original[victim]), seed
        victim.write_bytes(original[victim])


def test_rows_of_a_damaged_shard_are_missing_and_measured_again(whole, folder):
    victim = next(path for path in shards_of(folder) if path.name.startswith("f0-000001"))
    good = victim.read_bytes()
    damage(victim, 3)
    (folder / "curate.duckdb").unlink()
    with pytest.warns(UserWarning, match=rf"{victim.name} is damaged: its checksum is .* counts? as not measured"):
        store = Store(folder, create=True)
    store.add_source("a", "1", records())
    assert [row_id for _, row_id in store.missing("f0")] == IDS[30:] and store.missing("f1") == []
    assert store.status()["set_aside"] == [victim.name]
    content = pq.read_table(whole / victim.relative_to(folder))
    again = store.write_shard(FORWARD[0], 1, IDS[30:], {name: content[name] for name in content.column_names[1:]})
    assert again.name == victim.name and again.read_bytes() == good  # the same values have the same checksum
    store.ingest()
    assert values(store) == values(Store(whole))


def test_the_name_has_the_crc32_of_the_file(folder):
    for path in shards_of(folder):
        assert path.stem.rpartition(".")[2] == f"{zlib.crc32(path.read_bytes()):08x}"
    digits = (
        Path("ffff-000009-39236658.parquet"),
        Path("ffff-000009-39236658.12345678.parquet"),
    )  # hashes that look like numbers
    assert [(stem_of(path), number_of(path), has_checksum(path)) for path in digits] == [
        ("ffff-000009-39236658", 9, False),
        ("ffff-000009-39236658", 9, True),
    ]


def test_shards_of_earlier_versions_are_read_and_counted(whole, folder):
    as_before(folder)
    (folder / "curate.duckdb").unlink()
    store = Store(folder, create=True)
    assert values(store) == values(Store(whole))
    found = check(folder)
    assert (found.shards, found.without_checksum, found.problems) == (5, 5, [])
    mended = check(folder, repair=True)
    assert mended.without_checksum == 0 and all(map(has_checksum, shards_of(folder)))
    assert check(folder).problems == [] and check(folder).without_checksum == 0


def test_a_damaged_shard_without_checksum_keeps_its_row_ids_and_names_itself(whole, folder):
    """Numbers in it may be others, which nothing says; all else is seen."""
    as_before(folder)
    expected, kept = values(Store(whole)), shards_of(folder)
    original = {path: path.read_bytes() for path in kept}
    keys = {table: {row[:2] for row in expected[table]} for table in TABLES}
    for seed in range(100, 110):
        for path in [folder / "curate.duckdb", *shards_of(folder)]:
            path.unlink(missing_ok=True)
        for path, content in original.items():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        victim, told = random.Random(seed).choice(kept), []
        damage(victim, seed, kept)
        found = values(Store(folder, create=True, on_damage=told.append))
        assert all(victim.name in text for text in told), (seed, told)
        for table in TABLES:
            assert {row[:2] for row in found[table]} <= keys[table], (seed, table)


def test_a_damaged_database_is_named_or_gives_the_same_values(whole, folder):
    good, database = (whole / "curate.duckdb").read_bytes(), folder / "curate.duckdb"
    expected, told = values(Store(whole)), []
    with Store(whole).database.read() as con:
        rows = con.execute("SELECT * FROM data.rows ORDER BY ALL").fetchall()
    for seed in range(40):
        database.write_bytes(good)
        damage(database, seed)
        try:
            store = Store(folder, patience=0.5)  # a damaged file is not one that somebody else has open
            assert values(store) == expected, seed
            with store.database.read() as con:
                assert con.execute("SELECT * FROM data.rows ORDER BY ALL").fetchall() == rows
        except DamagedStore as error:
            told.append(str(error))
    assert len(told) > 10 and all(str(database) in text and "--repair" in text for text in told)


def test_what_a_path_is_called_says_nothing_of_the_file(whole, tmp_path):
    store = Store(shutil.copytree(whole, tmp_path / "could not set lock corrupt"))
    store.database.path.chmod(0)
    other = tmp_path / "corrupt checksum"
    other.mkdir()
    (other / "curate.duckdb").mkdir()
    with pytest.raises(StoreError, match="cannot be read or written") as told:
        Store(other, patience=0.1)
    assert not isinstance(told.value, DamagedStore)


# ---- curate check -----------------------------------------------------------------------------------------------------------------------


def test_a_store_that_is_whole(whole):
    assert "Nothing is damaged" in checked_text(check(whole))
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    found = check(whole)
    assert (found.problems, found.shards, found.database, found.unmended) == ([], 5, "whole", 0)
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("seed", [0, 1, 5, 9])
def test_a_shard_that_rots_beside_a_whole_database_is_found_and_written_again(whole, folder, seed):
    expected, victim = values(Store(whole)), shards_of(folder)[seed % 5]
    damage(victim, seed)
    found = check(folder)
    assert [problem.file for problem in found.problems][:1] == [victim.relative_to(folder).as_posix()]
    assert found.unmended and victim.exists()
    assert check(folder, repair=True).unmended == 0
    assert (folder / "damaged" / victim.name).exists() and check(folder).problems == []
    (folder / "curate.duckdb").unlink()  # what was written again holds what the lost file held
    assert values(Store(folder, create=True)) == expected


def test_a_damaged_database_is_made_again(whole, folder):
    damage(folder / "curate.duckdb", 2)
    with (folder / "curate.duckdb").open("r+b") as file:
        file.truncate(20_000)
    found = check(folder)
    assert found.database == "damaged" and found.unmended == 1
    with pytest.raises(DamagedStore, match=r"curate check .* --repair"):
        Store(folder)
    mended = check(folder, repair=True)
    assert mended.database == "made again" and mended.unmended == 0
    assert (folder / "damaged" / "curate.duckdb").stat().st_size == 20_000
    assert values(Store(folder)) == values(Store(whole)) and check(folder).problems == []


def test_a_database_that_is_gone_is_made_again(whole, folder):
    (folder / "curate.duckdb").unlink()
    assert check(folder).database == "missing"
    assert check(folder, repair=True).unmended == 0
    assert values(Store(folder)) == values(Store(whole))


def test_an_old_shard_with_other_numbers_is_found_beside_the_database(whole, folder):
    """Nothing in the file says so: a number is another one, in a file that is right in every other way."""
    as_before(folder)
    victim = next(path for path in shards_of(folder) if path.name.startswith("f1-000000"))
    table = pq.read_table(victim)
    i = table.column_names.index("nll")
    other = table["nll"].to_pylist()
    other[3] += 1
    import pyarrow as pa

    pq.write_table(table.set_column(i, "nll", pa.array(other)), victim)
    assert [(p.file, "other values than the database in 1 rows" in p.why) for p in check(folder).problems] == [
        (victim.relative_to(folder).as_posix(), True)
    ]
    assert check(folder, repair=True).unmended == 0 and check(folder).problems == []
    (folder / "curate.duckdb").unlink()
    assert values(Store(folder, create=True)) == values(Store(whole))


def test_values_that_one_side_has_lost_come_from_the_other(whole, folder):
    with Store(folder).database.write() as con:
        con.execute("DELETE FROM data.m_likelihood WHERE fingerprint = 'f0' AND row_id = ?", [IDS[0]])
        con.execute("UPDATE data.m_accuracy SET accuracy = 2 WHERE row_id = ?", [IDS[1]])
    for path in (folder / "shards" / "f1").iterdir():
        path.unlink()
    found = check(folder)
    assert sorted(problem.file.split("/")[1] for problem in found.problems) == ["f0", "f1", "fs"]
    assert check(folder, repair=True).unmended == 0 and check(folder).problems == []
    assert values(Store(folder)) == values(Store(whole))


def test_a_kill_while_a_database_is_made_again_loses_nothing(whole, folder):
    (folder / "curate.duckdb").unlink()
    code = (
        "import os, signal, sys; from curate.store import Store, store\n"
        "store.Store.ingest = lambda self: os.kill(os.getpid(), signal.SIGKILL)\nStore(sys.argv[1], create=True)"
    )
    done = forked.run(code, folder)
    assert done.returncode == -9 and (folder / "curate.duckdb").exists()
    store = Store(folder)
    with store.measuring():
        assert values(store) == values(Store(whole))


def test_what_is_derived_is_checked_too(folder):
    import torch

    from curate.passes.gradients.mean import load_vector, save_vector
    from curate.passes.tensor_files import fault_of_tensors

    file = folder / "directions" / "abc.safetensors"
    vector = {"a": torch.arange(30.0).reshape(5, 6), "b": torch.ones(3, dtype=torch.bfloat16)}
    save_vector(vector, file)
    assert fault_of_tensors(file) is None and torch.equal(load_vector(file)["a"], vector["a"])
    good = file.read_bytes()
    for seed in range(20):
        file.write_bytes(good)
        damage(file, seed)
        same = file.read_bytes() == good
        if not same and fault_of_tensors(file) is None:  # where the checksum is called otherwise, all else is as it was
            assert b"crc32" not in file.read_bytes() and torch.equal(load_vector(file)["a"], vector["a"])
    (folder / "weights.json").write_text('{"a": ')
    found = check(folder)
    assert {problem.file for problem in found.problems} >= {"directions/abc.safetensors", "weights.json"}
    check(folder, repair=True)
    assert check(folder).problems == [] and not file.exists()


def test_the_command(folder):
    victim = shards_of(folder)[0]
    damage(victim, 1)
    bad = forked.curate("check", folder)
    assert bad.returncode == 1 and victim.name in bad.stdout and "--repair" in bad.stdout and not bad.stderr
    mended = forked.curate("check", folder, "--repair", "--json")
    assert mended.returncode == 0 and "damaged/" in json.loads(mended.stdout)["problems"][0]["done"]


def test_nobody_measures_while_it_is_repaired(folder):
    with Store(folder).measuring():
        assert check(folder).problems == []
        with pytest.raises(CurateError, match="is measuring into this store"):
            check(folder, repair=True)
    with pytest.raises(StoreError, match="no store there"):
        check(folder.parent)


# ---- clocks, zeros, versions, what a killed process leaves --------------------------------------------------------------------------------


def test_a_clock_that_is_set_back_leaves_the_last_recipe_and_selection_the_last(folder):
    store = Store(folder)
    store.register_recipe("first", "")
    with store.database.write() as con:  # written while the clock was a year ahead
        con.execute("UPDATE data.recipes SET updated = updated + INTERVAL 1 YEAR")
        con.execute("UPDATE data.measured SET created = created + INTERVAL 1 YEAR")
    store.register_recipe("second", "")
    assert [recipe["name"] for recipe in store.recipes()] == ["second", "first"]
    store.register_recipe("first", "")
    store.write_scores("first", IDS, {"x": np.zeros(60)})
    assert store.recipes()[0]["name"] == "first" and "x" in store.sql("SELECT * FROM scored LIMIT 0").columns


def test_a_block_of_zeros_in_a_table_is_a_bad_row(tmp_path):
    from curate.data import validate

    file = tmp_path / "rows.csv"
    file.write_bytes(b"prompt,completion\nq,a\nr,b" + bytes(4096) + b"\ns,c\n")
    found = validate(str(file), kind="sft")
    assert (found.n_rows, found.n_bad) == (3, 1)
    assert "line 3" in str(found.defects[0]) and "4,096 bytes of zero" in str(found.defects[0])
    file.write_bytes(b"prompt,compl" + bytes(8) + b"\nq,a\n")
    with pytest.raises(CurateError, match="bytes of zero in the header"):
        validate(str(file), kind="sft")


@pytest.mark.parametrize("version", ["", "one", "1.5", "-1"])
def test_a_version_that_is_none_is_damage(folder, version):
    with Store(folder).database.write() as con:
        con.execute("UPDATE data.meta SET value = ? WHERE key = 'schema_version'", [version])
    with pytest.raises(DamagedStore, match=r"its version is .*curate check .* --repair"):
        Store(folder)


def test_what_a_kill_left_of_a_database_goes(folder):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = [folder / f".new-{gone.pid}-0123abcd.duckdb{end}" for end in ("", ".wal")]
    for path in left:
        path.write_bytes(b"half")
    assert "2 half-written files" in checked_text(check(folder))
    with Store(folder).measuring():
        assert not any(path.exists() for path in left)


def test_a_store_of_commit_9a495b9_is_read_whole_and_made_again(tmp_path):
    with tarfile.open(Path(__file__).parent / "old_store" / "store.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "store"
    found = check(folder)
    assert (found.shards, found.without_checksum, found.problems) == (11, 11, [])
    assert check(folder, repair=True).without_checksum == 0 and check(folder).problems == []
    before = "SELECT * FROM data.samples ORDER BY ALL"
    samples = Store(folder).sql(before)
    (folder / "curate.duckdb").unlink()
    assert check(folder, repair=True).unmended == 0 and len(samples)
    assert Store(folder).sql(before).equals(samples)
