"""SQL that could be read in two ways, or that orders numbers as text: found before it is run.

- A name that is both a column of curate's and one of the user's (or two of the user's that differ in case only): used by itself, it is refused
  with both ways to write it.
- Text whose values are numbers, where its order matters (`'9' > '10'` is true of text): refused, with the cast that is meant.
- NaN, which DuckDB takes for the greatest number: a comparison with it is unknown.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import duckdb

from curate.errors import UsageError
from curate.store import allowed, syntax, views
from curate.store.narrowing import ViewFacts
from curate.store.own_columns import OwnColumn
from curate.store.sql import Connection, quote
from curate.store.syntax import Node, Scope

ORDERING = {f"COMPARE_{name}" for name in ("LESSTHAN", "GREATERTHAN", "LESSTHANOREQUALTO", "GREATERTHANOREQUALTO")}
BY_ORDER = {
    *("min", "max", "greatest", "least", "arg_min", "arg_max", "argmin", "argmax", "min_by", "max_by", "median"),
    *("quantile", "quantile_cont", "quantile_disc", "approx_quantile"),
}
OURS = {  # what our column of a name that users have too is
    "source": "which source the row was read from",
    "index": "the row's number in its source",
    "role": "train or heldout",
    "kind": "preference or sft",
    "style": "text or messages",
    "position": "the row's place in the store",
    "label": "the label of an unpaired row",
    "answer": "the answer that is graded against",
    "row_id": "the row's id",
    "n_occurrences": "how often the row occurs",
}


@dataclass(frozen=True)
class Frame:
    """The view `scored` as a recipe's SQL will see it. text: a FROM; columns: their names; own: view -> the user's columns in it.
    tables: a column, in lower case -> the table of scores or measurements that it comes from.
    """

    text: str
    columns: list[str]
    own: dict[str, list[OwnColumn]]
    tables: Mapping[str, str] = field(default_factory=dict)

    @property
    def taken(self) -> list[OwnColumn]:
        """The user's columns whose names `scored` has for something else."""
        return [column for column in self.own["scored"] if column.taken_by]


def frame(facts: ViewFacts, planned: Collection[str] = ()) -> Frame:
    """planned: the columns that measuring and scoring will add, numbers unless a mapping has their SQL types. They are NULL here, and take their
    names from the user's as they will then.
    """
    now = views.own_names(facts)
    own = views.own_names(facts, planned) if planned else now
    before = {(c.imported, c.name): c.shown for c in now["scored"]}
    after = {(c.imported, c.name): c.shown for c in own["scored"]}
    moved = [(before[key], shown) for key, shown in after.items() if before.get(key, shown) != shown]
    have = [d[0] for d in facts.con.execute("SELECT * FROM scored LIMIT 0").description or []]
    renamed = dict(moved)
    kept = [renamed.get(name, name) for name in have]
    known = {name.lower() for name in kept}
    coming = [name for name in dict.fromkeys(planned) if name.lower() not in known]
    if not moved and not coming:
        return Frame("scored", have, own, views.column_tables(facts))
    renames = f" RENAME ({', '.join(f'{quote(a)} AS {quote(b)}' for a, b in moved)})" if moved else ""
    kinds = planned if isinstance(planned, Mapping) else {}
    nothing = "".join(f", NULL::{kinds.get(name, 'DOUBLE')} AS {quote(name)}" for name in coming)
    return Frame(
        f"(SELECT *{renames}{nothing} FROM scored) AS scored", [*kept, *coming], own, views.column_tables(facts)
    )


