"""The views that people query, made anew from what the tables hold now.

Kept in the database as the views of the recipe registered or scored last, together with what was imported. For a query narrowed to a recipe
or to sources they are made as temporary views of the reading connection, which DuckDB finds first.

Values of different fingerprints are never mixed: `scored` shows a measurement's columns from one fingerprint only, and a line of
`trajectories` belongs to one set of weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable

from curate.rows import ROW_COLUMNS, content_id
from curate.store import imported_columns
from curate.store.imports import VALUES
from curate.store.narrowing import Placed, ViewFacts
from curate.store.own_columns import OwnColumn, own_columns
from curate.store.readings import HIDDEN, MARK, PLAIN
from curate.store.recipes import trajectories_table
from curate.store.sql import Connection, literal, literals, one, quote
from curate.store.tables import table_of

FIRST = "1152921504606846976"  # 2**60: a held-out occurrence comes after every training one
TRAJECTORY = {
    "n_samples": "DOUBLE",
    "n_correct": "DOUBLE",
    "accuracy": "DOUBLE",
    "target_nll": "DOUBLE",
    "trained": "BOOLEAN",
}
BASE = ROW_COLUMNS
OCCURRENCE = ("row_id", "source", "index", "role")


VERSION = "3"  # of what the views show: a store whose views an earlier curate made gets them anew for every query


def define(con: Connection) -> None:
    """(Re)make the views that are others now, for the recipe registered or scored last."""
    facts = ViewFacts(con)
    bodies = {view: body() for view, body in _bodies(facts).items()}
    # a view remembers the types of its columns, so those of the tables count too
    prints = {view: content_id([body, sorted(facts.tables.items())]) for view, body in bodies.items()}
    made = (
        {}
        if outdated(con)
        else json.loads((one(con, "SELECT value FROM data.meta WHERE key = 'views made'") or ["{}"])[0])
    )
    for view, body in bodies.items():
        if made.get(view) != prints[view]:
            con.execute(f"CREATE OR REPLACE VIEW main.{view} AS {body}")
    con.execute(
        "INSERT OR REPLACE INTO data.meta VALUES ('views', ?), ('views made', ?)", [VERSION, json.dumps(prints)]
    )


def outdated(con: Connection) -> bool:
    """Whether the views in the database were made by an earlier curate."""
    return one(con, "SELECT value FROM data.meta WHERE key = 'views'") != (VERSION,)


def narrow(facts: ViewFacts, text: str) -> ViewFacts:
    """Make the views that a query names, for the connection of its facts only."""
    for view, body in _bodies(facts).items():
        if view in text.lower() and view not in facts.made:
            facts.con.execute(f"CREATE OR REPLACE TEMP VIEW {view} AS {body()}")
            facts.made.add(view)
    return facts


def _bodies(facts: ViewFacts) -> dict[str, Callable[[], str]]:
    """view -> what makes its SQL, since finding out costs queries."""
    hidden = f"row_id NOT IN ({HIDDEN})" if not facts.only and facts.any_waits else ""
    near = f"row_id IN (SELECT row_id FROM {facts.occurring})" if facts.only else hidden
    asked = literal((facts.recipe or "").removeprefix(MARK))
    called = _called(facts.name or "")
    return {
        "rows": lambda: _narrowed(f"SELECT {', '.join(BASE)} FROM ({_rows(facts)})", hidden),
        "scored": lambda: _narrowed(_scored(facts), hidden),
        "trajectories": lambda: _narrowed(_trajectories(facts, called), near),
        "samples": lambda: _narrowed(
            "SELECT s.row_id, n.run, n.checkpoint, n.step, s.sample, s.text, s.correct, s.n_tokens, s.logp, s.finished, s.reasoning, "
            "coalesce(s.outcome, CASE WHEN s.correct THEN 'right' WHEN NOT s.correct AND s.finished THEN 'wrong' END) AS outcome "
            f"FROM data.samples s JOIN ({called}) n USING (fingerprint) WHERE s.fingerprint IN ({literals(facts.uses)}) "
            "AND s.fingerprint NOT IN (SELECT fingerprint FROM data.measured WHERE measurement = 'perturbed')",  # of other problems
            near,
        ),
        "occurrences": lambda: _occurrences(facts),
        "dataset_values": lambda: (
            "SELECT name, run, checkpoint, value, low, high, n, step FROM data.dataset_values "
            + f"WHERE origin = {literal(facts.name or '')} OR starts_with(origin, 'import:')"
        ),
        "runs": lambda: (
            "SELECT id, recipe, command, version, started, finished, outcome, message, counts FROM data.runs"
            + (f" WHERE recipe = {asked}" if facts.recipe is not None else "")
        ),
        "selections": lambda: _narrowed(
            f"SELECT d.selection, d.row_id, d.kept, d.rank, d.reason, {_decided(facts)} FROM data.decisions d"
            + (
                f" WHERE d.selection IN (SELECT name FROM data.selections WHERE recipe = {asked})"
                if facts.recipe is not None
                else ""
            ),
            near,
        ),
    }


def _decided(facts: ViewFacts) -> str:
    """What decided, of a row's decision; unknown where an earlier curate decided."""
    if "rule" in facts.columns("decisions"):
        return "d.rule, d.value, d.cut"
    return "NULL::VARCHAR AS rule, NULL::DOUBLE AS value, NULL::DOUBLE AS cut"


