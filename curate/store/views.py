"""The views that people query, made anew from what the tables hold now.

Kept in the database as the views of the recipe registered or scored last, together with what was imported. For a query narrowed to a recipe
or to sources they are made as temporary views of the reading connection, which DuckDB finds first.

Values of different fingerprints are never mixed: `scored` shows a measurement's columns from one fingerprint only, and a line of
`trajectories` belongs to one set of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from curate.rows import ROW_COLUMNS
from curate.store import imported_columns, imports
from curate.store.narrowing import condition_of, occurring, recipe_of, visible
from curate.store.own_columns import OwnColumn, own_columns
from curate.store.readings import HIDDEN, MARK, PLAIN, any_waits
from curate.store.recipes import trajectories_table
from curate.store.sql import Connection, first_column, literal, literals, one, quote
from curate.store.tables import columns_of, table_of

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


VERSION = "2"  # of what the views show: a store whose views an earlier curate made gets them anew for every query


def define(con: Connection) -> None:
    """(Re)make every view, for the recipe registered or scored last."""
    for view, body in _bodies(con, None, None).items():
        con.execute(f"CREATE OR REPLACE VIEW main.{view} AS {body()}")
    con.execute("INSERT OR REPLACE INTO data.meta VALUES ('views', ?)", [VERSION])


def outdated(con: Connection) -> bool:
    """Whether the views in the database were made by an earlier curate."""
    return one(con, "SELECT value FROM data.meta WHERE key = 'views'") != (VERSION,)


def narrow(con: Connection, text: str, *, recipe: str | None, sources: Sequence[str] | None) -> None:
    """Make the views that a query names, for this connection only. Raises UsageError naming the nearest recipe or source."""
    for view, body in _bodies(con, recipe, sources).items():
        if view in text.lower():
            con.execute(f"CREATE OR REPLACE TEMP VIEW {view} AS {body()}")


def _bodies(con: Connection, recipe: str | None, sources: Sequence[str] | None) -> dict[str, Callable[[], str]]:
    """view -> what makes its SQL, since finding out costs queries. recipe None: the last one."""
    name, scores_table, uses, plain = recipe_of(con, recipe)
    only = condition_of(con, recipe, sources)
    if recipe is None:
        uses += first_column(con, "SELECT fingerprint FROM data.measured WHERE reads = 'import' ORDER BY created")
    plain = [*plain, *_lone_imports(con, plain)]
    occurs = occurring(con, only)
    hidden = f"row_id NOT IN ({HIDDEN})" if not only and any_waits(con) else ""
    near = f"row_id IN (SELECT row_id FROM {occurs})" if only else hidden
    of = literal((recipe or "").removeprefix(MARK))
    called = _called(name or "")
    return {
        "rows": lambda: _narrowed(f"SELECT {', '.join(BASE)} FROM ({_rows(occurs, bool(only))})", hidden),
        "scored": lambda: _narrowed(_scored(con, only, scores_table, plain), hidden),
        "trajectories": lambda: _narrowed(_trajectories(con, uses, scores_table, called), near),
        "samples": lambda: _narrowed(
            "SELECT s.row_id, n.run, n.checkpoint, n.step, s.sample, s.text, s.correct, s.n_tokens, s.logp, s.finished "
            f"FROM data.samples s JOIN ({called}) n USING (fingerprint) WHERE s.fingerprint IN ({literals(uses)}) "
            "AND s.fingerprint NOT IN (SELECT fingerprint FROM data.measured WHERE measurement = 'perturbed')",  # of other problems
            near,
        ),
        "occurrences": lambda: _occurrences(con, only),
        "dataset_values": lambda: (
            "SELECT name, run, checkpoint, value, low, high, n, step FROM data.dataset_values "
            + f"WHERE origin = {literal(name or '')} OR starts_with(origin, 'import:')"
        ),
        "runs": lambda: (
            "SELECT id, recipe, command, version, started, finished, outcome, message, counts FROM data.runs"
            + (f" WHERE recipe = {of}" if recipe is not None else "")
        ),
        "selections": lambda: _narrowed(
            f"SELECT d.selection, d.row_id, d.kept, d.rank, d.reason, {_decided(con)} FROM data.decisions d"
            + (
                f" WHERE d.selection IN (SELECT name FROM data.selections WHERE recipe = {of})"
                if recipe is not None
                else ""
            ),
            near,
        ),
    }


def _decided(con: Connection) -> str:
    """What decided, of a row's decision; unknown where an earlier curate decided."""
    if "rule" in columns_of(con, "decisions"):
        return "d.rule, d.value, d.cut"
    return "NULL::VARCHAR AS rule, NULL::DOUBLE AS value, NULL::DOUBLE AS cut"


