"""Mutated inputs of every kind of file that curate reads: each is accepted with the values that an independent reader sees, or refused in words.

    python benchmarks/fuzz.py [--inputs 12000] [--seed 0] [--kind NAME …]        about two minutes on one core

A fault is an error that is not curate's own (a traceback to a user), an input that takes longer than SECONDS, or one that is accepted with other
values than json, csv, pyarrow, PyYAML or safetensors read from the same bytes. Inputs are mutated from small ones of each kind: as bytes (flipped,
cut, repeated, with words that break readers), and as values (any part of a JSON or YAML tree replaced). In process, seeded: `--seed S --kind NAME`
does the same again, and `--keep FOLDER` keeps the inputs that are faults. Prints a table; exit 1 where there is a fault.
"""

from __future__ import annotations

import argparse
import copy
import csv
import gzip
import io
import json
import math
import os
import random
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import yaml

from curate.console import table
from curate.errors import CurateError
from curate.recipe.bounds import is_deep

SECONDS = 5.0  # one input may take; the slowest kind takes a hundredth
WORDS = [
    *(
        b"\x00",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\r",
        b"\n",
        b"\n\n",
        b'"',
        b"'",
        b"\\",
        b",",
        b";",
        b"\t",
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b"#",
        b"&a",
        b"*a",
    ),
    *(
        b"null",
        b"true",
        b"NaN",
        b"Infinity",
        b"-0",
        b"1e999",
        b"1e-999",
        b"0x1f",
        b"9" * 400,
        b"9" * 5000,
        b"-1",
        b"1_000",
        b"007",
    ),
    *(
        b"[" * 2000,
        b'{"a":' * 300,
        b'"\\ud800"',
        b"\\u0000",
        "\u2028".encode(),
        "é".encode(),
        b"\xc3",
        b"<<: *a",
        b"!!python/name:os.system",
        b"a" * 20000,
    ),
]
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**63,
        -(2**63) - 1,
        10**400,
        0.5,
        -0.0,
        1e308,
        math.nan,
        math.inf,
        "",
        " ",
        "x",
        "\0",
        "n\0m",
        "\ud800",
        "é",
    ),
    *(
        "9" * 400,
        "1e5",
        "a" * 20000,
        "../../x",
        "/",
        "~",
        "{}",
        "[]",
        "{x}",
        "{x:>999999999}",
        "null",
        [],
        {},
        [[]],
        [None],
        [{}],
        {"": 1},
        {"a": {"b": []}},
    ),
    *(
        ["a", 1],
        [1, "a", None],
        {"role": "user", "content": "x"},
        [{"role": "user", "content": None}],
        [{"from": "gpt", "value": "x"}],
        [True],
        [0.5, 1],
    ),
]


class Fault(Exception):
    """Accepted, with other values than an independent reader sees."""


@dataclass
class Kind:
    """seeds: valid inputs. check: reads one from a file; raises CurateError where it refuses, Fault where what it accepted is wrong."""

    name: str
    file: str
    seeds: list[bytes]
    check: Callable[[Path], None]
    tree: Callable[[bytes], Any] | None = None  # the values of an input, to be changed
    text: Callable[[Any], bytes] | None = None  # and written again


@dataclass
class Count:
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    faults: list[tuple[int, str]] = field(default_factory=list)


# ---- mutations ---------------------------------------------------------------------------------------------------------------------------------


def mutated(kind: Kind, rng: random.Random) -> bytes:
    """One input of a kind: some changes of its bytes, or of its values."""
    data = rng.choice(kind.seeds)
    if kind.tree and kind.text and rng.random() < 0.5:
        value = copy.deepcopy(kind.tree(data))
        for _ in range(rng.choice((1, 1, 2, 4))):
            value = other_value(value, rng)
        try:
            data = kind.text(value)
        except Exception:  # nothing that this kind of file can hold
            pass
        if rng.random() < 0.7:
            return data
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        data = other_bytes(data, rng)
    return data