def checked(con: Connection, text: str, key: str, seen: Frame, *, is_order: bool = False) -> str:
    """The expression as it is to be asked of `seen`. Raises UsageError where it could be misread. is_order: rows are ordered by its value."""
    tree = syntax.parse(con, f"SELECT (\n{text}\n) FROM scored")
    if tree is None:
        allowed.check_brackets(con, text, key)
        return text  # asking it says what is wrong
    allowed.check_rule(con, tree, key, seen.columns)
    for problem in ambiguous(con, tree, seen.own):
        raise UsageError(f"{key}: {problem}")
    top = tree["statements"][0]["node"]
    expression = top["select_list"][0]
    if (is_order or key == "select.per") and _is_constant(tree):
        does = "orders nothing" if is_order else "makes one group of all rows"
        raise UsageError(
            f"{key}: {text.strip()} is the same for every row, so it {does}. Write the name of a column, without single quotes"
            + (
                ", such as `order_by: prompt_tokens desc`; a number is no column's place here."
                if is_order
                else ", such as `per: source`."
            )
        )
    for operand, scope in [*([(expression, Scope(top))] if is_order else []), *_ordered(tree)]:
        _refuse_text(con, operand, _from(con, scope, top, seen), key)
    return _without_nan(con, tree, seen) or text


def _is_constant(tree: Node) -> bool:
    """Whether an expression reads no column and numbers no rows."""
    return not any(part.get("class") in ("WINDOW", "STAR", "SUBQUERY", "COLUMN_REF") for part, _ in syntax.parts(tree))


def ambiguous(con: Connection, tree: Node, own: Mapping[str, Sequence[OwnColumn]]) -> Iterator[str]:
    """A sentence for each name that a statement uses by itself and that two columns could be meant by."""
    noted = set()
    for part, scope in syntax.parts(tree):
        name = syntax.column_of(part, scope)
        if name is None:
            continue
        table = _table_with(con, name, scope, own)
        both = [c for c in own.get(table or "", ()) if c.taken_by and c.name.lower() == name.lower()]
        if table and both and (name.lower(), table) not in noted:
            noted.add((name.lower(), table))
            yield _both(name, table, both)


def _both(name: str, view: str, columns: Sequence[OwnColumn]) -> str:
    mine = ", ".join(f"`{quoted(c.shown)}` for your column {c.name!r}" for c in columns)
    other = columns[0].taken_by
    if columns[0].by_own:
        return f"{name!r} could be your column {other!r} or {columns[0].name!r}. Write `{view}.{quoted(other)}` for {other!r}, {mine}."
    what = f" ({OURS[other.lower()]})" if other.lower() in OURS else ""
    return (
        f"{name!r} is a column of curate's and one of yours. Write {mine}, `{view}.{quoted(other)}` for curate's{what}."
    )


def quoted(name: str) -> str:
    return name if name.replace("_", "a").isalnum() and not name[0].isdigit() else quote(name)


def _table_with(con: Connection, name: str, scope: Scope, own: Mapping[str, Sequence[OwnColumn]]) -> str | None:
    """The view that an unqualified name is looked up in: the innermost that has it."""
    for here in scope.chain():
        for view in here.tables.values():
            if view is None:
                return None
            if any(c.taken_by and c.name.lower() == name.lower() for c in own.get(view, ())):
                return view
            try:
                columns = [d[0].lower() for d in con.execute(f"SELECT * FROM {quote(view)} LIMIT 0").description or []]
            except duckdb.Error:
                return None
            if name.lower() in columns:
                return view
    return None


def _ordered(tree: Node) -> Iterator[tuple[Node, Scope]]:
    """The expressions of a statement whose order matters."""
    for part, scope in syntax.parts(tree):
        kind = part.get("type")
        if kind in ORDERING:
            yield part["left"], scope
            yield part["right"], scope
        elif kind == "COMPARE_BETWEEN":
            yield part["input"], scope
        elif "null_order" in part:
            yield part["expression"], scope
        elif part.get("class") in ("FUNCTION", "WINDOW") and str(part.get("function_name")).lower() in BY_ORDER:
            for argument in part.get("arguments") or []:
                yield argument.get("expression", argument), scope


def _from(con: Connection, scope: Scope, top: Node, seen: Frame) -> str:
    return seen.text if scope.node is top else syntax.from_text(con, scope)


def _refuse_text(con: Connection, operand: Node, table: str, key: str) -> None:
    if operand.get("class") in ("CONSTANT", "SUBQUERY", "LAMBDA") or _says_text(operand):
        return
    shown = syntax.text_of(con, operand)
    texts = numbers_in(con, shown, table)
    if texts is None:
        return
    raise UsageError(
        f"{key}: {shown} is text, and {texts.how_many} of its values are numbers: as text, '10' comes before '9'. "
        f"Write `{texts.cast}` (or `{shown}::VARCHAR` where the order of text is meant)."
    )


