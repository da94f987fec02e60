"""Measurements, scores and decisions as tables: one wide table a measurement (`m_<name>`), one a recipe's scores (`scores_<name>`).

A table is made when its first values arrive and widened when a column appears. All functions take a connection inside a transaction.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from curate.errors import StoreError, UsageError, did_you_mean
from curate.models.naming import natural
from curate.rows import content_id
from curate.store.database import Connection, literal, one, quote
from curate.store.entries import Measured, Place, Trajectories
from curate.store.readings import NO_RECIPE_WAITS
from curate.store.shards import arrow_column, read_shard

if TYPE_CHECKING:
    from curate.store.decisions import Decisions

MEASURED = (
    "fingerprint",
    "measurement",
    "reads",
    "model",
    "model_fingerprint",
    "run",
    "checkpoint",
    "step",
    "engine",
    "params",
)


def table_of(measurement: str) -> str:
    """The table of a measurement, such as m_likelihood; a user's `package.module:name` keeps a hash of its full name."""
    plain = re.sub(r"\W+", "_", measurement.lower())
    return f"m_{plain}" if plain == measurement else f"m_{plain}_{content_id(measurement)[:6]}"


def columns_of(con: Connection, table: str) -> dict[str, str]:
    """name -> SQL type of a table's columns, without fingerprint and row_id; {} when there is no such table."""
    found = con.execute(
        "SELECT column_name, data_type FROM duckdb_columns() WHERE schema_name = 'data' AND table_name = ? ORDER BY column_index",
        [table],
    ).fetchall()
    return {name: kind for name, kind in found if name not in ("fingerprint", "row_id")}


def remember(con: Connection, measured: Measured) -> None:
    """Note what a fingerprint stands for; names for people (run, checkpoint, step, model path) are brought up to date."""
    values = [getattr(measured, name) for name in MEASURED]
    values[-1] = json.dumps(dict(measured.params), sort_keys=True, default=str)
    marks = ", ".join("?" * len(values))
    con.execute(
        f"INSERT INTO data.measured ({', '.join(MEASURED)}, created) VALUES ({marks}, now()::TIMESTAMP) "
        "ON CONFLICT (fingerprint) DO UPDATE SET model = excluded.model, run = excluded.run, checkpoint = excluded.checkpoint, step = excluded.step",
        values,
    )


def measured(con: Connection, wanted: Mapping[str, Any]) -> list[Measured]:
    """See `Store.measured`."""
    unknown = sorted(set(wanted) - set(MEASURED))
    if unknown:
        raise UsageError(f"no field {unknown[0]!r} of a measurement; there are {', '.join(MEASURED)}.")
    where = " AND ".join(f"{name} IS NOT DISTINCT FROM ?" for name in wanted) or "true"
    found = con.execute(
        f"SELECT {', '.join(MEASURED)} FROM data.measured WHERE {where} ORDER BY run, step NULLS FIRST, created, fingerprint",
        list(wanted.values()),
    ).fetchall()
    records = [
        Measured(**{**dict(zip(MEASURED, row, strict=True)), "params": json.loads(row[-1] or "{}")}) for row in found
    ]
    # Imported together, checkpoints without a step have nothing else to be ordered by than their names.
    order = {id(record): i for i, record in enumerate(records)}
    return sorted(
        records,
        key=lambda m: (
            m.run,
            m.step is not None,
            m.step or 0,
            natural(m.checkpoint) if m.reads == "import" and m.step is None else (),
            order[id(m)],
        ),
    )


def known_columns(con: Connection, names: Sequence[str] | None) -> dict[str, list[str]]:
    """See `Store.known_columns`."""
    result: dict[str, list[str]] = {}
    for (measurement,) in con.execute("SELECT DISTINCT measurement FROM data.measured ORDER BY 1").fetchall():
        table = table_of(measurement)
        wanted = [c for c in columns_of(con, table) if names is None or c in names]
        if not wanted:
            continue
        counts = ", ".join(f"count({quote(c)}) > 0" for c in wanted)
        for fingerprint, *known in con.execute(
            f"SELECT fingerprint, {counts} FROM data.{quote(table)} GROUP BY 1"
        ).fetchall():
            result.setdefault(fingerprint, []).extend(c for c, k in zip(wanted, known, strict=True) if k)
    return result