def other_bytes(data: bytes, rng: random.Random) -> bytes:
    at, to = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    change = rng.randrange(7)
    if change == 0 and data:
        at = rng.randrange(len(data))
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if change == 1:
        return data[:at] + data[min(to, at + rng.choice((1, 4, 40))) :]
    if change == 2:
        return data[:at]
    if change == 3:
        return data[:at] + rng.randbytes(rng.choice((1, 2, 8))) + data[at:]
    if change == 4:
        return data[:at] + data[at:to] * rng.choice((2, 3)) + data[to:]
    word = rng.choice(WORDS)
    return data[:at] + word + data[at if change == 5 else min(len(data), at + len(word)) :]


def other_value(value: Any, rng: random.Random) -> Any:
    """The tree with one of its parts changed: replaced, left out, or under another name."""
    places = list(parts(value, ()))
    place = rng.choice(places)
    if not place:
        return copy.deepcopy(rng.choice(VALUES))
    above = value
    for key in place[:-1]:
        above = above[key]
    change = rng.randrange(6)
    if change == 0:
        del above[place[-1]]
    elif change == 1 and isinstance(above, dict):
        name = rng.choice(
            ["", "x", "n\0m", "\ud800", "a" * 300, str(place[-1]).upper(), f"{place[-1]} ", *map(str, above)]
        )
        above[name] = above.pop(place[-1])
    elif change == 2 and isinstance(above, list):
        above.extend(copy.deepcopy(above[:3]))
    else:
        above[place[-1]] = copy.deepcopy(rng.choice(VALUES))
    return value


def parts(value: Any, place: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    yield place
    for key, inside in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield from parts(inside, (*place, key))


# ---- the run -----------------------------------------------------------------------------------------------------------------------------------


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """TimeoutError after so many seconds."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fuzz(kinds: list[Kind], inputs: int, seed: int, folder: Path, keep: Path | None = None) -> dict[str, Count]:
    """So many inputs, as many of each kind, and what became of them."""
    counts = {kind.name: Count() for kind in kinds}
    for kind in kinds:  # what is imported for it is not to be cut off by the limit
        for data in kind.seeds:
            (folder / kind.file).write_bytes(data)
            with suppress(CurateError):
                kind.check(folder / kind.file)
    for number in range(inputs):
        kind = kinds[number % len(kinds)]
        count, rng = counts[kind.name], random.Random(f"{seed}/{kind.name}/{number // len(kinds)}")
        data = mutated(kind, rng)
        file = folder / kind.file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
        count.inputs += 1
        try:
            with limited(SECONDS), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                kind.check(file)
            count.accepted += 1
        except CurateError as error:
            count.refused += 1
            if len(str(error)) > 4000 or "Traceback" in str(error):
                count.faults.append(
                    (number // len(kinds), f"a message of {len(str(error)):,} characters: {str(error)[:200]}")
                )
        except Exception as error:
            count.faults.append((number // len(kinds), f"{type(error).__name__}: {str(error)[:200]}{where(error)}"))
            if keep:
                keep.mkdir(parents=True, exist_ok=True)
                (
                    keep / f"{kind.name.replace(' ', '_')}-{seed}-{number // len(kinds)}{''.join(file.suffixes)}"
                ).write_bytes(data)
    return counts


def where(error: BaseException) -> str:
    """The last line of curate's that an error went through."""
    trace, found = error.__traceback__, ""
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if f"{os.sep}curate{os.sep}" in name:
            found = f" ({Path(name).name}:{trace.tb_lineno})"
        trace = trace.tb_next
    return found


def same(ours: Any, theirs: Any) -> bool:
    """Equal as JSON is: NaN is NaN, 1 is not True, tuples are lists."""
    if isinstance(theirs, float) and isinstance(ours, float):
        return ours == theirs or (math.isnan(ours) and math.isnan(theirs))
    if isinstance(theirs, dict):
        return isinstance(ours, dict) and ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in theirs)
    if isinstance(theirs, list | tuple):
        return isinstance(ours, list | tuple) and len(ours) == len(theirs) and all(map(same, ours, theirs))
    return type(ours) is type(theirs) and ours == theirs


