"""Kinds of file and what is wrong with files: the same rows from each kind, bounded memory, and errors that name what was found."""

from __future__ import annotations

import csv
import gzip
import http.server
import json
import os
import subprocess
import sys
import threading
import time
import tracemalloc

import pytest

from curate.data import files as files_module
from curate.data import load, read
from curate.errors import UsageError, ValidationError
from curate.rows import Pair

ROWS = [
    {"prompt": f"prompt {i}, “é”\n", "chosen": f" chosen {i}", "rejected": f" rejected, {i}", "n": i, "x": i / 4}
    for i in range(1200)
]
PAIRS = [Pair(row["prompt"], row["chosen"], row["rejected"]) for row in ROWS]


def write(path):
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
    name = path.name
    if name in ("saved", "splits"):
        import datasets

        datasets.disable_progress_bars()
        rows = datasets.Dataset.from_list(ROWS)
        (rows if name == "saved" else datasets.DatasetDict({"test": rows, "other": rows.select([0])})).save_to_disk(
            str(path)
        )
    elif name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif ".csv" in name or ".tsv" in name:
        with gzip.open(path, "wt") if name.endswith(".gz") else open(path, "w", newline="") as file:
            table = csv.DictWriter(file, ROWS[0].keys(), delimiter="\t" if ".tsv" in name else ",")
            table.writeheader()
            table.writerows(ROWS)
    else:
        text = lines if any(part in name for part in ("lines", "jsonl", "ndjson")) else json.dumps(ROWS, indent=1)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize(
    "name",
    [
        "a.jsonl",
        "a.jsonl.gz",
        "a.ndjson",
        "a.json",
        "lines.json",
        "a.json.gz",
        "a.parquet",
        "a.csv",
        "a.csv.gz",
        "a.tsv",
        "saved",
        "splits",
    ],
)
def test_the_same_rows_from_every_kind_of_file(tmp_path, name):
    reading = read(write(tmp_path / name), split="test" if name == "splits" else "train")
    for _ in range(2):  # a reading starts again each time
        records = list(reading)
        assert [record.row for record in records] == PAIRS
        assert [record.index for record in records] == list(range(1200))
        assert [record.columns for record in records] == [{"n": row["n"], "x": row["x"]} for row in ROWS]


def test_a_json_array_is_read_in_pieces(tmp_path, monkeypatch):
    write(tmp_path / "a.json")
    for piece in (1, 7, 64):
        monkeypatch.setattr(files_module, "PIECE", piece)
        rows = [row for *_, row in files_module.rows_of_file(tmp_path / "a.json", "a.json")]
        assert rows == ROWS