def _lone_imports(con: Connection, plain: Sequence[str]) -> list[str]:
    """Measurements that a program put in once only, so that there is no choice which values a column shows. (Imported files: `_imported`.)"""
    lone = con.execute(
        "SELECT measurement, any_value(fingerprint) FROM data.measured WHERE reads = 'import' AND measurement <> ? "
        "GROUP BY measurement HAVING count(*) = 1 ORDER BY 1",
        [imports.MEASUREMENT],
    ).fetchall()
    taken = first_column(con, f"SELECT measurement FROM data.measured WHERE fingerprint IN ({literals(plain)})")
    return [fingerprint for measurement, fingerprint in lone if measurement not in taken]


def _rows(occurs: str, narrowed: bool) -> str:
    """Rows with their first occurrence: source, index, role and the user's columns (JSON)."""
    return (
        f"SELECT r.*, {PLAIN.replace('source', 'o.source')} AS source, o.index, o.role, o.columns, "
        "coalesce(f.n_occurrences, 0) AS n_occurrences FROM data.rows r "
        f"{'JOIN' if narrowed else 'LEFT JOIN'} (SELECT row_id, count(*) AS n_occurrences, "
        f"min(CASE WHEN role = 'train' THEN seq ELSE seq + {FIRST} END) % {FIRST} AS seq FROM {occurs} GROUP BY row_id) f USING (row_id) "
        "LEFT JOIN data.occurrences o ON o.seq = f.seq"
    )


def _scored(con: Connection, only: str, scores_table: str | None, plain: Sequence[str]) -> str:
    picked, joins, taken = _ours(con, scores_table, plain)
    picked += [own.picked("r.columns") for own in own_columns(con, taken, visible(con, only))]
    return f"SELECT {', '.join(picked)} FROM ({_rows(occurring(con, only), bool(only))}) r {' '.join(joins)}"


def _ours(
    con: Connection, scores_table: str | None, plain: Sequence[str]
) -> tuple[list[str], list[str], dict[str, str]]:
    """The columns of `scored` that are in no source: what is picked, the joins that it needs, and the names (in lower case -> as they are)."""
    picked, joins, taken = _measured(con, scores_table, plain)
    more, join, _ = _imported(con, taken)
    return [*picked, *more], [*joins, *join], taken


def _measured(
    con: Connection, scores_table: str | None, plain: Sequence[str]
) -> tuple[list[str], list[str], dict[str, str]]:
    """The part of `_ours` that curate itself made: the row, its scores, its measurements."""
    picked = [f"r.{name}" for name in BASE] + ["r.index"]
    taken = {name: name for name in (*BASE, "index")}
    joins = []
    if scores_table and (scores := columns_of(con, scores_table)):
        names = _free(scores, taken)
        picked += [f"s.{quote(n)}" for n in names]
        joins.append(f"LEFT JOIN data.{quote(scores_table)} s ON s.row_id = r.row_id")
    measured = con.execute(
        f"SELECT fingerprint, measurement FROM data.measured WHERE fingerprint IN ({literals(plain)}) ORDER BY measurement"
    ).fetchall()
    for i, (fingerprint, measurement) in enumerate(measured):
        names = _free(columns_of(con, table_of(measurement)), taken)
        picked += [f"p{i}.{quote(n)}" for n in names]
        table = f"data.{quote(table_of(measurement))}"
        joins.append(
            f"LEFT JOIN (SELECT * FROM {table} WHERE fingerprint = {literal(fingerprint)}) p{i} ON p{i}.row_id = r.row_id"
        )
    return picked, joins, taken