def hold(ours: Any, theirs: Any) -> None:
    if not same(ours, theirs):
        raise Fault(f"read {ours!r:.150}, another reader {theirs!r:.150}")


# ---- the kinds ---------------------------------------------------------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {"prompt": "What is 1 + 1?", "completion": "2", "topic": "maths", "n": 3, "more": {"a": [1, None]}},
    {"prompt": "And 2 + 2?", "completion": "4", "topic": "maths", "n": 0.5, "more": {"a": []}},
    {"prompt": "Name a colour.", "completion": "red", "topic": None, "n": -7, "more": None},
]
PAIRS = [
    {
        "prompt": [{"role": "user", "content": "hi"}],
        "chosen": [{"role": "assistant", "content": c}],
        "rejected": "no",
        "score": s,
    }
    for c, s in (("yes", 1), ("ja", 2))
]


def json_lines_of(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def lines_tree(data: bytes) -> Any:
    return [json.loads(line) for line in data.splitlines()]


def read_whole(file: Path) -> list[Any]:
    """Through everything that a source goes through before the store: (what the file's reader gave, what became of it)."""
    from curate.data.files import rows_of_file
    from curate.data.reading import read

    raw = [row for *_, row in rows_of_file(file, file.name)]
    reading = read(file)
    for record in reading:
        json.dumps(record.columns, allow_nan=False).encode()
        if record.row is not None:
            record.row.row_id.encode()
    list(read(file).good("drop"))
    return raw


def check_jsonl(file: Path) -> None:
    raw = read_whole(file)
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    lines = [line for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]
    if len(raw) != len(lines):
        raise Fault(f"{len(raw)} rows of {len(lines)} lines")
    for row, line in zip(raw, lines, strict=True):
        if isinstance(row, dict):
            hold(row, json.loads(line))


def check_json(file: Path) -> None:
    raw = read_whole(file)
    text = file.read_bytes().decode("utf-8-sig")
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, list):
        if len(raw) != len(value):
            raise Fault(f"{len(raw)} rows of {len(value)}")
        for row, wanted in zip(raw, value, strict=True):
            if isinstance(row, dict) and not is_deep(wanted):
                hold(row, wanted)
    elif text.lstrip().startswith("["):
        raise Fault("accepted, and no JSON to another reader")


def check_csv(file: Path) -> None:
    raw = read_whole(file)
    rows = list(csv.reader(io.StringIO(file.read_bytes().decode("utf-8-sig"), newline="")))
    header, rest = rows[0], [row for row in rows[1:] if row]
    if len(raw) != len(rest):
        raise Fault(f"{len(raw)} rows of {len(rest)}")
    for row, cells in zip(raw, rest, strict=True):
        if isinstance(row, dict):
            hold(row, dict(zip(header, cells, strict=True)))


def check_parquet(file: Path) -> None:
    import pyarrow.parquet as pq

    raw = read_whole(file)
    hold(raw, pq.read_table(file).to_pylist())


def parquet_of(rows: list[Any], **options: Any) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, **options)
    return sink.getvalue()


def parquet_tree(data: bytes) -> Any:
    import pyarrow.parquet as pq

    return pq.read_table(io.BytesIO(data)).to_pylist()


