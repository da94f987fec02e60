"""Reading: rows by position, users' queries with errors that name the nearest column, and what a store holds."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import pyarrow as pa

from curate.errors import UsageError, did_you_mean
from curate.rows import Example, Pair, Row, text_from_column
from curate.store import allowed
from curate.store.asking import answer
from curate.store.readings import HIDDEN, NO_RECIPE_WAITS, WAITS, any_waits
from curate.store.sql import Connection, one, quote
from curate.store.tables import table_of
from curate.store.values import ids_view

if TYPE_CHECKING:
    import polars as pl

FEW = 1024  # rows that are asked for by a list: to register a table would load pandas
VIEWS = ("rows", "scored", "trajectories", "samples", "occurrences", "dataset_values", "runs", "selections")
STEM = {"preference": ("prompt", "chosen", "rejected"), "sft": ("prompt", "completion", "answer")}


def dicts(con: Connection, text: str, params: Sequence[Any] = ()) -> list[dict[str, Any]]:
    """A small result as dicts."""
    cursor = con.execute(text, list(params))
    names = [d[0] for d in cursor.description or []]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def rows_of(
    con: Connection,
    sources: Sequence[str] | None,
    *,
    kind: str | None = None,
    role: str | None = None,
    row_ids: Sequence[str] | None = None,
    with_text: bool = False,
    without: str | None = None,
    limit: int | None = None,
) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Positions and row ids, by position: rows that occur in `sources` with `role`, the first `limit` of them. with_text: those alone that have text.
    without: those with text that this measurement has no line for.
    """
    conditions, params = _occurring(con, sources, kind, role)
    if row_ids is not None:
        ids_view(con, row_ids)
        conditions.append("r.row_id IN (SELECT row_id FROM wanted_ids)")
    if with_text or without is not None:
        conditions.append("r.prompt IS NOT NULL")
    if without is not None:
        found = one(con, "SELECT measurement FROM data.measured WHERE fingerprint = ?", [without])
        if found:
            conditions.append(
                f"r.row_id NOT IN (SELECT row_id FROM data.{quote(table_of(found[0]))} WHERE fingerprint = ?)"
            )
            params.append(without)
    most = "" if limit is None else f" LIMIT {int(limit)}"
    found_rows = con.sql(
        f"SELECT r.position, r.row_id FROM data.rows r WHERE {' AND '.join(conditions)} ORDER BY r.position{most}",
        params=params,
    ).to_arrow_table()
    return found_rows.column(0), found_rows.column(1)


def styles(con: Connection, sources: Sequence[str] | None, kind: str) -> set[str]:
    """See `Store.styles`."""
    conditions, params = _occurring(con, sources, kind, None)
    text = f"SELECT DISTINCT r.style FROM data.rows r WHERE r.prompt IS NOT NULL AND {' AND '.join(conditions)}"
    return {row[0] for row in con.execute(text, params).fetchall()}


def rows_to_cover(con: Connection, sources: Sequence[str] | None, kind: str | None, what: str) -> pa.Table:
    """SQL of rows r, of those that occur in `sources`; where it asks for positions, by position."""
    conditions, params = _occurring(con, sources, kind, None)
    order = " ORDER BY r.position" if "r.position" in what else ""
    return con.sql(
        f"SELECT {what} FROM data.rows r WHERE {' AND '.join(conditions)}{order}", params=params
    ).to_arrow_table()


def _all_occur(con: Connection, sources: Sequence[str] | None, role: str | None) -> bool:
    """Whether one of these sources has all rows of the store, so that none has to be looked up."""
    text = "SELECT 1 FROM data.source_state WHERE (? IS NULL OR source IN (SELECT unnest(?::VARCHAR[]))) AND (? IS NULL OR role = ?) AND n_rows = "
    listed = None if sources is None else list(sources)
    return one(con, f"{text}(SELECT count(*) FROM data.rows)", [listed, listed, role, role]) is not None