def ingest(con: Connection, paths: Sequence[Path]) -> bool:
    """Shards into tables. True if a table or column or fingerprint is new to what the recipe registered last uses, so that views have to follow."""
    groups: dict[tuple[str, tuple[tuple[str, str], ...]], list[Path]] = {}
    records: dict[str, Measured] = {}
    for path in paths:
        record, schema = read_shard(path)
        records[record.fingerprint] = record
        groups.setdefault((record.fingerprint, tuple((f.name, str(f.type)) for f in schema)), []).append(path)
    known = {row[0] for row in con.execute("SELECT fingerprint FROM data.measured").fetchall()}
    for fingerprint, record in records.items():
        if (
            fingerprint not in known
        ):  # whoever measures more of it under another name says so when the run is whole (`remember`)
            remember(con, record)
    last = one(con, f"SELECT uses FROM data.recipes WHERE {NO_RECIPE_WAITS} ORDER BY updated DESC, name LIMIT 1")
    shown = set(last[0]) if last else set()
    changed = not shown.isdisjoint(set(records) - known)
    for (fingerprint, schema), files in groups.items():
        names = [name for name, _ in schema if name not in ("row_id", "samples")]
        listing = "[" + ", ".join(literal(str(f)) for f in files) + "]"
        source = f"read_parquet({listing})"
        picked = ", ".join(["row_id", *map(quote, names)])
        # a shard that was repeated after a kill may be here twice: its rows count once
        con.execute(
            f"CREATE OR REPLACE TEMP TABLE incoming AS SELECT {literal(fingerprint)} AS fingerprint, {picked} FROM {source} "
            "QUALIFY row_number() OVER (PARTITION BY row_id) = 1"
        )
        changed |= merge(con, table_of(records[fingerprint].measurement), "incoming") and fingerprint in shown
        if any(name == "samples" for name, _ in schema):
            _ingest_samples(con, fingerprint, source)
        con.execute("DROP TABLE incoming")
    return changed


def put(con: Connection, measurement: str, values: pa.Table) -> None:
    """A table with fingerprint, row_id and columns into the measurement's table."""
    arrays = {
        name: values[name] if name in ("fingerprint", "row_id") else arrow_column(values[name])
        for name in values.column_names
    }
    con.register("values_view", pa.table(arrays))
    con.execute(
        "CREATE OR REPLACE TEMP TABLE incoming AS SELECT * FROM values_view QUALIFY row_number() OVER (PARTITION BY fingerprint, row_id) = 1"
    )
    con.unregister("values_view")
    merge(con, table_of(measurement), "incoming")
    con.execute("DROP TABLE incoming")


def merge(con: Connection, table: str, incoming: str) -> bool:
    """Update the lines that are there, append the others. True if the table was made or widened."""
    arriving = {
        name: _column_type(kind)
        for name, kind in con.execute(f"SELECT column_name, column_type FROM (DESCRIBE {incoming})").fetchall()
        if name not in ("fingerprint", "row_id")
    }
    there = columns_of(con, table)
    exists = con.execute(
        "SELECT count(*) FROM duckdb_tables() WHERE schema_name = 'data' AND table_name = ?", [table]
    ).fetchall()[0][0]
    if not exists:
        con.execute(f"CREATE TABLE data.{quote(table)} (fingerprint VARCHAR, row_id VARCHAR)")
    lower = {name.lower(): name for name in there}
    changed = not exists
    for name, kind in arriving.items():
        if name.lower() not in lower:
            con.execute(f"ALTER TABLE data.{quote(table)} ADD COLUMN {quote(name)} {kind}")
            changed = True
        elif kind == "VARCHAR" and there[lower[name.lower()]] != "VARCHAR":
            con.execute(f"ALTER TABLE data.{quote(table)} ALTER COLUMN {quote(name)} TYPE VARCHAR")
            changed = True
    same = "t.fingerprint = i.fingerprint AND t.row_id = i.row_id"
    overlap = con.execute(
        f"SELECT count(*) FROM {incoming} i WHERE EXISTS (FROM data.{quote(table)} t WHERE {same})"
    ).fetchall()[0][0]
    if overlap and arriving:
        sets = ", ".join(f"{quote(n)} = i.{quote(n)}" for n in arriving)
        con.execute(f"UPDATE data.{quote(table)} t SET {sets} FROM {incoming} i WHERE {same}")
    fresh = f"WHERE NOT EXISTS (FROM data.{quote(table)} t WHERE {same})" if overlap else ""
    con.execute(f"INSERT INTO data.{quote(table)} BY NAME SELECT * FROM {incoming} i {fresh}")
    return changed


def _column_type(kind: str) -> str:
    if kind in ("BOOLEAN", "VARCHAR"):
        return kind
    return "DOUBLE"