RECIPES = [
    b"""kind: preference
source: {path: rows.jsonl, columns: {prompt: question}, limit: 10, split: train}
models: &m {reference: base, checkpoints: [a, b], on_broken_checkpoint: skip}
tokens: {max_length: 512, truncation: drop}
engine: {dtype: float32, seed: 3, token_budget: 4096}
sampling: {samples: 4, temperature: 0.7, stop: ["\\n"], grader: {regex: "(\\\\d+)"}}
scores:
- flip_loss: {beta: 0.1, as: f}
- ches
select: {where: "f > 0.5", drop_worst: {ches: 0.1}, order_by: "f desc", keep: {share: 0.5}, per: {topic: {a: 0.2, b: {rows: 3}}}}
export: {to: out, columns: [f], format: trl}
""",
    b"kind: sft\nsource: rows.jsonl\nheldout: {path: held.jsonl, split: 1.10}\nscores: [target_nll]\n"
    b"engine: {sampler: openai}\nserver: {url: 'http://u:p@h/v1', timeout: 3.5}\n",
]


def check_recipe(file: Path) -> None:
    from curate.recipe.load import load_recipe

    loaded = load_recipe(file)
    names = yaml.load(file.read_text("utf-8"), yaml.BaseLoader)
    if set(names) != set(loaded.raw):
        raise Fault(f"keys {sorted(loaded.raw)}, another reader {sorted(names)}")
    again = load_recipe(yaml.safe_load(loaded.text))
    hold(again.recipe.model_dump(), loaded.recipe.model_dump())


def yaml_of(value: Any) -> bytes:
    return yaml.safe_dump(value, allow_unicode=True, sort_keys=False).encode()


MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 6,
    "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "eos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
HEADER = {
    "model.embed_tokens.weight": {"dtype": "F32", "shape": [6, 2], "data_offsets": [0, 48]},
    "__metadata__": {"format": "pt"},
}


def safetensors_of(header: Any) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(48)


def header_tree(data: bytes) -> Any:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def tokenizer_of() -> dict[str, Any]:
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", "a", "b", " "])}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "pre_tokenizer": None, "post_processor": None,
        "decoder": None, "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }  # fmt: skip


TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "</s>",
    "model_max_length": 64,
    "chat_template": "{{ messages }}",
}
ADAPTER = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "base_model_name_or_path": "base",
    "target_modules": ["q_proj"],
    "use_rslora": False,
    "rank_pattern": {"q_proj": 4},
    "alpha_pattern": {"v_proj": 8},
}
TRAINER = {
    "global_step": 20,
    "log_history": [{"step": 10, "learning_rate": 0.1, "loss": 2.0}, {"step": 20, "learning_rate": 0.05}],
}