@dataclass(frozen=True)
class Numbers:
    """Of a text column that holds numbers: how many of its values are, in words, and the cast that reads them."""

    how_many: str
    cast: str


def numbers_in(con: Connection, shown: str, table: str) -> Numbers | None:
    """Whether half of the values or more of an expression that is text are numbers; None where they are not, or cannot be asked."""
    if _type_of(con, shown, table) not in ("VARCHAR", "JSON"):
        return None
    value = "nullif(trim(v::VARCHAR, ' \"'), '')"
    grouped = f"regexp_full_match({value}, '[-+]?\\d{{1,3}}(,\\d{{3}})+(\\.\\d*)?')"  # 1,234.5
    read = f"TRY_CAST(CASE WHEN {grouped} THEN replace({value}, ',', '') ELSE {value} END AS DOUBLE)"
    try:
        counts = con.execute(
            f"SELECT count({value}), count({read}), count(*) FILTER ({grouped}) FROM (SELECT TRY({shown}) AS v FROM {table})"
        ).fetchall()[0]
    except duckdb.Error:  # it leans on what surrounds it; or it is wrong, which asking the whole says better
        return None
    known, numbers, commas = counts
    if not numbers or 2 * numbers < known:
        return None
    without_commas = f"replace({shown}, ',', '')" if commas else shown
    cast = f"{without_commas}::DOUBLE" if numbers == known else f"TRY_CAST({without_commas} AS DOUBLE)"
    return Numbers("all" if numbers == known else f"{numbers:,} of {known:,}", cast)


def _type_of(con: Connection, shown: str, table: str) -> str:
    """The SQL type of an expression, "" where it cannot be asked. No row is read for it."""
    try:
        return str(con.sql(f"SELECT TRY({shown}) AS v FROM {table} LIMIT 0").types[0])
    except duckdb.Error:
        return ""


def _says_text(operand: Node) -> bool:
    kind = operand.get("type_expr") or operand.get("cast_type") or {}
    return operand.get("class") == "CAST" and str(kind.get("type_name", kind.get("id", ""))).lower() in (
        "varchar",
        "text",
        "string",
    )


def _has_nan(con: Connection, column: str | None, shown: str, seen: Frame) -> bool:
    """Whether an expression is NaN in some row. column: the one that it is, None where it is more than a column."""
    name = (column or "").lower()
    if name in (own.shown.lower() for own in seen.own["scored"] if not own.imported):
        return False  # the user's numbers come out of JSON, which has none
    picked, table = (quote(name), f"data.{quote(seen.tables[name])}") if name in seen.tables else (shown, seen.text)
    try:
        text = f"SELECT count(*) FILTER (isnan(v)) FROM (SELECT TRY({picked}) AS v FROM {table})"
        return bool(con.execute(text).fetchall()[0][0])
    except duckdb.Error:
        return False


def _without_nan(con: Connection, tree: Node, seen: Frame) -> str | None:
    """The expression with NULL for every NaN that it compares; None where it compares none."""
    top = tree["statements"][0]["node"]
    changed = False
    for part, scope in list(syntax.parts(tree)):
        sides = (
            ("left", "right")
            if part.get("class") == "COMPARISON"
            else ("input",)
            if part.get("class") == "BETWEEN"
            else ()
        )
        for side in sides if scope.node is top else ():
            if part[side].get("class") in ("CONSTANT", "SUBQUERY"):
                continue
            shown = syntax.text_of(con, part[side])
            if _type_of(con, shown, seen.text) not in ("DOUBLE", "FLOAT"):
                continue
            if _has_nan(con, syntax.column_of(part[side], scope), shown, seen):
                known = syntax.parse(con, f"SELECT CASE WHEN isnan({shown}) THEN NULL ELSE {shown} END")
                assert known is not None
                part[side] = known["statements"][0]["node"]["select_list"][0]
                changed = True
    return syntax.text_of(con, top["select_list"][0]) if changed else None