def _ingest_samples(con: Connection, fingerprint: str, source: str) -> None:
    con.execute(
        f"DELETE FROM data.samples WHERE fingerprint = {literal(fingerprint)} AND row_id IN (SELECT row_id FROM {source})"
    )
    con.execute(
        f"INSERT INTO data.samples SELECT {literal(fingerprint)}, row_id, i::INTEGER - 1, s.text, s.correct, s.n_tokens, s.logp, s.finished FROM "
        f"(SELECT row_id, unnest(samples) AS s, generate_subscripts(samples, 1) AS i FROM "
        f"(SELECT row_id, samples FROM {source} QUALIFY row_number() OVER (PARTITION BY row_id) = 1))"
    )


def ids_view(con: Connection, row_ids: Sequence[str], name: str = "wanted_ids") -> None:
    """Make `row_ids` queryable as a table (i, row_id)."""
    con.register(
        name, pa.table({"i": pa.array(np.arange(len(row_ids))), "row_id": pa.array(list(row_ids), pa.string())})
    )


def _table_with(con: Connection, fingerprints: Sequence[str | None], names: Sequence[str]) -> str | None:
    """The one table where these fingerprints' columns are; None where nothing of them was ever measured."""
    known = [f for f in fingerprints if f is not None]
    marks = ", ".join("?" * len(known)) or "NULL"
    found = con.execute(
        f"SELECT DISTINCT measurement FROM data.measured WHERE fingerprint IN ({marks})", known
    ).fetchall()
    if len(found) > 1:
        raise ValueError(f"one measurement at a time, found {sorted(f[0] for f in found)}")
    if not found:
        return None
    table = table_of(found[0][0])
    there = columns_of(con, table)
    for name in names:
        if name not in there:
            hint = did_you_mean(name, there, f"it has {', '.join(there)}.", show=str)
            raise UsageError(f"the measurement {found[0][0]} has no column {name!r}; {hint}")
    return table


def series(
    con: Connection, fingerprints: Sequence[str | None], names: Sequence[str], row_ids: Sequence[str]
) -> dict[str, np.ndarray]:
    """See `Store.series`."""
    result = {name: np.full((len(row_ids), len(fingerprints)), np.nan) for name in names}
    table = _table_with(con, fingerprints, names)
    if table is None or not names or not len(row_ids):
        return result
    ids_view(con, row_ids)
    listed = [(k, f) for k, f in enumerate(fingerprints) if f is not None]
    con.register("wanted_prints", pa.table({"k": [k for k, _ in listed], "fingerprint": [f for _, f in listed]}))
    kinds = columns_of(con, table)
    text = [n for n in names if kinds[n] == "VARCHAR"]
    if text:
        raise UsageError(f"{text[0]} is text, not a number.")
    picked = ", ".join(f"t.{quote(n)}::DOUBLE" for n in names)
    found = con.sql(
        f"SELECT ids.i, p.k, {picked} FROM data.{quote(table)} t JOIN wanted_prints p USING (fingerprint) JOIN wanted_ids ids USING (row_id)"
    ).to_arrow_table()
    i, k = found.column(0).to_numpy(), found.column(1).to_numpy()
    for n, name in enumerate(names):
        result[name][i, k] = found.column(2 + n).to_numpy()  # NULL arrives as NaN
    return result


def texts(con: Connection, fingerprint: str, name: str, row_ids: Sequence[str]) -> list[str | None]:
    """See `Store.texts`."""
    result: list[str | None] = [None] * len(row_ids)
    table = _table_with(con, [fingerprint], [name])
    if table is not None and len(row_ids):
        ids_view(con, row_ids)
        column = quote(name)
        query = (
            f"SELECT i, {column}::VARCHAR FROM data.{quote(table)} JOIN wanted_ids USING (row_id) "
            f"WHERE fingerprint = ? AND {column} IS NOT NULL"
        )
        for i, value in con.execute(query, [fingerprint]).fetchall():
            result[i] = value
    return result


def samples(con: Connection, fingerprint: str, row_ids: Sequence[str]) -> list[list[dict[str, Any]]]:
    """See `Store.samples`."""
    result: list[list[dict[str, Any]]] = [[] for _ in row_ids]
    ids_view(con, row_ids)
    names = ("text", "correct", "n_tokens", "logp", "finished")
    query = f"SELECT i, {', '.join(names)} FROM data.samples JOIN wanted_ids USING (row_id) WHERE fingerprint = ? ORDER BY i, sample"
    for i, *values in con.execute(query, [fingerprint]).fetchall():
        result[i].append(dict(zip(names, values, strict=True)))
    return result