@pytest.mark.parametrize("name", ["big.jsonl", "big.jsonl.gz", "big.json", "big.csv"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    row = {"prompt": "p" * 1000, "chosen": "c" * 1000, "rejected": "r" * 1000}
    path = tmp_path / name
    n = 10_000  # 30 MB
    with gzip.open(path, "wt", compresslevel=1) if name.endswith(".gz") else open(path, "w") as file:
        line = json.dumps(row)
        if name == "big.json":
            file.write("[" + ",\n".join([line] * n) + "]")
        elif name == "big.csv":
            file.write(",".join(row) + "\n" + (",".join(row.values()) + "\n") * n)
        else:
            file.write((line + "\n") * n)
    tracemalloc.start()
    try:
        assert sum(1 for record in read(path) if record.row) == n
        assert tracemalloc.get_traced_memory()[1] < 12e6
    finally:
        tracemalloc.stop()


def test_reading_lines_loads_nothing_heavy(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINE)
    script = "import sys, curate.data as d; d.load(sys.argv[1]); print([m for m in ('datasets', 'pyarrow', 'numpy', 'torch') if m in sys.modules])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a.jsonl"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"


def test_names_lists_and_globs(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("b.jsonl", "a.jsonl", "notes.txt"):
        (tmp_path / "data" / name).write_text(json.dumps(ROWS[0]) + "\n")
    reading = read("data/*", base=tmp_path)
    assert [source.name for source in reading.sources] == ["data/a.jsonl", "data/b.jsonl"]
    assert [(record.source, record.index) for record in reading] == [("data/a.jsonl", 0), ("data/b.jsonl", 0)]
    listed = read(["data/b.jsonl", "data/*.jsonl"], base=tmp_path)  # a file that is named twice counts once
    assert [source.name for source in listed.sources] == ["data/b.jsonl", "data/a.jsonl"]


def test_an_empty_file_among_others_is_no_error(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "b.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    assert load([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]) == PAIRS[:1]


def test_a_folder_of_data_files(tmp_path):
    (tmp_path / "clone").mkdir()
    write(tmp_path / "clone" / "train.parquet")
    assert load(tmp_path / "clone") == PAIRS
    with pytest.raises(ValidationError, match="no split 'test', it has train"):
        read(tmp_path / "clone", split="test")


def test_the_fingerprint_follows_the_content(tmp_path):
    path = write(tmp_path / "a.jsonl")
    before = read(path).sources[0].fingerprint
    path.touch()
    assert read(path).sources[0].fingerprint == before
    path.write_text(path.read_text().replace("chosen 7", "chosen 8"))
    assert read(path).sources[0].fingerprint != before


def test_numbers_of_a_csv(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion,n,code,share,word\n1,2,3,007,0.5,x\n4,5,,008,1e-3,9\n")
    records = list(read(tmp_path / "a.csv"))
    assert [(record.row.prompt, record.row.completion) for record in records] == [
        ("1", "2"),
        ("4", "5"),
    ]  # texts stay texts
    assert [record.columns for record in records] == [
        {"n": 3, "code": "007", "share": 0.5, "word": "x"},
        {"n": None, "code": "008", "share": 0.001, "word": "9"},
    ]


LINE = json.dumps(ROWS[0])
BROKEN_ROWS = [
    ("a.jsonl", f"{LINE}\n{LINE[:20]}\n{LINE}\n", 1, "line 2 is not JSON"),
    (
        "a.jsonl",
        f'{LINE}\n{{"prompt": "cut\n{LINE}\n',
        1,
        "line 2 is not JSON (Invalid control character at character 16)",
    ),
    ("a.jsonl", f"{LINE}\n\n[1]\n", 1, "a list where a row belongs"),
    ("a.json", f"[{LINE}, 3, {LINE}]", 1, "a int where a row belongs"),
    ("a.csv", "prompt,chosen,rejected\np,a,b\np,a\n", 1, "2 cells (line 3)"),
]


@pytest.mark.parametrize(("name", "text", "index", "found"), BROKEN_ROWS)
def test_a_broken_row_is_a_defect(tmp_path, name, text, index, found):
    (tmp_path / name).write_text(text)
    bad = [record for record in read(tmp_path / name) if record.row is None]
    assert [record.index for record in bad] == [index]
    assert bad[0].defects[0].found.startswith(found)
    assert len(load(tmp_path / name, on_bad_row="drop")) >= 1


def truncated(data, at=0.5):
    return data[: int(len(data) * at)]


BROKEN_FILES = [
    ("a.jsonl", b"", "no rows at all"),
    ("a.json", b"[]", "no rows at all"),
    ("a.json", b"  ", "no rows at all"),
    ("a.csv", b"prompt,chosen,rejected\n", "no rows at all"),
    (
        "a.jsonl.gz",
        truncated(gzip.compress(b"".join(b"%d %s\n" % (i, LINE.encode()) for i in range(9)), mtime=0)),
        "ends too early or is damaged",
    ),
    ("a.jsonl.gz", b"no gzip at all", "ends too early or is damaged"),
    ("a.parquet", b"PAR1 and nothing else", "not a parquet file that can be read"),
    ("a.json", f"[{LINE}, {LINE[:30]}".encode(), "not JSON after row 1"),
    ("a.json", f"[{LINE}, ?]".encode(), "not JSON after row 1"),
    ("a.json", b'{\n "data": [1]\n}', "jq -c"),
    ("a.csv", b"prompt,prompt\n1,2\n", "names 'prompt' twice"),
    ("a.csv", b"prompt,chosen,rejected\n\xff,b,c\n", "not UTF-8"),
    ("a.jsonl", b"\xff\xfe\n", "line 1 is not UTF-8"),
    ("a.xlsx", b"x", "'.xlsx' is not a type of file that is read"),
]


@pytest.mark.parametrize(("name", "data", "said"), BROKEN_FILES)
def test_a_broken_file_is_an_error(tmp_path, name, data, said):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValidationError, match=said.replace("(", r"\(")) as caught:
        load(tmp_path / name)
    assert name in str(caught.value)


def test_a_parquet_file_cut_off(tmp_path):
    path = write(tmp_path / "a.parquet")
    path.write_bytes(truncated(path.read_bytes()))
    with pytest.raises(ValidationError, match="a.parquet: not a parquet file"):
        load(path)


def test_missing_files_and_the_nearest_name(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pairs.jsonl").write_text(LINE)
    for wrong in ("data/pair.jsonl", "data/pairs.json", "data/pairs"):
        with pytest.raises(ValidationError, match=r"no such file or folder.* Did you mean 'data/pairs.jsonl'\?"):
            read(wrong, base=tmp_path)
    with pytest.raises(ValidationError, match="no file with one of"):
        read("data/*.parquet", base=tmp_path)


def test_a_missing_split(tmp_path):
    with pytest.raises(ValidationError, match="no split 'train', it has test, other"):
        read(write(tmp_path / "splits"))


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub with one dataset, owner/pairs; everything else is missing, owner/slow is never answered."""

    def do_GET(self):
        if "/slow" in self.path:
            self.server.over.wait(10)
        known = self.path.startswith("/api/datasets/owner/pairs")
        wrong = None if known and "/revision/" not in self.path else "RevisionNotFound" if known else "RepoNotFound"
        if self.path.endswith("/revision/v1"):
            wrong = None
        body = json.dumps({"id": "owner/pairs", "sha": "abc"}).encode()
        self.send_response(404 if wrong else 200)
        if wrong:
            self.send_header("x-error-code", wrong)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(monkeypatch):
    import huggingface_hub

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.over = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


def test_a_hub_dataset_that_is_not_there_is_said_at_once(hub, tmp_path, monkeypatch):
    """A misspelt path looks like a hub id: one question, no retries, and what was meant."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "pairs.jsonl").write_text(LINE)
    start = time.monotonic()
    with pytest.raises(
        ValidationError, match=r"nobody/nothing: no such file or folder here, and .* hub has no dataset"
    ):
        read("nobody/nothing", base=tmp_path)
    with pytest.raises(ValidationError, match=r"dat/pairs: no such file .* Did you mean \./data/pairs\.jsonl\?"):
        read("dat/pairs", base=tmp_path)
    with pytest.raises(ValidationError, match="no revision 'v9'"):
        read("owner/pairs", revision="v9")
    monkeypatch.setattr("curate.data.hub.SECONDS", 0.2)
    with pytest.raises(ValidationError, match=r"did not answer within 0\.2 s \(HF_HUB_ETAG_TIMEOUT=30 waits longer\)"):
        read("owner/slow")
    assert time.monotonic() - start < 3


def test_no_hub_is_asked_offline(tmp_path, monkeypatch):
    """HF_HUB_OFFLINE: what is not in the cache is not there, said without loading `datasets`."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("datasets.load_dataset", lambda *arguments, **options: pytest.fail("asked"))
    with pytest.raises(ValidationError, match="owner/pairs: no such file .* HF_HUB_OFFLINE is set"):
        read("owner/pairs")


def test_a_hub_dataset(hub, monkeypatch):
    """What is asked of the hub, that its rows are streamed, and that it is said where they are from."""
    import datasets

    asked = []

    def answer(*arguments, **options):
        asked.append((arguments, options))
        return datasets.IterableDataset.from_generator(lambda: iter(ROWS))

    monkeypatch.setattr(datasets, "load_dataset", answer)
    reading = read("owner/pairs/folder:main", split="test", revision="v1")
    assert [record.row for record in reading] == PAIRS
    assert asked[0] == (
        ("owner/pairs", "main"),
        {"data_dir": "folder", "split": "test", "revision": "v1", "streaming": True},
    )
    assert reading.sources[0].fingerprint == "hub:abc:main:folder:test"
    assert "no such file or folder here; read as a dataset of the Hugging Face hub" in reading.notes()[0]


def test_rows_that_a_program_holds_are_read_as_a_file_s_are(tmp_path):
    """Every container that a notebook has them in; what is none is named."""
    import datasets
    import polars as pl

    rows = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b", "topic": i} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = load(tmp_path / "rows.jsonl")
    dataset = datasets.Dataset.from_list(rows)
    for given in (
        rows,
        tuple(rows),
        iter(rows),
        dataset,
        dataset.to_iterable_dataset(),
        dataset.to_pandas(),
        pl.DataFrame(rows),
    ):
        assert load(given) == wanted
    first = next(iter(read(dataset)))
    assert (first.source, first.index, first.columns) == ("3 rows in memory", 0, {"topic": 0})
    assert (
        read(rows).sources[0].fingerprint
        == read(dataset).sources[0].fingerprint
        != read(rows[:2]).sources[0].fingerprint
    )
    with pytest.raises(ValidationError, match="3 rows in memory, row 2: 'chosen' is blank"):
        load([rows[0], rows[1] | {"chosen": ""}, rows[2]])
    with pytest.raises(UsageError, match="DatasetDict of train: take one of them"):
        load(datasets.DatasetDict({"train": dataset}))
    with pytest.raises(UsageError, match="found int"):
        load(3)