def model_folder(folder: Path, changed: Path) -> Path:
    """A model's folder in which one file is the mutated one."""
    whole = {
        "config.json": json.dumps(MODEL).encode(), "model.safetensors": safetensors_of(HEADER), "tokenizer.json": json.dumps(tokenizer_of()).encode(),
        "tokenizer_config.json": json.dumps(TOKENIZER_CONFIG).encode(), "generation_config.json": b'{"eos_token_id": [2, 1]}',
        "trainer_state.json": json.dumps(TRAINER).encode(),
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    for name, data in whole.items():
        if not (folder / name).exists() or name == changed.name:
            (folder / name).write_bytes(changed.read_bytes() if name == changed.name else data)
    return folder


def in_model(check: Callable[[Path], None]) -> Callable[[Path], None]:
    """A check of a model's folder; the file is put back afterwards."""

    def checked(file: Path) -> None:
        folder = model_folder(file.parent / "last", file)
        try:
            check(folder)
        finally:
            (folder / file.name).unlink()

    return checked


def check_config(folder: Path) -> None:
    from curate.models.checkpoints import single_model
    from curate.models.fingerprints import stop_ids
    from curate.passes.tokenizer import context_length
    from curate.plan.embeddings import embedding_rows
    from curate.plan.identity import end_tokens

    checkpoint = single_model(str(folder), folder)
    end_tokens(folder)
    try:
        stops = json.loads((folder / "generation_config.json").read_bytes().decode())["eos_token_id"]
    except (ValueError, KeyError, TypeError, RecursionError):
        stops = None
    if isinstance(stops, list) and all(type(i) is int for i in stops):
        hold(stop_ids(folder), stops)
    rows, wanted = embedding_rows(checkpoint), json.loads((folder / "config.json").read_text("utf-8"))
    hold(rows, 6)
    length = context_length(folder)
    if length is not None and not isinstance(wanted.get("text_config"), dict):
        hold(length, wanted.get("max_position_embeddings", length))


def check_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer

    from curate.passes.tokenizer import load_tokenizer, tokenizer_fingerprint

    tokenizer = load_tokenizer(folder)
    tokenizer_fingerprint(tokenizer)
    known = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    if len(set(known.values())) == len(known) and not known.items() <= tokenizer.get_vocab().items():
        raise Fault("another vocabulary")


def check_header(folder: Path) -> None:
    from safetensors import safe_open

    from curate.models.layouts import check_folder
    from curate.passes.loading.header import read_header

    check_folder(folder)
    _, found = read_header(folder / "model.safetensors")
    try:
        with safe_open(folder / "model.safetensors", framework="np") as opened:
            shapes = {name: list(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except Exception:  # what safetensors refuses, loading says in its words
        return
    hold({name: entry["shape"] for name, entry in found.items()}, shapes)


def check_trainer(folder: Path) -> None:
    from curate.models.checkpoints import find_checkpoints

    (found,) = find_checkpoints([str(folder)], folder)
    try:
        wanted = json.loads((folder / "trainer_state.json").read_bytes().decode())["global_step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        wanted = None
    if type(wanted) is int and abs(wanted) < 2**63:
        hold(found.step, wanted)


def check_adapter(file: Path) -> None:
    from curate.passes.loading.adapter_config import read_adapter_config

    (file.parent / "adapter").mkdir(exist_ok=True)
    (file.parent / "adapter" / "adapter_config.json").write_bytes(file.read_bytes())
    config = read_adapter_config(file.parent / "adapter")
    config.identity()
    hold(config.values, json.loads(file.read_text("utf-8")))
    config.rank, config.scaling("model.layers.0.q_proj", 2)


def check_cache(file: Path) -> None:
    from curate.models.fingerprints import FingerprintCache

    cache = FingerprintCache(file)
    known = dict(cache.known)
    if cache.kept("fuzz", lambda: "made") != known.get("fuzz", "made"):
        raise Fault("another value than the one that is kept")
    folder = model_folder(file.parent / "cached", file)
    hold(cache.positions(folder), 64)
    cache.beyond(folder, 5)


def check_few_shot(file: Path) -> None:
    from curate.plan.identity import few_shot_text
    from curate.recipe.load import load_recipe

    loaded = load_recipe({"kind": "sft", "sampling": {"few_shot": str(file)}})
    hold(few_shot_text(loaded), file.read_bytes().decode("utf-8"))


CARD = b"""---
license: mit
language: no
tags: [a, b]
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*.parquet}
version: 1.10 # mine
---
# My data

Written by hand.

<!-- curate: begin (rewritten by every export) -->
old
<!-- curate: end -->

The end.
"""


def check_card(file: Path) -> None:
    from curate.data.card import BEGIN, Card, card_text
    from curate.data.card_head import split_head
    from curate.data.export import old_card

    before = old_card(file)
    text = card_text(
        Card(), existing=before, split="train", n_rows=3, n_dropped=0, kind="sft", layout="trl sft, standard"
    )
    yaml.safe_load(split_head(text)[0])
    own = split_head(before or "")[1].partition(BEGIN)[0].strip()
    if own.replace("\r", "") not in text.replace("\r", ""):
        raise Fault("what a person wrote is gone")


def check_import(file: Path) -> None:
    from curate.store.importing.table import read_table

    found = read_table(file, {"row": "id", "value": "loss"})
    rows = list(csv.DictReader(io.StringIO(file.read_bytes().decode("utf-8-sig"), newline="")))
    hold(len(found.frame), len(rows))
    for ours, row in zip(found.frame["id"].to_list(), rows, strict=True):
        if ours is not None and str(ours) != row["id"]:
            raise Fault(f"read {ours!r}, another reader {row['id']!r}")


def kinds() -> list[Kind]:
    """Every kind of file that is read."""
    lines, pairs = json_lines_of(ROWS), json_lines_of(PAIRS)
    table_text = b'prompt,completion,n,topic\nq,a,1,x\n"a, b","c\nd",007,\n'
    by_column = json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}).encode()

    def rows_text(value: Any) -> bytes:
        return json_lines_of(value if isinstance(value, list) else [value])

    def packed(text: bytes) -> bytes:
        return gzip.compress(text, mtime=0)

    def unpacked_tree(data: bytes) -> Any:
        return lines_tree(gzip.decompress(data))

    plain_parquet = parquet_of(ROWS, compression="gzip", use_dictionary=False)

    def as_json(value: Any) -> bytes:
        return json.dumps(value).encode()

    def of_model(name: str, file: str, seed: Any, check: Callable[[Path], None]) -> Kind:
        return Kind(name, file, [as_json(seed)], in_model(check), json.loads, as_json)

    return [
        Kind("recipe", "recipe.yaml", RECIPES, check_recipe, yaml.safe_load, yaml_of),
        Kind("jsonl", "rows.jsonl", [lines, pairs], check_jsonl, lines_tree, rows_text),
        Kind("json", "rows.json", [as_json(ROWS), by_column, as_json({"data": ROWS})], check_json, json.loads, as_json),
        Kind("csv", "rows.csv", [table_text], check_csv),
        Kind("parquet", "rows.parquet", [parquet_of(ROWS), plain_parquet], check_parquet, parquet_tree, parquet_of),
        Kind("gz", "rows.jsonl.gz", [packed(lines), packed(pairs)], check_jsonl, unpacked_tree, lambda v: packed(rows_text(v))),
        Kind("imported csv", "losses.csv", [b"id,step,loss\na,1,0.5\nb,2,1e-3\n007,3,\n"], check_import),
        of_model("config.json", "config.json", MODEL, check_config),
        of_model("generation_config", "generation_config.json", {"eos_token_id": [2, 1]}, check_config),
        of_model("tokenizer.json", "tokenizer.json", tokenizer_of(), check_tokenizer),
        of_model("tokenizer_config", "tokenizer_config.json", TOKENIZER_CONFIG, check_tokenizer),
        Kind("safetensors", "model.safetensors", [safetensors_of(HEADER)], in_model(check_header), header_tree, safetensors_of),
        of_model("trainer log", "trainer_state.json", TRAINER, check_trainer),
        Kind("adapter config", "adapter_config.json", [as_json(ADAPTER)], check_adapter, json.loads, as_json),
        Kind("cache", "fingerprints.json", [b'{"fuzz": "x", "positions|y": "64"}'], check_cache, json.loads, as_json),
        Kind("few shots", "shots.txt", ["Q: 1 + 1? A: 2\n\nQ: é?\n".encode()], check_few_shot),
        Kind("card", "README.md", [CARD, b"# no head\n", b"---\n{a: 1}\n---\n"], check_card),
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", help="this kind alone (several times: these)")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the inputs that are faults go")
    a = parser.parse_args()
    chosen = [kind for kind in kinds() if not a.kind or kind.name in a.kind]
    with tempfile.TemporaryDirectory() as folder:
        counts = fuzz(chosen, a.inputs, a.seed, Path(folder), a.keep)
    lines: list[list[Any]] = [[name, c.inputs, c.accepted, c.refused, len(c.faults)] for name, c in counts.items()]
    lines.append(["all", *(sum(int(line[i]) for line in lines) for i in range(1, 5))])
    print(table(lines, head=("kind", "inputs", "accepted", "refused", "faults")))
    for name, count in counts.items():
        for number, what in count.faults[:20]:
            print(f"{name} {number}: {what}", file=sys.stderr)
    return 1 if any(c.faults for c in counts.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