def n_answers(con: Connection, fingerprint: str, row_ids: Sequence[str]) -> dict[str, int]:
    """See `Store.n_answers`."""
    table = _table_with(con, [fingerprint], [])
    if table is None or not columns_of(con, table):
        return {}
    ids_view(con, row_ids)
    kept = "SELECT row_id, count(*) AS n FROM data.samples WHERE fingerprint = ? GROUP BY row_id"
    found = con.execute(
        f"SELECT row_id, coalesce(k.n, 0) FROM data.{quote(table)} JOIN wanted_ids USING (row_id) LEFT JOIN ({kept}) k USING (row_id) "
        "WHERE fingerprint = ?",
        [fingerprint, fingerprint],
    ).fetchall()
    return {row_id: int(n) for row_id, n in found}


def register_recipe(
    con: Connection, name: str, text: str, sources: Sequence[str], uses: Sequence[str], plain: Sequence[str]
) -> None:
    """See `Store.register_recipe`."""
    of = dict(con.execute("SELECT fingerprint, measurement FROM data.measured").fetchall())
    named = [of[f] for f in plain if f in of]
    twice = sorted({m for m in named if named.count(m) > 1})
    if twice:
        raise ValueError(f"`scored` can show one fingerprint of a measurement, found several of {twice[0]}")
    slug = f"scores_{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}_{content_id(name)[:6]}"
    con.execute(
        "INSERT INTO data.recipes VALUES (?, ?, ?, ?, ?, ?, now()::TIMESTAMP) ON CONFLICT (name) DO UPDATE SET "
        "text = excluded.text, sources = excluded.sources, uses = excluded.uses, plain = excluded.plain, updated = excluded.updated",
        [name, text, slug, list(sources), list(uses), list(plain)],
    )


def forget_recipe(con: Connection, name: str) -> None:
    """A recipe with its scores, dataset values and notes, as if it had never been registered."""
    found = one(con, "SELECT scores_table FROM data.recipes WHERE name = ?", [name])
    for table in (found[0], trajectories_table(found[0])) if found else ():
        con.execute(f"DROP TABLE IF EXISTS data.{quote(table)}")
    con.execute("DELETE FROM data.recipes WHERE name = ?", [name])
    con.execute("DELETE FROM data.dataset_values WHERE origin = ?", [name])
    con.execute(
        "DELETE FROM data.meta WHERE key IN (?, ?, ?)", [f"{what} of {name}" for what in ("places", "roles", "scores")]
    )


def trajectories_table(scores_table: str) -> str:
    """Where a recipe's scores at every checkpoint are: row_id, run, checkpoint, step, and a column a score."""
    return f"{scores_table}_at"


def write_scores(
    con: Connection,
    recipe: str,
    row_ids: Sequence[str],
    scores: Mapping[str, Any],
    trajectories: Sequence[Trajectories] = (),
) -> None:
    """See `Store.write_scores`."""
    found = one(con, "SELECT scores_table FROM data.recipes WHERE name = ?", [recipe])
    if found is None:
        raise StoreError(
            f"no recipe {recipe!r} is registered in this store; `curate run` does that before it writes scores."
        )
    arrays = {
        "row_id": pa.array(list(row_ids), pa.string()),
        **{name: arrow_column(values) for name, values in scores.items()},
    }
    con.register("scores_view", pa.table(arrays))
    con.execute(f"CREATE OR REPLACE TABLE data.{quote(found[0])} AS SELECT * FROM scores_view")
    con.unregister("scores_view")
    each = quote(trajectories_table(found[0]))
    con.execute(f"DROP TABLE IF EXISTS data.{each}")
    if trajectories:
        con.register(
            "scores_view",
            pa.concat_tables([_lines(one, arrays["row_id"]) for one in trajectories], promote_options="default"),
        )
        con.execute(f"CREATE TABLE data.{each} AS SELECT * FROM scores_view")
        con.unregister("scores_view")
    con.execute("UPDATE data.recipes SET updated = now()::TIMESTAMP WHERE name = ?", [recipe])


def _lines(one: Trajectories, row_ids: pa.Array) -> pa.Table:
    """A run's scores at every checkpoint, a line a row and checkpoint at which one is known."""
    columns = {name: arrow_column(values.ravel()) for name, values in one.values.items()}
    row, k = np.divmod(np.arange(len(row_ids) * len(one.places)), max(len(one.places), 1))
    checkpoints, steps = (
        pa.array([place[i] for place in one.places], kind) for i, kind in ((0, pa.string()), (1, pa.int64()))
    )
    lines = {
        "row_id": row_ids.take(pa.array(row)),
        "run": pa.repeat(pa.scalar(one.run), len(row)),
        "checkpoint": checkpoints.take(pa.array(k)),
        "step": steps.take(pa.array(k)),
    }
    known = np.logical_or.reduce([column.is_valid().to_numpy(zero_copy_only=False) for column in columns.values()])
    return pa.table({**lines, **columns}).filter(pa.array(known))