def _occurring(
    con: Connection, sources: Sequence[str] | None, kind: str | None, role: str | None
) -> tuple[list[str], list[Any]]:
    """Conditions on rows r, with their parameters: that they occur in these sources, with this role, and are of this kind."""
    conditions: list[str] = ["true"]
    params: list[Any] = []
    if (sources is not None or role is not None) and not _all_occur(con, sources, role):
        inner = []
        if sources is not None:
            inner.append("o.source IN (SELECT unnest(?::VARCHAR[]))")  # to register a table would load pandas
            params.append(list(sources))
        if role is not None:
            inner.append("o.role = ?")
            params.append(role)
        conditions.append(f"r.row_id IN (SELECT o.row_id FROM data.occurrences o WHERE {' AND '.join(inner)})")
    if kind is not None:
        conditions.append("r.kind = ?")
        params.append(kind)
    return conditions, params


def positions(con: Connection, row_ids: Sequence[str]) -> np.ndarray:
    """(rows,) int64, -1 where unknown."""
    result = np.full(len(row_ids), -1, np.int64)
    if len(row_ids) <= FEW:
        lines = con.execute(
            "SELECT row_id, position FROM data.rows WHERE row_id IN (SELECT unnest(?::VARCHAR[]))", [list(row_ids)]
        ).fetchall()
        known = dict(lines)
        return np.array([known.get(row_id, -1) for row_id in row_ids], np.int64)
    ids_view(con, row_ids)
    stored = con.sql("SELECT i, position FROM data.rows JOIN wanted_ids USING (row_id)").to_arrow_table()
    result[stored.column(0).to_numpy()] = stored.column(1).to_numpy()
    return result


def rows_at(con: Connection, positions: np.ndarray) -> list[Row | None]:
    """Row objects at these positions, in this order. The range of positions is named, so that DuckDB skips the rest of the texts."""
    if not len(positions):
        return []
    listed, params = "wanted_positions", []
    if len(positions) <= FEW:
        listed = "(SELECT unnest(?::BIGINT[]) AS position, unnest(range(?)) AS i)"
        params = [positions.tolist(), len(positions)]
    else:
        con.register(listed, pa.table({"i": pa.array(np.arange(len(positions))), "position": pa.array(positions)}))
    lines = con.execute(
        "SELECT i, kind, style, prompt, chosen, rejected, completion, answer, label, template_args FROM data.rows "
        f"JOIN {listed} USING (position) WHERE position BETWEEN ? AND ? ORDER BY i",
        [*params, int(positions.min()), int(positions.max())],
    ).fetchall()
    return [_row(*values[1:]) for values in lines]


def _row(
    kind: str,
    style: Any,
    prompt: Any,
    chosen: Any,
    rejected: Any,
    completion: Any,
    answer: Any,
    label: Any,
    template_args: str | None,
) -> Row | None:
    if prompt is None:
        return None
    first = text_from_column(prompt, style)
    assert first is not None
    args = "" if template_args in (None, "{}") else str(template_args)
    if kind == "preference":
        good, bad = text_from_column(chosen, style), text_from_column(rejected, style)
        assert good is not None and bad is not None
        return Pair(first, good, bad, args)
    return Example(first, text_from_column(completion, style), answer, label, args)


def occurrence_counts(
    con: Connection, row_ids: Sequence[str], sources: Sequence[str] | None, role: str | None
) -> np.ndarray:
    """See `Store.occurrence_counts`."""
    result = np.zeros(len(row_ids))
    ids_view(con, row_ids)
    con.register("wanted_sources", pa.table({"source": pa.array(list(sources or ()), pa.string())}))
    narrowed = "" if sources is None else "AND o.source IN (SELECT source FROM wanted_sources)"
    counts = con.execute(
        f"SELECT i, count(*) FROM data.occurrences o JOIN wanted_ids USING (row_id) WHERE (?::VARCHAR IS NULL OR o.role = ?) {narrowed} GROUP BY i",
        [role, role],
    ).fetchall()
    for i, n in counts:
        result[i] = n
    return result