def _imported(con: Connection, taken: dict[str, str]) -> tuple[list[str], list[str], list[OwnColumn]]:
    """Imported columns, the same whatever the recipe: (what is picked, the join, their names). One whose name a score or a measured column has
    is called imported_<name>.
    """
    columns = imported_columns.shown(imports.listed(con))
    if not columns:
        return [], [], []
    picked, names = [], []
    for name in columns:
        holder = taken.get(name.lower(), "")
        (shown,) = _free([name], taken) or _free([f"imported_{name}"], taken) or ("",)
        if shown:
            picked.append(f"i.{quote(name)} AS {quote(shown)}")
            names.append(OwnColumn(name, shown, "", "" if shown == name else holder, imported=True))
    return picked, [f"LEFT JOIN ({imported_columns.shown_table(columns)}) i ON i.row_id = r.row_id"], names


def own_names(con: Connection, recipe: str | None, planned: Sequence[str] = ()) -> dict[str, list[OwnColumn]]:
    """view -> the user's columns in it, for `scored` and `occurrences`, imported ones first. planned: columns that `scored` will have once all
    is measured.
    """
    _, scores_table, _, plain = recipe_of(con, recipe)
    only = visible(con, condition_of(con, recipe, None))
    taken = _measured(con, scores_table, [*plain, *_lone_imports(con, plain)])[2]
    taken.update({name.lower(): name for name in planned if name.lower() not in taken})
    imported = _imported(con, taken)[2]
    return {"scored": [*imported, *own_columns(con, taken, only)], "occurrences": own_columns(con, OCCURRENCE, only)}


def _free(names: Iterable[str], taken: dict[str, str]) -> list[str]:
    """Names that no earlier column has (SQL does not see case); they are taken from now on."""
    free = []
    for name in names:
        if name.lower() not in taken:
            taken[name.lower()] = name
            free.append(name)
    return free


def _occurrences(con: Connection, only: str) -> str:
    base = [f"{PLAIN} AS source" if name == "source" else name for name in OCCURRENCE]
    picked = [*base, *(own.picked("columns") for own in own_columns(con, OCCURRENCE, visible(con, only)))]
    return f"SELECT {', '.join(picked)} FROM {occurring(con, only)}"


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


def _trajectories(con: Connection, uses: Sequence[str], scores_table: str | None, called: str) -> str:
    """row × run × checkpoint. Of one measurement of one set of weights the fingerprint used last counts. Beside the measurements the scores
    that have a value at every checkpoint.
    """
    fingerprints_of = con.execute(
        f"SELECT measurement, list(fingerprint) FROM (SELECT * FROM data.measured WHERE fingerprint IN ({literals(uses)}) AND reads <> 'tokens' "
        "QUALIFY row_number() OVER (PARTITION BY measurement, run, checkpoint, step, model_fingerprint, reads = 'import' "
        "ORDER BY created DESC, fingerprint) = 1) GROUP BY measurement ORDER BY measurement"
    ).fetchall()
    parts, names = [], dict(TRAJECTORY)
    for measurement, fingerprints in fingerprints_of:
        table = table_of(measurement)
        there = columns_of(con, table)
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
    each = trajectories_table(scores_table) if scores_table else ""
    place = ("run", "checkpoint", "step")
    taken = {n.lower(): n for n in ("row_id", *place, *names)}
    scores = _free([name for name in columns_of(con, each) if name not in place], taken)
    if not scores:
        return lines
    picked = ", ".join(f"s.{quote(n)}" for n in scores)
    return (
        f"SELECT t.*, {picked} FROM ({lines}) t LEFT JOIN data.{quote(each)} s ON s.row_id = t.row_id AND s.run = t.run "
        "AND s.checkpoint = t.checkpoint AND s.step IS NOT DISTINCT FROM t.step"
    )


def _narrowed(body: str, condition: str) -> str:
    return f"SELECT * FROM ({body}) WHERE {condition}" if condition else body