def _rows(facts: ViewFacts) -> str:
    """Rows with their first occurrence: source, index, role and the user's columns (JSON)."""
    if facts.each_once:
        return (
            f"SELECT r.*, {PLAIN.replace('source', 'o.source')} AS source, o.index, o.role, o.columns, 1::BIGINT AS n_occurrences "
            f"FROM data.rows r JOIN (SELECT * FROM {facts.occurring}) o USING (row_id)"
        )
    return (
        f"SELECT r.*, {PLAIN.replace('source', 'o.source')} AS source, o.index, o.role, o.columns, "
        "coalesce(f.n_occurrences, 0) AS n_occurrences FROM data.rows r "
        f"{'JOIN' if facts.only else 'LEFT JOIN'} (SELECT row_id, count(*) AS n_occurrences, "
        f"min(CASE WHEN role = 'train' THEN seq ELSE seq + {FIRST} END) % {FIRST} AS seq FROM {facts.occurring} GROUP BY row_id) f USING (row_id) "
        "LEFT JOIN data.occurrences o ON o.seq = f.seq"
    )


def _scored(facts: ViewFacts) -> str:
    picked, joins, taken = _measured(facts)
    more, join, _ = _imported(facts, taken)
    picked += [*more, *(own.picked("r.columns") for own in own_columns(facts.own_types, taken))]
    return f"SELECT {', '.join(picked)} FROM ({_rows(facts)}) r {' '.join([*joins, *join])}"


def _measured(facts: ViewFacts) -> tuple[list[str], list[str], dict[str, str]]:
    """The columns of `scored` that curate itself made, the row, its scores, its measurements: what is picked, the joins that it needs, and the
    names (in lower case -> as they are).
    """
    picked = [f"r.{name}" for name in BASE] + ["r.index"]
    taken = {name: name for name in (*BASE, "index")}
    joins = []
    if facts.scores_table and (scores := facts.columns(facts.scores_table)):
        names = _free(scores, taken)
        if facts.joined is None or facts.scores_table in facts.joined:
            picked += [f"s.{quote(n)}" for n in names]
            joins.append(f"LEFT JOIN data.{quote(facts.scores_table)} s ON s.row_id = r.row_id")
    shown = sorted((m for m in facts.measured if m.fingerprint in facts.plain), key=lambda m: m.measurement)
    for i, m in enumerate(shown):
        table = table_of(m.measurement)
        names = _free(facts.columns(table), taken)
        if facts.joined is not None and table not in facts.joined:
            continue
        picked += [f"p{i}.{quote(n)}" for n in names]
        joins.append(
            f"LEFT JOIN (SELECT * FROM data.{quote(table)} WHERE fingerprint = {literal(m.fingerprint)}) p{i} ON p{i}.row_id = r.row_id"
        )
    return picked, joins, taken


def column_tables(facts: ViewFacts) -> dict[str, str]:
    """A column of `scored`, in lower case -> the table that it comes from, of scores and measurements."""
    shown = sorted((m for m in facts.measured if m.fingerprint in facts.plain), key=lambda m: m.measurement)
    tables = [*([facts.scores_table] if facts.scores_table else []), *(table_of(m.measurement) for m in shown)]
    taken = {name: name for name in (*BASE, "index")}
    return {name.lower(): table for table in tables for name in _free(facts.columns(table), taken)}


def tables_named(facts: ViewFacts, text: str) -> frozenset[str]:
    """The tables of scores and measurements that may have a column which a query names."""
    names = text.lower()
    tables = [facts.scores_table or "", *(table_of(m.measurement) for m in facts.measured)]
    return frozenset(t for t in tables if t and any(column.lower() in names for column in facts.columns(t)))


def _imported(facts: ViewFacts, taken: dict[str, str]) -> tuple[list[str], list[str], list[OwnColumn]]:
    """Imported columns, the same whatever the recipe: (what is picked, the join, their names). One whose name a score or a measured column has
    is called imported_<name>.
    """
    columns = imported_columns.shown(facts.imported)
    if not columns:
        return [], [], []
    facts.columns(VALUES)  # whose types the view is made of
    picked, names = [], []
    for name in columns:
        holder = taken.get(name.lower(), "")
        (shown,) = _free([name], taken) or _free([f"imported_{name}"], taken) or ("",)
        if shown:
            picked.append(f"i.{quote(name)} AS {quote(shown)}")
            names.append(OwnColumn(name, shown, "", "" if shown == name else holder, imported=True))
    return picked, [f"LEFT JOIN ({imported_columns.shown_table(columns)}) i ON i.row_id = r.row_id"], names


