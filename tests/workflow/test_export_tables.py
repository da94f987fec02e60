"""An export as tables of the store is the export of its rows one by one, to the last type and value, over rows and columns of every sort."""

from __future__ import annotations

import base64
import json
import random
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from curate.data import Record
from curate.data.arrow_types import read_types
from curate.data.spooled import spooled
from curate.rows import Example, Pair
from curate.store import Store
from curate.store import selected as selected_file
from curate.store.decisions import Decisions, Reason
from curate.workflow.export import Beside, _rows
from curate.workflow.export_tables import ByRows, parts_of

SORTS = ("pairs", "chats", "tools", "examples", "prompts", "unpaired", "mixed styles")


def row_of(sort: str, i: int, random: random.Random):
    text = " ".join(random.choice(["ä", "b\n", "c\u0000"[:1], '"d"', "€"]) for _ in range(3)) + f" {i}"
    turns = lambda role, said: ({"role": role, "content": said},)  # noqa: E731
    if sort == "mixed styles":
        sort = "pairs" if i % 9 else "chats"
    if sort == "pairs":
        return Pair(text, f" {text}+", f" {text}-")
    if sort == "chats":
        prompt = turns("system", "x") + turns("user", text) if i % 3 else turns("user", text)
        return Pair(prompt, turns("assistant", f"{text}+"), turns("assistant", f"{text}-"))
    if sort == "tools":
        call = {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": text, "arguments": {"b": i, "a": None}}}],
        }
        given = {"tools": [{"name": text}]} if i % 2 else {"chat_template_kwargs": {"enable_thinking": i % 4 == 0}}
        return Pair(turns("user", text), (call,), turns("assistant", f"{text}-"), json.dumps(given) if i % 3 else "")
    if sort == "unpaired":
        return Example(text, f" {text}!", None, i % 2 == 0)
    return Example(text, None if sort == "prompts" else f" {text}!", None if i % 4 else str(i))


def columns_of(i: int, random: random.Random) -> dict:
    every = {
        "whole": i,
        "real": i / 3,
        "either": i if i % 2 else i + 0.5,
        "truth": i % 3 == 0,
        "text": f"t {i}\n'\"",
        "nothing": None,
        "bytes": "<79 bytes>" if i % 5 == 0 else "a",
        "list": [i, i + 1],
        "deep": {"a": [f"{i}"], "b": None},
        "several": random.choice([1, "1", True, [1]]),
        "huge": 2**70 if i % 7 == 0 else i,
        "when": "2026-01-02T03:04:05",
        "n": i,
        "N": str(i),
        "a/b~c 'd'": float(i),
        "row_id": f"mine {i}",
        "prompt": "another",
        "reason": "mine",
        "score": i,
    }
    return {name: (None if random.random() < 0.1 else value) for name, value in every.items() if random.random() < 0.97}


def made(folder, sort: str, seed: int) -> tuple[Store, str]:
    own, rng = random.Random(seed), np.random.default_rng(seed)
    store = Store(folder / "store", create=True)
    rows = [row_of(sort, i, own) for i in range(60)]
    for source in ("one.jsonl", "two.jsonl"):
        picked = [own.choice(rows) for _ in range(50)]
        store.add_source(source, "f", [Record(source, i, row, columns_of(i, own)) for i, row in enumerate(picked)])
    ids = store.row_ids_of()
    if seed % 3 == 1:
        ids += store.add_foreign_rows("elsewhere", ["k1", "k2"], kind="preference")
    store.register_recipe("r", "", sources=["one.jsonl", "two.jsonl", "elsewhere"])
    n = len(ids)
    scores = {
        "score_x": np.where(rng.random(n) < 0.2, np.nan, rng.normal(size=n)),
        "flag": rng.random(n) < 0.5,
        "name": np.array([None if i % 5 == 0 else f"n{i}" for i in range(n)], np.dtypes.StringDType(na_object=None)),
        "unknown": np.full(n, np.nan),
        "score": rng.integers(1, 9, n).astype(float),
    }
    store.write_scores("r", ids, scores)
    kept = rng.random(n) < 0.6
    kept[60:] = kept[-2:] = False
    kept[0] = True
    value = lambda i: None if i % 3 == 0 else float(rng.normal() * 10.0 ** rng.integers(-9, 9))  # noqa: E731
    reasons = [Reason("where", f"because {i % 4}", value(i), value(i) if i % 2 else None) for i in range(n)]
    reasons = [r if r.value is not None else Reason(r.rule, r.text) for r in reasons]
    spec = {"duplicates": "as_found" if seed % 2 else "once"}
    store.write_selection(
        "s", Decisions(ids, kept, np.arange(n), reasons, {"kept": int(kept.sum())}), recipe="r", spec=spec
    )
    return store, "s"


