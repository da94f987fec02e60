"""What a store keeps of a recipe: what it is about, its scores, its selections, and notes under keys of the store's own."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from curate.errors import StoreError
from curate.rows import content_id
from curate.store.decisions import Reason, Reasons
from curate.store.entries import Place, Trajectories
from curate.store.shards import arrow_column
from curate.store.sql import Connection, after_all, one, quote
from curate.store.tables import columns_of

if TYPE_CHECKING:
    from curate.store.decisions import Decisions


def register_recipe(
    con: Connection, name: str, text: str, sources: Sequence[str], uses: Sequence[str], plain: Sequence[str]
) -> None:
    """Note what a recipe reads and shows; an earlier line of this name is replaced. ValueError where `plain` has a measurement twice."""
    of = dict(con.execute("SELECT fingerprint, measurement FROM data.measured").fetchall())
    named = [of[f] for f in plain if f in of]
    twice = sorted({m for m in named if named.count(m) > 1})
    if twice:
        raise ValueError(f"`scored` can show one fingerprint of a measurement, found several of {twice[0]}")
    slug = f"scores_{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}_{content_id(name)[:6]}"
    con.execute(
        f"INSERT INTO data.recipes VALUES (?, ?, ?, ?, ?, ?, {after_all('data.recipes', 'updated')}) ON CONFLICT (name) DO UPDATE SET "
        "text = excluded.text, sources = excluded.sources, uses = excluded.uses, plain = excluded.plain, updated = excluded.updated",
        [name, text, slug, list(sources), list(uses), list(plain)],
    )


def forget_recipe(con: Connection, name: str) -> None:
    """Remove a recipe with its scores, dataset values and notes, as if it had never been registered."""
    registered = one(con, "SELECT scores_table FROM data.recipes WHERE name = ?", [name])
    for table in (registered[0], trajectories_table(registered[0])) if registered else ():
        con.execute(f"DROP TABLE IF EXISTS data.{quote(table)}")
    con.execute("DELETE FROM data.recipes WHERE name = ?", [name])
    con.execute("DELETE FROM data.dataset_values WHERE origin = ?", [name])
    con.execute(
        "DELETE FROM data.meta WHERE key IN (?, ?, ?)", [f"{what} of {name}" for what in ("places", "roles", "scores")]
    )


def trajectories_table(scores_table: str) -> str:
    """The name of the table of a recipe's scores at every checkpoint: row_id, run, checkpoint, step, and a column a score."""
    return f"{scores_table}_at"


def write_scores(
    con: Connection,
    recipe: str,
    row_ids: Sequence[str],
    scores: Mapping[str, Any],
    trajectories: Sequence[Trajectories] = (),
) -> None:
    """Put these scores, and those at every checkpoint, in the place of the recipe's earlier ones. StoreError where it is not registered."""
    registered = one(con, "SELECT scores_table FROM data.recipes WHERE name = ?", [recipe])
    if registered is None:
        raise StoreError(
            f"no recipe {recipe!r} is registered in this store; `curate run` does that before it writes scores."
        )
    arrays = {
        "row_id": pa.array(list(row_ids), pa.string()),
        **{name: arrow_column(values) for name, values in scores.items()},
    }
    con.register("scores_view", pa.table(arrays))
    con.execute(f"CREATE OR REPLACE TABLE data.{quote(registered[0])} AS SELECT * FROM scores_view")
    con.unregister("scores_view")
    each = quote(trajectories_table(registered[0]))
    con.execute(f"DROP TABLE IF EXISTS data.{each}")
    if trajectories:
        con.register(
            "scores_view",
            pa.concat_tables([_lines(one, arrays["row_id"]) for one in trajectories], promote_options="default"),
        )
        con.execute(f"CREATE TABLE data.{each} AS SELECT * FROM scores_view")
        con.unregister("scores_view")
    con.execute(f"UPDATE data.recipes SET updated = {after_all('data.recipes', 'updated')} WHERE name = ?", [recipe])


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
    """Note which run, checkpoint and step a recipe means by a fingerprint. The views show these names (store/views.py)."""
    lines = [
        {"fingerprint": fingerprint, "run": run, "checkpoint": checkpoint, "step": step}
        for fingerprint, named in places.items()
        for run, checkpoint, step in named
    ]
    note(con, f"places of {recipe}", json.dumps(lines) if lines else None)


def places(con: Connection, recipe: str) -> dict[str, list[Place]]:
    """fingerprint -> the (run, checkpoint, step) that a recipe means by it, as `note_places` noted them."""
    kept = one(con, "SELECT value FROM data.meta WHERE key = ?", [f"places of {recipe}"])
    result: dict[str, list[Place]] = {}
    for line in json.loads(kept[0]) if kept else []:
        result.setdefault(line["fingerprint"], []).append((line["run"], line["checkpoint"], line["step"]))
    return result


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
    """Put these decisions in the place of an earlier selection of this name. True if their table was widened, so that views have to follow."""
    widened = "rule" not in columns_of(con, "decisions")
    if widened:  # a store made before decisions had these
        for column, kind in (("rule", "VARCHAR"), ("value", "DOUBLE"), ("cut", "DOUBLE")):
            con.execute(f"ALTER TABLE data.decisions ADD COLUMN {column} {kind}")
    con.execute("DELETE FROM data.selections WHERE name = ?", [name])
    con.execute("DELETE FROM data.decisions WHERE selection = ?", [name])
    con.execute(
        f"INSERT INTO data.selections VALUES (?, ?, ?, ?, {after_all('data.selections', 'created')})",
        [name, recipe, json.dumps(dict(spec or {}), default=str), json.dumps(decisions.counts, default=str)],
    )
    rank = np.asarray(decisions.rank)
    table = pa.table(
        {
            "row_id": pa.array(list(decisions.row_ids), pa.string()),
            "kept": pa.array(np.asarray(decisions.kept, bool)),
            "rank": pa.array(rank, pa.int64(), mask=rank <= 0),
            **_reason_columns(decisions.reasons),
        }
    )
    con.register("decisions_view", table)
    con.execute("INSERT INTO data.decisions BY NAME SELECT ? AS selection, * FROM decisions_view", [name])
    con.unregister("decisions_view")
    return widened


def _reason_columns(reasons: Sequence[Reason]) -> dict[str, pa.Array]:
    if isinstance(reasons, Reasons):
        return reasons.columns()
    columns: dict[str, list[Any]] = {
        name: [getattr(reason, name) for reason in reasons] for name in ("text", "rule", "value", "cut")
    }
    texts = {name: pa.array(columns[of], pa.string()) for name, of in (("reason", "text"), ("rule", "rule"))}
    return texts | {name: pa.array(columns[name], pa.float64()) for name in ("value", "cut")}


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