def own_names(facts: ViewFacts, planned: Collection[str] = ()) -> dict[str, list[OwnColumn]]:
    """view -> the user's columns in it, for `scored` and `occurrences`, imported ones first. planned: columns that `scored` will have once all
    is measured.
    """
    taken = _measured(facts)[2]
    taken.update({name.lower(): name for name in planned if name.lower() not in taken})
    imported = _imported(facts, taken)[2]
    return {
        "scored": [*imported, *own_columns(facts.own_types, taken)],
        "occurrences": own_columns(facts.own_types, OCCURRENCE),
    }


def _free(names: Iterable[str], taken: dict[str, str]) -> list[str]:
    """Names that no earlier column has (SQL does not see case); they are taken from now on."""
    free = []
    for name in names:
        if name.lower() not in taken:
            taken[name.lower()] = name
            free.append(name)
    return free


def _occurrences(facts: ViewFacts) -> str:
    base = [f"{PLAIN} AS source" if name == "source" else name for name in OCCURRENCE]
    picked = [*base, *(own.picked("columns") for own in own_columns(facts.own_types, OCCURRENCE))]
    return f"SELECT {', '.join(picked)} FROM {facts.occurring}"


def _called(recipe: str) -> str:
    """(fingerprint, run, checkpoint, step): what a recipe calls the models that a fingerprint is of, a line each; of others their names in
    data.measured, which are those of the recipe that ran last.
    """
    line = '{"fingerprint": "VARCHAR", "run": "VARCHAR", "checkpoint": "VARCHAR", "step": "BIGINT"}'
    own = f"SELECT unnest(from_json(value, '[{line}]'), recursive := true) FROM data.meta WHERE key = {literal(f'places of {recipe}')}"
    return (
        f"{own} UNION ALL BY NAME SELECT fingerprint, run, checkpoint, step FROM data.measured "
        f"WHERE fingerprint NOT IN (SELECT fingerprint FROM ({own}))"
    )


def _followed(facts: ViewFacts) -> dict[str, list[str]]:
    """measurement -> its fingerprints in `trajectories`: of one measurement of one set of weights the one used last."""
    last: dict[tuple[object, ...], Placed] = {}
    for m in facts.measured:  # the oldest first
        if m.fingerprint in facts.uses and m.reads != "tokens":
            key = (m.measurement, m.run, m.checkpoint, m.step, m.model_fingerprint, m.reads == "import")
            if key not in last or last[key].created < m.created:
                last[key] = m
    columns: dict[str, list[str]] = {}
    for m in sorted(last.values(), key=lambda m: m.measurement):
        columns.setdefault(m.measurement, []).append(m.fingerprint)
    return columns


def _trajectories(facts: ViewFacts, called: str) -> str:
    """row × run × checkpoint. Beside the measurements the scores that have a value at every checkpoint."""
    parts, names = [], dict(TRAJECTORY)
    for measurement, fingerprints in _followed(facts).items():
        table = table_of(measurement)
        there = facts.columns(table)
        names.update({n: kind for n, kind in there.items() if n not in names})
        picked = ", ".join(f"t.{quote(n)}" for n in there)
        parts.append(
            f"SELECT t.row_id, n.run, n.checkpoint, n.step, concat(m.model_fingerprint, m.reads = 'import') AS subject"
            f"{', ' + picked if picked else ''} FROM data.{quote(table)} t JOIN data.measured m USING (fingerprint) "
            f"JOIN ({called}) n USING (fingerprint) WHERE t.fingerprint IN ({literals(fingerprints)})"
        )
    nothing = ", ".join(f"NULL::{kind} AS {quote(n)}" for n, kind in TRAJECTORY.items())
    parts.append(
        "SELECT NULL::VARCHAR AS row_id, NULL::VARCHAR AS run, NULL::VARCHAR AS checkpoint, NULL::BIGINT AS step, NULL::VARCHAR AS subject, "
        f"{nothing} WHERE false"
    )
    columns = ", ".join(f"any_value({quote(n)}) AS {quote(n)}" for n in names)
    union = " UNION ALL BY NAME ".join(parts)
    lines = f"SELECT row_id, run, checkpoint, step, {columns} FROM ({union}) GROUP BY row_id, run, checkpoint, step, subject"
    if facts.scores_table is None:
        return lines
    each = trajectories_table(facts.scores_table)
    place = ("run", "checkpoint", "step")
    taken = {n.lower(): n for n in ("row_id", *place, *names)}
    scores = _free([name for name in facts.columns(each) if name not in place], taken)
    if not scores:
        return lines
    picked = ", ".join(f"s.{quote(n)}" for n in scores)
    return (
        f"SELECT t.*, {picked} FROM ({lines}) t LEFT JOIN data.{quote(each)} s ON s.row_id = t.row_id AND s.run = t.run "
        "AND s.checkpoint = t.checkpoint AND s.step IS NOT DISTINCT FROM t.step"
    )


def _narrowed(body: str, condition: str) -> str:
    return f"SELECT * FROM ({body}) WHERE {condition}" if condition else body