def told(kinds: dict[str, pa.DataType]) -> dict[str, str]:
    return {
        name: base64.b64encode(pa.schema([(name, kind)]).serialize().to_pybytes()).decode()
        for name, kind in kinds.items()
    }


TYPES = told(
    {
        "whole": pa.int32(),
        "real": pa.float64(),
        "when": pa.timestamp("us"),
        "text": pa.large_string(),
        "truth": pa.int64(),
    }
)


def all_of(part) -> tuple:
    tables = list(part.tables())
    whole = pa.concat_tables(tables) if tables else part.schema().empty_table()
    return (
        part.schema(),
        whole.to_pylist(),
        part.n_rows,
        set(part.own),
        dict(part.called),
        part.texts_of_several(),
        set(part.without_bytes()),
    )


def both(
    store: Store,
    name: str,
    tmp_path,
    *,
    format: str,
    chat: bool,
    asked: list[str],
    weight: str | None,
    types: dict[str, str],
):
    selection = store.selection(name)
    loaded = SimpleNamespace(name="r")
    beside = Beside(loaded, store, [*asked, *([weight] if weight else [])])
    (tmp_path / "rows").mkdir(exist_ok=True)
    (tmp_path / "tables").mkdir(exist_ok=True)
    rows = [
        _rows(part, w, asked, beside, chat=chat)
        for part, w in ((selection.kept(), weight), (selection.dropped(), None))
    ]
    with spooled(
        tmp_path / "rows", *rows, format, read_types(types), needs_weights=False, as_json=selection.holds_more_than_text
    ) as parts:
        slow = [all_of(parts.kept), all_of(parts.dropped), parts.kind, parts.layout, parts.total]
    names = [one for one in asked if one not in beside.own]
    with parts_of(
        selection, tmp_path / "tables", format=format, chat=chat, asked=names, weight=weight, types=types
    ) as parts:
        fast = [all_of(parts.kept), all_of(parts.dropped), parts.kind, parts.layout, parts.total]
    return slow, fast


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("sort", SORTS[:-1])
def test_tables_are_the_rows(tmp_path, monkeypatch, sort, seed):
    monkeypatch.setattr(selected_file, "BATCH", 17)
    store, name = made(tmp_path, sort, seed)
    # the half of all six that this seed has not; the other seed has the rest
    for at, format in enumerate(("trl", "prompt_completion", "messages")):
        if sort == "prompts" and format != "trl":
            continue
        for chat in (False, True) if sort == "prompts" else (bool((at + seed) % 2),):
            asked = ["score_x", "flag", "name", "unknown", "whole", "user_score"] if chat else []
            weight = "score" if sort == "pairs" and seed % 2 else None
            slow, fast = both(
                store,
                name,
                tmp_path,
                format=format,
                chat=chat,
                asked=asked,
                weight=weight,
                types=TYPES if seed % 2 else {},
            )
            for part in (0, 1):
                for what, a, b in zip(
                    ("schema", "rows", "n", "own", "called", "as text", "bytes"), slow[part], fast[part], strict=True
                ):
                    assert a == b, (format, chat, part, what)
            assert slow[2:] == fast[2:]


def test_rows_of_two_styles_go_one_by_one(tmp_path):
    store, name = made(tmp_path, "mixed styles", 0)
    with (
        pytest.raises(ByRows),
        parts_of(store.selection(name), tmp_path, format="trl", chat=False, asked=[], weight=None, types={}) as parts,
    ):
        list(parts.kept.tables())