def run(con: Connection, text: str, params: Sequence[Any] | Mapping[str, Any] | None) -> pl.DataFrame:
    """A user's query to polars. Raises UsageError for what is wrong in it."""
    import polars as pl

    try:
        allowed.check_query(con, text)
        result = answer(con, text, params)
        if result is None:
            raise UsageError("expected a query that returns rows, such as SELECT row_id FROM rows LIMIT 5.")
        frame = pl.from_arrow(result)
        assert isinstance(frame, pl.DataFrame)
        return frame
    except duckdb.Error as error:
        explained = explain(con, error)
        if explained is None:
            raise
        raise explained from None


def csv_text(frame: pl.DataFrame) -> str:
    """A result as CSV; lists and mappings in it as JSON."""
    import polars as pl

    for name, kind in frame.schema.items():
        if kind.is_nested():
            values = [
                None if v is None else json.dumps(v, ensure_ascii=False, default=str) for v in frame[name].to_list()
            ]
            frame = frame.with_columns(pl.Series(name, values, pl.String))
    return frame.write_csv()


def explain(con: Connection, error: duckdb.Error) -> UsageError | None:
    """What is wrong with a user's SQL, with the nearest name; None where the fault is not the query's."""
    text = str(error)
    first = text.splitlines()[0]
    if (problem := allowed.refused(error)) is not None:
        return problem
    column = re.search(
        r'Referenced (?:column|table) "([^"]+)"|does not have a column named "([^"]+)"|column named "([^"]+)"', text
    )
    if isinstance(error, duckdb.BinderException) and column:
        name = next(g for g in column.groups() if g)
        listed = "SELECT DISTINCT column_name FROM duckdb_columns() WHERE NOT internal AND (schema_name = 'main' OR database_name = 'temp')"
        names = [row[0] for row in con.execute(listed).fetchall()]
        if name in names:  # of another view than the one that was asked
            having = (
                "SELECT DISTINCT table_name FROM duckdb_columns() WHERE column_name = ? AND NOT internal "
                "AND (schema_name = 'main' OR database_name = 'temp') ORDER BY 1"
            )
            views = [row[0] for row in con.execute(having, [name]).fetchall() if row[0] in VIEWS]
            if views:
                return UsageError(f"no column {name!r} in this view; it is one of {', '.join(views)}.")
        near = difflib.get_close_matches(name.lower(), [n.lower() for n in names], 3, 0.6)
        shown = [n for m in near for n in names if n.lower() == m]
        hint = (
            f"The nearest: {', '.join(dict.fromkeys(shown))}."
            if shown
            else "`curate sql STORE 'DESCRIBE scored'` lists the columns."
        )
        return UsageError(f"no column {name!r}. {hint}")
    table = re.search(r"Table with name (\S+) does not exist", text)
    if isinstance(error, duckdb.CatalogException) and table:
        hint = did_you_mean(table[1].lower(), VIEWS, f"There are: {', '.join(VIEWS)}.", show=str, sentence=True)
        return UsageError(f"no view {table[1]!r} in a store. {hint}")
    called = re.search(r"Function with name \"?(\S+?)\"? does not exist", text)
    if isinstance(error, duckdb.CatalogException) and called:
        known = {row[0] for row in con.execute("SELECT DISTINCT function_name FROM duckdb_functions()").fetchall()}
        hint = did_you_mean(
            called[1].lower(),
            known - allowed.NEVER,
            "It is DuckDB's SQL that is read here.",
            show="{}()".format,
            sentence=True,
        )
        return UsageError(f"no function {called[1]}() in SQL. {hint}")
    if isinstance(
        error, duckdb.ProgrammingError | duckdb.DataError | duckdb.NotSupportedError | duckdb.InvalidInputException
    ):
        line = re.search(r"^LINE \d+: .*$", text, re.M)
        return UsageError(f"{_in_words(error, first)}{' ' + line[0] if line else ''}")
    return None


