"""The store, read: rows, measured values, and what is known of recipes, imports and runs. queries.py has its SQL; store.py and results.py write."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from curate.errors import StoreError
from curate.rows import Row
from curate.store import coverage, imported_columns, imports, query, readings, recipes, tables, values
from curate.store.coverage import Coverage
from curate.store.entries import RECENT, DatasetValue, Measured, Place, Role, Speeds
from curate.store.imports import Import
from curate.store.locks import holder, process_alive
from curate.store.queries import StoreQueries
from curate.store.sql import first_column, one


class StoreReader(StoreQueries):
    """A store's folder, as it is asked. Every method opens the database for one short transaction. See `Store`."""

    def source_is_current(self, source: str, fingerprint: str, *, role: Role = "train") -> bool:
        """Whether this content of the source has been read already, so that `add_source` can be skipped: in its place, or waiting for it."""
        reading = readings.waiting_name(source, fingerprint)
        with self.database.read() as con:
            text = "SELECT source FROM data.source_state WHERE role = ? AND ((source = ? AND fingerprint = ?) OR source = ?) ORDER BY source = ? DESC"
            current = one(con, text, [role, source, fingerprint, reading, source])
        if current is not None and current[0] == reading:
            self._see(source, reading)
        return current is not None

    def sources(self) -> list[dict[str, Any]]:
        """One dict a source and role: source, role, fingerprint, n_records, n_bad, n_rows, read_at."""
        with self.database.read() as con:
            states = query.dicts(con, "SELECT * FROM data.source_state ORDER BY read_at, source")
        seen = {kept for own in self._waiting.values() for kept in own}
        kept = [
            s
            for s in states
            if s["source"] in seen or s["source"] == readings.plain_name(s["source"]) not in self._waiting
        ]
        return [{**s, "source": readings.plain_name(s["source"])} for s in kept]

    def row_ids_of(
        self,
        sources: Sequence[str] | None = None,
        *,
        kind: str | None = None,
        role: Role | None = None,
        limit: int | None = None,
    ) -> list[str]:
        """The distinct rows that occur in these sources (all, if None), by position, the first `limit` of them. Rows without text are in."""
        with self.database.read() as con:
            row_ids: list[str] = query.rows_of(con, self._read_as(sources), kind=kind, role=role, limit=limit)[
                1
            ].to_pylist()
            return row_ids

    def rows_with_text(
        self, sources: Sequence[str] | None = None, *, kind: str | None = None, role: Role | None = None
    ) -> list[str]:
        """As `row_ids_of`, without the rows that an import knows only by their ids."""
        with self.database.read() as con:
            names = self._read_as(sources)
            row_ids: list[str] = query.rows_of(con, names, kind=kind, role=role, with_text=True)[1].to_pylist()
            return row_ids

    def styles(self, sources: Sequence[str] | None, kind: str) -> set[str]:
        """The styles of the rows of some sources (all, if None) and a kind: standard (plain text), conversational (messages)."""
        with self.database.read() as con:
            return query.styles(con, self._read_as(sources), kind)

    def missing(
        self,
        fingerprint: str,
        sources: Sequence[str] | None = None,
        *,
        kind: str | None = None,
        role: Role | None = None,
        row_ids: Sequence[str] | None = None,
    ) -> list[tuple[int, str]]:
        """(position, row_id) of the rows with text that this measurement has no line for, by position; NULL values count as measured.

        A row's position never changes, so `position // shard_size` gives shards of fixed membership. `row_ids` narrows further.
        """
        with self.database.read() as con:
            names = self._read_as(sources)
            found = query.rows_of(con, names, kind=kind, role=role, row_ids=row_ids, without=fingerprint)
            return list(zip(*(column.to_pylist() for column in found), strict=True))

    def coverage(
        self, fingerprints: Sequence[str], sources: Sequence[str] | None = None, *, kind: str | None = None
    ) -> Coverage:
        """Which rows with text these measurements have no line for, all asked at once; NULL values count as measured."""
        with self.database.read() as con:
            return coverage.coverage(con, self._read_as(sources), kind, fingerprints)

    def positions(self, row_ids: Sequence[str]) -> np.ndarray:
        """(rows,) int64; -1 where the store does not know the row."""
        with self.database.read() as con:
            return query.positions(con, row_ids)

    def iter_rows(self, row_ids: Sequence[str], *, batch: int = 2048) -> Iterator[Row | None]:
        """The rows in the order of `row_ids`, a batch in memory at a time. None for a row without text. Raises StoreError for an unknown id."""
        with self.database.read() as con:
            positions = query.positions(con, row_ids)
        if len(positions) and positions.min() < 0:
            raise StoreError(
                f"{self.folder}: no row {row_ids[int(positions.argmin())]} in this store. "
                "Row ids: `curate sql STORE 'SELECT row_id FROM rows'`."
            )
        for start in range(0, len(row_ids), batch):
            with self.database.read() as con:
                rows = query.rows_at(con, positions[start : start + batch])
            yield from rows

    def occurrence_counts(
        self, row_ids: Sequence[str], sources: Sequence[str] | None = None, *, role: Role | None = None
    ) -> np.ndarray:
        """(rows,) float64: how often each row occurs in these sources."""
        with self.database.read() as con:
            return query.occurrence_counts(con, row_ids, self._read_as(sources), role)

    def measured_by(self) -> int | None:
        """The id of the process that is measuring now; None if nobody is."""
        return holder(self.folder / "run.lock")

    def imports(self) -> list[Import]:
        """What was imported, one entry a file, by number."""
        with self.database.read() as con:
            return imports.listed(con)

    def worst_ends(self) -> dict[str, Literal["high", "low"]]:
        """imported column -> the end that is bad, where its import said so."""
        return imported_columns.worst_ends(self.imports())

    def measured(self, **wanted: Any) -> list[Measured]:
        """What has been measured, in the order run, step, created. Narrow by field: measured(measurement="accuracy", run="sft")."""
        with self.database.read() as con:
            return values.measured(con, wanted)

    def measured_columns(self) -> dict[str, list[str]]:
        """measurement -> the names of its columns, for everything measured or imported."""
        with self.database.read() as con:
            names = first_column(con, "SELECT DISTINCT measurement FROM data.measured ORDER BY 1")
            return {name: list(tables.columns_of(con, tables.table_of(name))) for name in names}

    def known_columns(self, names: Sequence[str] | None = None) -> dict[str, list[str]]:
        """fingerprint -> its columns that are known for some row (of `names`, or of all). Imports of several kinds share one table."""
        with self.database.read() as con:
            return values.known_columns(con, names)

    def columns(self, fingerprint: str, names: Sequence[str], row_ids: Sequence[str]) -> dict[str, np.ndarray]:
        """name -> (rows,) float64 aligned to `row_ids`; NaN where there is no value. Booleans are 0 and 1.

        Raises UsageError for a column that this measurement does not have.
        """
        series = self.series([fingerprint], names, row_ids)
        return {name: one_each[:, 0] for name, one_each in series.items()}

    def series(
        self, fingerprints: Sequence[str | None], names: Sequence[str], row_ids: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """name -> (rows, K) float64 for K fingerprints of one measurement, in their order; a fingerprint of None is all NaN."""
        with self.database.read() as con:
            return values.series(con, fingerprints, names, row_ids)

    def texts(self, fingerprint: str, name: str, row_ids: Sequence[str]) -> list[str | None]:
        """A text column, such as token_problem, aligned to `row_ids`."""
        with self.database.read() as con:
            return values.texts(con, fingerprint, name, row_ids)

    def samples(self, fingerprint: str, row_ids: Sequence[str]) -> list[list[dict[str, Any]]]:
        """The sampled answers of each row, in sample order: text, correct, n_tokens, logp, finished; [] where there are none."""
        with self.database.read() as con:
            return values.samples(con, fingerprint, row_ids)

    def n_answers(self, fingerprint: str, row_ids: Sequence[str]) -> dict[str, int]:
        """row id -> how many sampled answers are kept under a fingerprint, of the rows that it has a line for."""
        with self.database.read() as con:
            return values.n_answers(con, fingerprint, row_ids)

    def throughput(self, key: str, *, alike: str | None = None) -> float | None:
        """`Speeds.of` of what is logged here."""
        return self.speeds().of(key, alike=alike)

    def speeds(self) -> Speeds:
        """How fast everything ran that was logged here."""
        with self.database.read() as con:
            text = (
                "SELECT key, tokens, seconds, noted FROM data.throughput "
                f"QUALIFY row_number() OVER (PARTITION BY key ORDER BY noted DESC) <= {RECENT} ORDER BY noted DESC"
            )
            return Speeds(con.execute(text).fetchall())

    def answer_lengths(self) -> dict[str, tuple[int, int]]:
        """fingerprint -> how many of its sampled answers have a known length, and the tokens of these together."""
        with self.database.read() as con:
            text = "SELECT fingerprint, count(n_tokens), sum(n_tokens)::BIGINT FROM data.samples GROUP BY fingerprint HAVING count(n_tokens) > 0"
            return {fingerprint: (n, tokens) for fingerprint, n, tokens in con.execute(text).fetchall()}

    def kept(self, recipe: str) -> dict[str, Any] | None:
        """What a recipe's values rested on when it was measured last (`curate.plan.kept`); None where nobody noted it."""
        with self.database.read() as con:
            noted = one(con, "SELECT value FROM data.meta WHERE key = ?", [f"kept of {recipe}"])
        return json.loads(noted[0]) if noted else None

    def noted_of(self, source: str, role: Role, fingerprint: str) -> dict[str, Any]:
        """What was noted when a source was read in; empty where nothing was, as by earlier versions."""
        with self.database.read() as con:
            noted = one(con, "SELECT value FROM data.meta WHERE key = ?", [f"notes of {role} {source} {fingerprint}"])
        return json.loads(noted[0]) if noted else {}

    def made(self, recipe: str) -> dict[str, Any] | None:
        """What was noted when a recipe's scores were made last (`note_made`); None where nobody noted it."""
        with self.database.read() as con:
            noted = one(con, "SELECT value FROM data.meta WHERE key = ?", [f"made of {recipe}"])
        return json.loads(noted[0]) if noted else None

    def dataset_values(self, origin: str) -> list[DatasetValue]:
        """The dataset values of a recipe, or of an import ("import:<file>"), as they were written."""
        with self.database.read() as con:
            lines = con.execute(
                "SELECT name, value, low, high, n, run, checkpoint, step FROM data.dataset_values WHERE origin = ? ORDER BY rowid",
                [origin],
            ).fetchall()
        return [DatasetValue(*line) for line in lines]

    def places(self, recipe: str) -> dict[str, list[Place]]:
        """fingerprint -> (run, checkpoint, step) of the models that a recipe means by it; nothing of what it has no names of its own for."""
        with self.database.read() as con:
            return recipes.places(con, recipe)

    def recipes(self) -> list[dict[str, Any]]:
        """One dict a recipe, the one scored last first: name, text, sources, uses, plain, updated."""
        with self.database.read() as con:
            listed = f"SELECT * EXCLUDE (scores_table) FROM data.recipes WHERE {readings.NO_RECIPE_WAITS} ORDER BY updated DESC"
            return query.dicts(con, listed)

    def inputs_hash(self, what: Literal["scores", "selection"], name: str) -> str | None:
        """What a recipe's scores, or a selection, were made of; None where nobody said, "" where values were imported over what they read."""
        with self.database.read() as con:
            noted = one(con, "SELECT value FROM data.meta WHERE key = ?", [f"{what} of {name}"])
        return noted[0] if noted else None

    def find_row(self, text: str) -> str:
        """The row that `text` means: a row id, the unique beginning of one (6 digits or more), source#row (rows from 1, as messages number them), or
        source:index (from 0, as the views number them).
        """
        with self.database.read() as con:
            return query.find_row(con, text, str(self.folder))

    def status(self) -> dict[str, Any]:
        """What is in the store: counts by table, sources, measurements with rows done, shards not taken in yet, the last ten runs, the last
        command if it was refused (such a command is no run; the view `runs` has it), who is measuring.
        """
        with self.database.read() as con:
            counts = query.status(con)
        for run in counts["runs"]:  # the next command that writes marks them for good
            if run.pop("host") == socket.gethostname() and run["outcome"] is None and not process_alive(run["pid"]):
                run["outcome"] = "killed"
        return {
            "folder": str(self.folder),
            **counts,
            "shards_pending": len(self.shards.pending()),
            "set_aside": [path.name for path in self.shards.damaged()],
            "measured_by_process": self.measured_by(),
        }
