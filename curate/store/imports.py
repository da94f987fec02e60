"""Imports as a store keeps them: what each one brought, so that its columns can be shown, and so that it can be taken back whole.

`data.imports` has a line an import, `data.imported_lines` its values as they came. `data.m_imported`, which everything reads, is these layers
on top of one another, the latest last. Both tables are made by the first import; what older versions imported is numbered then, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import pyarrow as pa

from curate.store.entries import DatasetValue, Measured
from curate.store.recipes import outdate
from curate.store.sql import Connection, first_column, literals, quote
from curate.store.tables import columns_of, merge, remember, table_of

MEASUREMENT = "imported"
VALUES = table_of(MEASUREMENT)
FIELDS = (
    "number", "file", "path", "origin", "how", "columns", "worst", "per_row", "fingerprints", "values_origin", "n_lines", "n_rows",
)  # fmt: skip
SCHEMA = """
CREATE TABLE IF NOT EXISTS data.imports (number BIGINT, file VARCHAR, path VARCHAR, origin VARCHAR, how VARCHAR, columns VARCHAR[],
    worst VARCHAR, per_row BOOLEAN, fingerprints VARCHAR[], values_origin VARCHAR, n_lines BIGINT, n_rows BIGINT, created TIMESTAMP);
CREATE TABLE IF NOT EXISTS data.imported_lines ("import number" BIGINT, fingerprint VARCHAR, row_id VARCHAR);
"""
NUMBER = '"import number"'  # with a space, so that no imported column has this name


@dataclass(frozen=True)
class Import:
    """One file's import.

    file: as it was named. path: where it lay. origin: the source, or the file, whose rows or ids it is about. how: how its lines found their
    rows, such as "on prompt_id"; "" for dataset values. worst: column -> the end that is bad. per_row: it names no run and no checkpoint,
    so that a row has one value of each column. values_origin: of its dataset values, "" for none.
    """

    number: int
    file: str
    path: str
    origin: str
    how: str
    columns: tuple[str, ...]
    worst: Mapping[str, Literal["high", "low"]] = field(default_factory=dict)
    per_row: bool = False
    fingerprints: tuple[str, ...] = ()
    values_origin: str = ""
    n_lines: int = 0
    n_rows: int = 0
    created: Any = None


def listed(con: Connection) -> list[Import]:
    """Every import by number; those of a store that older versions wrote are found in its tables, and numbered by their age."""
    imports = []
    if columns_of(con, "imports"):
        lines = con.execute(f"SELECT {', '.join(FIELDS)}, created FROM data.imports ORDER BY number").fetchall()
        for line in lines:
            of = dict(zip((*FIELDS, "created"), line, strict=True))
            of |= {
                "columns": tuple(of["columns"]),
                "fingerprints": tuple(of["fingerprints"]),
                "worst": json.loads(of["worst"]),
            }
            imports.append(Import(**of))
    return [*imports, *_unnumbered(con, imports)]


def _unnumbered(con: Connection, known: Sequence[Import]) -> list[Import]:
    """Imports without a line in data.imports: values of rows by their source, dataset values by their origin."""
    taken = {print for one in known for print in one.fingerprints}
    origins: dict[str, list[tuple[str, str, Any]]] = {}
    lines = con.execute(
        "SELECT created, fingerprint, checkpoint, step, params FROM data.measured WHERE reads = 'import' AND measurement = ?",
        [MEASUREMENT],
    ).fetchall()
    for created, print, checkpoint, step, params in sorted(lines, key=lambda line: line[:2]):
        if print not in taken:
            place = "" if checkpoint in (None, "") and step is None else "somewhere"
            origins.setdefault(json.loads(params or "{}").get("source", ""), []).append((print, place, created))
    old: list[tuple[Any, Import]] = []
    there = columns_of(con, VALUES) if origins else {}
    for origin, members in origins.items():
        prints = [print for print, _, _ in members]
        counts = ", ".join(f"count({quote(c)})" for c in there) or "0"
        n_lines, n_rows, *numbers = con.execute(
            f"SELECT count(*), count(DISTINCT row_id), {counts} FROM data.{quote(VALUES)} WHERE fingerprint IN ({literals(prints)})"
        ).fetchall()[0]
        columns = tuple(c for c, n in zip(there, numbers, strict=False) if n)
        per_row = len(members) == 1 and not members[0][1]
        one = Import(
            0, origin, "", origin, "row", columns, {}, per_row, tuple(prints), "", n_lines, n_rows, members[0][2]
        )
        old.append((members[0][2], one))
    ours = {one.values_origin for one in known}
    values: dict[str, list[str]] = {}
    for origin, name in sorted(
        con.execute("SELECT origin, name FROM data.dataset_values WHERE starts_with(origin, 'import:')").fetchall()
    ):
        values.setdefault(origin, []).append(name)
    for values_origin, names in values.items():
        if values_origin not in ours:
            origin, different = values_origin.removeprefix("import:"), tuple(dict.fromkeys(names))
            old.append(
                (None, Import(0, origin, "", origin, "", different, values_origin=values_origin, n_lines=len(names)))
            )
    old.sort(key=lambda pair: (pair[0] is None, str(pair[0] or "")))
    first = max([one.number for one in known], default=0) + 1
    return [Import(**{**vars(one), "number": first + i}) for i, (_, one) in enumerate(old)]


def ensure(con: Connection) -> list[Import]:
    """The tables of imports, with everything that was imported so far in them."""
    imports = listed(con)
    con.execute(SCHEMA)
    kept = first_column(con, "SELECT number FROM data.imports")
    for one in imports:
        if one.number not in kept:
            _insert(con, one)
            if one.fingerprints:
                picked = ", ".join(["fingerprint", "row_id", *map(quote, one.columns)])
                _add_lines(
                    con,
                    one,
                    f"SELECT {picked} FROM data.{quote(VALUES)} WHERE fingerprint IN ({literals(one.fingerprints)})",
                )
    return imports


def write(
    con: Connection,
    one: Import,
    measured: Sequence[Measured],
    values: pa.Table | None,
    dataset_values: Sequence[DatasetValue],
) -> tuple[Import, tuple[int, ...]]:
    """Keep an import. Returns it with its number, and the numbers of earlier ones that it replaces whole: they are gone then."""
    earlier = ensure(con)
    number = max([old.number for old in earlier], default=0) + 1
    one = replace(one, number=number, values_origin=f"import:{number}:{one.origin}" if dataset_values else "")
    for record in measured:
        remember(con, record)
    if values is not None:
        con.register("import_view", values)
        con.execute("CREATE OR REPLACE TEMP TABLE incoming AS SELECT * FROM import_view")
        con.unregister("import_view")
        _add_lines(con, one, "SELECT * FROM incoming")
        merge(con, VALUES, "incoming")
        con.execute("DROP TABLE incoming")
    _insert(con, one)
    gone = [old.number for old in earlier if old.fingerprints and values is not None and _covered(con, old, one)]
    for old in gone:
        con.execute(f"DELETE FROM data.imported_lines WHERE {NUMBER} = ?", [old])
    if dataset_values:
        gone += _replace_dataset_values(con, one, dataset_values, earlier)
    for old in gone:
        con.execute("DELETE FROM data.imports WHERE number = ?", [old])
    outdate(con, one.fingerprints)
    outdate_selections(con, one.columns if values is not None else ())
    return one, tuple(gone)


def _covered(con: Connection, old: Import, new: Import) -> bool:
    """Whether nothing of an older import is left to be seen below a new one."""
    if not (set(old.columns) <= set(new.columns) and set(old.fingerprints) <= set(new.fingerprints)):
        return False
    left = (
        f"SELECT count(*) FROM (SELECT fingerprint, row_id FROM data.imported_lines WHERE {NUMBER} = ? "
        f"EXCEPT SELECT fingerprint, row_id FROM data.imported_lines WHERE {NUMBER} = ?)"
    )
    return bool(con.execute(left, [old.number, new.number]).fetchall()[0][0] == 0)


def _replace_dataset_values(
    con: Connection, one: Import, dataset_values: Sequence[DatasetValue], earlier: Sequence[Import]
) -> list[int]:
    """The values of the same name, run and checkpoint go, and with them the imports that have none left."""
    rows = [[one.values_origin, *asdict(value).values()] for value in dataset_values]
    names = ", ".join(asdict(dataset_values[0]))
    marks = ", ".join("?" * len(rows[0]))
    same = "name = ? AND run = ? AND checkpoint = ? AND step IS NOT DISTINCT FROM ?"
    for value in dataset_values:
        con.execute(
            f"DELETE FROM data.dataset_values WHERE starts_with(origin, 'import:') AND {same}",
            [value.name, value.run, value.checkpoint, value.step],
        )
    same_file = [
        old for old in earlier if old.values_origin and old.origin == one.origin and old.path in ("", one.path)
    ]
    for old in same_file:  # the file again: what it no longer says is gone
        con.execute(
            f"DELETE FROM data.dataset_values WHERE origin = ? AND name IN ({literals(v.name for v in dataset_values)})",
            [old.values_origin],
        )
    for row in rows:
        con.execute(f"INSERT INTO data.dataset_values (origin, {names}) VALUES ({marks})", row)
    left = first_column(con, "SELECT DISTINCT origin FROM data.dataset_values")
    return [old.number for old in earlier if old.values_origin and old.values_origin not in left]


def outdate_selections(con: Connection, columns: Iterable[str]) -> list[str]:
    """Selections whose rules name one of these columns are known to be old. Returns them, in words."""
    words = [re.compile(rf"\b{re.escape(c)}\b", re.IGNORECASE) for c in columns]
    old = []
    for name, spec in con.execute("SELECT name, spec FROM data.selections ORDER BY name").fetchall():
        if any(word.search(spec or "") for word in words):
            con.execute("UPDATE data.meta SET value = '' WHERE key = ?", [f"selection of {name}"])
            old.append(f"the selection {name!r}")
    return old


def _insert(con: Connection, one: Import) -> None:
    values = [getattr(one, name) for name in FIELDS]
    values[FIELDS.index("worst")] = json.dumps(dict(one.worst))
    for name in ("columns", "fingerprints"):
        values[FIELDS.index(name)] = list(getattr(one, name))
    marks = ", ".join("?" * len(values))
    con.execute(
        f"INSERT INTO data.imports ({', '.join(FIELDS)}, created) VALUES ({marks}, coalesce(?, now()::TIMESTAMP))",
        [*values, one.created],
    )


def _add_lines(con: Connection, one: Import, query: str) -> None:
    """An import's values as they came."""
    there = columns_of(con, "imported_lines")
    for name, kind in con.execute(f"SELECT column_name, column_type FROM (DESCRIBE {query})").fetchall():
        if name not in ("fingerprint", "row_id") and name not in there:
            con.execute(f"ALTER TABLE data.imported_lines ADD COLUMN {quote(name)} {kind}")
    con.execute(f"INSERT INTO data.imported_lines BY NAME SELECT {one.number} AS {NUMBER}, * FROM ({query})")