def _in_words(error: duckdb.Error, first: str) -> str:
    """The first line of DuckDB's error without the name of its class, and what to write instead."""
    _, sign, message = first.partition(" Error: ")
    if not sign or isinstance(error, duckdb.ParserException):
        return first
    message = message.replace("STRING_LITERAL", "text").replace("INTEGER_LITERAL", "a number").removesuffix("!")
    cast = " A text column that holds numbers is compared as `column::DOUBLE`." if "VARCHAR and type" in first else ""
    if isinstance(error, duckdb.ConversionException):
        cast = " Write a value of the column's type, or TRY_CAST(… AS DOUBLE), which is NULL where that fails."
    return f"{message[:1].lower()}{message[1:].removesuffix('.')}.{cast}"


def find_row(con: Connection, text: str, folder: str) -> str:
    """See `Store.find_row`."""
    place = re.fullmatch(r"(.+)([:#])(\d{1,18})", text, re.DOTALL)
    if place:
        source, sign, at = place.groups()
        index = int(at) - (sign == "#")
        ids = con.execute(
            "SELECT DISTINCT row_id FROM data.occurrences WHERE source = ? AND index = ?", [source, index]
        ).fetchall()
        known = [
            row[0] for row in con.execute(f"SELECT DISTINCT source FROM data.occurrences WHERE NOT {WAITS}").fetchall()
        ]
        hint = f"Sources are: {', '.join(known)}."
    else:
        ids = (
            con.execute("SELECT row_id FROM data.rows WHERE starts_with(row_id, ?) LIMIT 3", [text]).fetchall()
            if len(text) >= 6
            else []
        )
        hint = "Give a row id, 6 or more of its first digits, source#row (from 1) or source:index (from 0)."
    if len(ids) == 1:
        return str(ids[0][0])
    raise UsageError(f"{folder}: {text!r} means {'several rows' if ids else 'no row'} of this store. {hint}")


def status(con: Connection) -> dict[str, Any]:
    """See `Store.status`."""
    measured = dicts(con, "SELECT * FROM data.measured ORDER BY run, step, created")
    for m in measured:
        m["params"] = json.loads(m["params"] or "{}")
    counts: dict[str, int] = {}
    for table in sorted({table_of(m["measurement"]) for m in measured}):
        counts.update(
            con.execute(f"SELECT fingerprint, count(*) FROM data.{quote(table)} GROUP BY fingerprint").fetchall()
        )
    for m in measured:
        m["n_rows"] = counts.get(m["fingerprint"], 0)
    last = dicts(con, "SELECT * EXCLUDE (host) FROM data.runs ORDER BY id DESC LIMIT 1")
    seen = f"WHERE row_id NOT IN ({HIDDEN})" if any_waits(con) else ""
    n_rows, n_text = con.execute(f"SELECT count(*), count(prompt) FROM data.rows {seen}").fetchall()[0]
    return {
        "rows": n_rows,
        "rows_without_text": n_rows - n_text,
        "samples": con.execute("SELECT count(*) FROM data.samples").fetchall()[0][0],
        "sources": dicts(con, f"SELECT * FROM data.source_state WHERE NOT {WAITS} ORDER BY read_at, source"),
        "measured": measured,
        "recipes": [
            row[0]
            for row in con.execute(
                f"SELECT name FROM data.recipes WHERE {NO_RECIPE_WAITS} ORDER BY updated DESC"
            ).fetchall()
        ],
        "selections": dicts(con, "SELECT name, recipe, counts, created FROM data.selections ORDER BY created DESC"),
        "runs": dicts(
            con,
            "SELECT * FROM data.runs WHERE outcome IS DISTINCT FROM 'refused' ORDER BY id DESC LIMIT 10",
        ),
        "refused": next((run for run in last if run["outcome"] == "refused"), None),
    }