def note(con: Connection, key: str, value: str | None) -> None:
    """Keep a value under a key of the store's own; None forgets it."""
    con.execute("DELETE FROM data.meta WHERE key = ?", [key])
    if value is not None:
        con.execute("INSERT INTO data.meta VALUES (?, ?)", [key, value])


def note_places(con: Connection, recipe: str, places: Mapping[str, Sequence[Place]]) -> None:
    """See `Store.register_recipe`; the views read it (store/views.py)."""
    lines = [
        {"fingerprint": fingerprint, "run": run, "checkpoint": checkpoint, "step": step}
        for fingerprint, found in places.items()
        for run, checkpoint, step in found
    ]
    note(con, f"places of {recipe}", json.dumps(lines) if lines else None)


def places(con: Connection, recipe: str) -> dict[str, list[Place]]:
    """See `Store.places`."""
    kept = one(con, "SELECT value FROM data.meta WHERE key = ?", [f"places of {recipe}"])
    found: dict[str, list[Place]] = {}
    for line in json.loads(kept[0]) if kept else []:
        found.setdefault(line["fingerprint"], []).append((line["run"], line["checkpoint"], line["step"]))
    return found


def outdate(con: Connection, fingerprints: Sequence[str]) -> list[str]:
    """Values under these fingerprints have changed: what was made of them, scores and selections, is known to be old. Returns it, in words."""
    names = con.execute("SELECT name FROM data.recipes WHERE list_has_any(uses, ?)", [list(fingerprints)]).fetchall()
    old = []
    for what, word in (("scores", "the scores"), ("selection", "the selection")):
        for (name,) in names:
            key = f"{what} of {name}"
            if con.execute("SELECT count(*) FROM data.meta WHERE key = ?", [key]).fetchall()[0][0]:
                con.execute("UPDATE data.meta SET value = '' WHERE key = ?", [key])
                old.append(f"{word} {'of ' if what == 'scores' else ''}{name!r}")
    return old


def write_selection(
    con: Connection, name: str, decisions: Decisions, recipe: str | None, spec: Mapping[str, Any] | None
) -> bool:
    """See `Store.write_selection`. True if the table of decisions was widened, so that views have to follow."""
    widened = "rule" not in columns_of(con, "decisions")
    if widened:  # a store made before decisions had these
        for column, kind in (("rule", "VARCHAR"), ("value", "DOUBLE"), ("cut", "DOUBLE")):
            con.execute(f"ALTER TABLE data.decisions ADD COLUMN {column} {kind}")
    con.execute("DELETE FROM data.selections WHERE name = ?", [name])
    con.execute("DELETE FROM data.decisions WHERE selection = ?", [name])
    con.execute(
        "INSERT INTO data.selections VALUES (?, ?, ?, ?, now()::TIMESTAMP)",
        [name, recipe, json.dumps(dict(spec or {}), default=str), json.dumps(decisions.counts, default=str)],
    )
    rank = np.asarray(decisions.rank)
    table = pa.table(
        {
            "row_id": pa.array(list(decisions.row_ids), pa.string()),
            "kept": pa.array(np.asarray(decisions.kept, bool)),
            "rank": pa.array(rank, pa.int64(), mask=rank <= 0),
            "reason": pa.array([reason.text for reason in decisions.reasons], pa.string()),
            "rule": pa.array([reason.rule for reason in decisions.reasons], pa.string()),
            "value": pa.array([reason.value for reason in decisions.reasons], pa.float64()),
            "cut": pa.array([reason.cut for reason in decisions.reasons], pa.float64()),
        }
    )
    con.register("decisions_view", table)
    con.execute("INSERT INTO data.decisions BY NAME SELECT ? AS selection, * FROM decisions_view", [name])
    con.unregister("decisions_view")
    return widened


def drop_control(con: Connection, name: str) -> None:
    """Forget the control that was drawn beside an earlier selection of this name."""
    control = control_name(name)
    for (spec,) in con.execute("SELECT spec FROM data.selections WHERE name = ?", [control]).fetchall():
        if json.loads(spec or "{}").get("control_of") == name:
            con.execute("DELETE FROM data.selections WHERE name = ?", [control])
            con.execute("DELETE FROM data.decisions WHERE selection = ?", [control])


def control_name(name: str) -> str:
    """What the control beside a selection is called."""
    return f"{name}_control"
