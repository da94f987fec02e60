"""SQL that a user writes reads the store and nothing else: no files, no addresses, no settings; and a rule of a recipe repeats."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from curate.errors import UsageError
from curate.rows import Example
from curate.store import Store
from curate.store.engines import attached
from curate.workflow.select import SelectSpec, check_select, select

TEXT = "canary-4711"
READS = [  # each is a table, or a number that a file decides
    "read_text('{file}')",
    "read_blob('{file}')",
    "read_blob('{store}/curate.duckdb')",
    "read_blob('{store}/shards/*')",
    "read_csv('{file}')",
    "read_csv_auto('{file}')",
    "read_json('{file}')",
    "read_json_auto('{file}')",
    "read_json_objects('{file}')",
    "read_ndjson('{file}')",
    "read_ndjson_objects('{file}')",
    "read_parquet('{store}/x.parquet')",
    "parquet_scan('{file}')",
    "parquet_metadata('{file}')",
    "parquet_schema('{file}')",
    "read_duckdb('{store}/curate.duckdb')",
    "sniff_csv('{file}')",
    "glob('{folder}/*')",
    "glob('/etc/*')",
    "'{file}'",
    '"{file}"',
    "'*.txt'",
    "'rows.parquet'",
    "'http://127.0.0.1:9/x.parquet'",
    "'https://127.0.0.1:9/x.csv'",
    "'s3://bucket/x.parquet'",
    "read_text('http://127.0.0.1:9/x')",
    "query('FROM read_text(''{file}'')')",
    "query_table('{file}')",
    "json_execute_serialized_sql('{{}}')",
    "duckdb_settings()",
    "duckdb_secrets()",
    "duckdb_extensions()",
    "duckdb_logs()",
    "pragma_database_size()",
]
WRITES = [
    "COPY (SELECT 1) TO '{out}'",
    "COPY scored TO '{out}' (FORMAT parquet)",
    "EXPLAIN ANALYZE COPY (SELECT 1) TO '{out}'",
    "EXPLAIN COPY (SELECT 1) TO '{out}'",
    "explain (analyze) copy (select 1) to '{out}'",
    "/* */ EXPLAIN ANALYZE COPY (SELECT 1) TO '{out}'",
    "EXPORT DATABASE '{out}'",
    "IMPORT DATABASE '{folder}'",
    "ATTACH '{out}' AS other",
    "ATTACH ':memory:' AS other",
    "DETACH curate",
    "USE memory",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET threads = 1",
    "SET VARIABLE x = 1",
    "RESET temp_directory",
    "PRAGMA threads = 1",
    "PRAGMA enable_profiling",
    "CALL enable_logging()",
    "CREATE TABLE t (i INT)",
    "CREATE TEMP TABLE t AS SELECT 1",
    "CREATE OR REPLACE TEMP VIEW scored AS SELECT 1",
    "CREATE SECRET (TYPE s3)",
    "CREATE MACRO f() AS 1",
    "INSERT INTO data.meta VALUES ('a', 'b')",
    "UPDATE data.meta SET value = '0'",
    "DELETE FROM data.rows",
    "DROP VIEW scored",
    "ALTER TABLE data.meta ADD COLUMN x INT",
    "CHECKPOINT",
    "VACUUM",
    "BEGIN",
    "PREPARE p AS SELECT 1",
    "EXECUTE p",
    "WITH w AS (INSERT INTO data.meta VALUES ('a', 'b') RETURNING key) SELECT * FROM w",
    "SELECT 1; COPY (SELECT 1) TO '{out}'",
    "SELECT write_log('x')",
    "SELECT sleep_ms(1)",
]
BREAKS_OUT = [
    "$$'$$) FROM read_text('{file}') AS t, (SELECT $$'$$",
    "E'\\'' = 'x') FROM read_text('{file}'), (SELECT E'\\''",
]


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A store of two rows, and a file beside it that nobody may read."""
    tmp_path = tmp_path_factory.mktemp("locked")
    store = Store(tmp_path / "store", create=True)
    rows = [Example(f"q{i}", "yes") for i in range(2)]
    store.add_source(
        "a", "1", [SimpleNamespace(index=i, row=row, columns={"topic": "x"}) for i, row in enumerate(rows)]
    )
    store.register_recipe("r", "", sources=["a"])
    store.write_scores("r", [row.row_id for row in rows], {"loss": [0.0, 1.0]})
    file = tmp_path / "secret.txt"
    file.write_text(f"{TEXT}\n")
    names = {"file": file, "folder": tmp_path, "store": store.folder, "out": tmp_path / "written"}
    before = sorted(tmp_path.rglob("*"))
    yield SimpleNamespace(store=store, names=names)
    store.row_ids_of()
    assert sorted(tmp_path.rglob("*")) == before


def refusal(error) -> str:
    said = str(error.value)
    assert TEXT not in said and "\n" not in said and "Error" not in said, said
    return said


def test_a_query_reads_the_store_alone(there):
    for n, table in enumerate(READS):
        explain = "EXPLAIN ANALYZE " if n % 2 else ""
        with pytest.raises(UsageError) as error:
            there.store.sql(f"{explain}SELECT * FROM {table.format(**there.names)}")
        assert "the store alone" in refusal(error)


def test_a_query_changes_nothing(there):
    for statement in WRITES:
        with pytest.raises(UsageError) as error:
            there.store.sql(statement.format(**there.names))
        refusal(error)


@pytest.mark.parametrize("number, key", enumerate(["where", "order_by", "per"]))
def test_a_rule_reads_the_store_alone(there, number, key):
    for table in READS[number::3]:
        _refused(there, key, f"(SELECT count(*) FROM {table.format(**there.names)}) > loss")


@pytest.mark.parametrize("key", ["where", "order_by", "per"])
def test_two_expressions_are_no_rule(there, key):
    _refused(there, key, "loss > 0, 1")


def test_what_is_no_expression_is_shown_as_it_was_written(there):
    spec = SelectSpec(where="loss <")
    with pytest.raises(UsageError, match="^select.where: this is not one whole SQL expression: loss <$"):
        check_select(there.store, spec, worst={}, planned=[], recipe="r")


def test_a_table_function_in_a_columns_place_is_refused_as_such(there):
    spec = SelectSpec(where="prompt < read_text('x')")
    with pytest.raises(UsageError, match=r"read_text\(\) is no function of a store. SQL here reads the store alone"):
        check_select(there.store, spec, worst={}, planned=[], recipe="r")


def test_a_pivot_says_what_it_needs(there):
    with pytest.raises(UsageError, match=r"PIVOT needs its values here: `ON topic IN"):
        there.store.sql("PIVOT scored ON loss USING count(*)")
    assert len(there.store.sql("PIVOT scored ON kind IN ('sft') USING count(*) GROUP BY kind")) == 1


@pytest.mark.parametrize("key", ["where", "order_by", "per"])
def test_a_rule_is_one_expression_of_columns(there, key):
    for rule in [*BREAKS_OUT, "loss > 0 AND sleep_ms(1) IS NULL", "getenv('HOME') = 'x' AND loss > 0"]:
        _refused(there, key, rule.format(**there.names))


@pytest.mark.parametrize("rule, instead", [
    ("loss > random()", "`order_by: random`, with `seed`"),
    ("loss > 0 AND uuid()::VARCHAR > 'x'", "`order_by: random`, with `seed`"),
    ("row_id IN (SELECT row_id FROM rows USING SAMPLE 1 ROWS)", "`order_by: random`, with `seed`"),
    ("loss > epoch(now())", "DATE '2026-01-31'"),
    ("loss > 0 AND current_date > DATE '2026-01-31'", "DATE '2026-01-31'"),
    ("loss > 0 AND current_timestamp > TIMESTAMP '2026-01-31'", "DATE '2026-01-31'"),
    ("loss > epoch(today())", "DATE '2026-01-31'"),
    ("loss > epoch(age(TIMESTAMP '2026-01-31'))", "DATE '2026-01-31'"),
    ("loss > length(current_setting('threads'))", "Write the value that is meant"),
    ("loss > length(version())", "Write the value that is meant"),
])  # fmt: skip
def test_a_rule_repeats(there, rule, instead):
    assert instead in _refused(there, "where", rule)


def _refused(there, key, rule) -> str:
    """What both say: the check before measuring, and the selection, which is inside a transaction of the run's."""
    spec = SelectSpec(**{key: rule})
    with pytest.raises(UsageError, match=f"select.{key}: ") as error:
        check_select(there.store, spec, worst={}, planned=["ches"], recipe="r")
    early = refusal(error)
    with there.store.transaction(), pytest.raises(UsageError, match=f"select.{key}: ") as error:
        select(there.store, spec, worst={}, recipe="r", sources=["a"])
    return early + refusal(error)


def test_drop_worst_takes_a_name_and_no_sql(there):
    for name in ("loss) FROM read_text('x'), (SELECT 1", "read_text"):
        with pytest.raises(UsageError):
            check_select(there.store, SelectSpec(drop_worst={name: 0.5}), worst={}, planned=[], recipe="r")


@pytest.mark.parametrize("read_only", [True, False])
def test_duckdb_itself_refuses(there, read_only):
    """Whatever a check of the text misses."""
    import duckdb

    path = there.store.database.path
    with attached(path, read_only=read_only) as con:
        for statement in (
            "SELECT * FROM read_text('{file}')",
            "SELECT * FROM glob('/etc/*')",
            "SELECT * FROM '{file}'",
            "SELECT * FROM 'http://127.0.0.1:9/x.parquet'",
            "COPY (SELECT 1) TO '{out}'",
            "EXPLAIN ANALYZE COPY (SELECT 1) TO '{out}'",
            "ATTACH '{out}' AS other",
            "INSTALL httpfs",
            "LOAD httpfs",
            "SET threads = 1",
            "SET enable_external_access = true",
            "SET allowed_directories = ['/']",
            "SET autoload_known_extensions = true",
            "SELECT * FROM path",  # a variable of Python's
        ):
            with pytest.raises(duckdb.Error):
                con.execute(statement.format(**there.names))


def test_what_is_a_query_is_still_answered(there):
    for text, n in {
        "FROM scored": 2,
        "SELECT * FROM scored s, LATERAL (SELECT s.loss + 1 AS more)": 2,
        "WITH w AS (SELECT * FROM rows) SELECT * FROM w": 2,
        "WITH RECURSIVE w AS (SELECT 1 AS i UNION ALL SELECT i + 1 FROM w WHERE i < 3) FROM w": 3,
        "SELECT 1 UNION SELECT 2": 2,
        "VALUES (1), (2)": 2,
        "SELECT unnest(range(3))": 3,
        "SELECT * FROM range(3)": 3,
        "SELECT random(), now()": 1,
        "EXPLAIN SELECT * FROM scored": 1,
        "EXPLAIN ANALYZE SELECT * FROM scored": 1,
        "SELECT topic, count(*) FROM scored GROUP BY ALL": 1,
        'SELECT * FROM (SELECT 1) AS "a.b"': 1,
    }.items():
        assert len(there.store.sql(text)) == n, text
    assert len(there.store.sql("DESCRIBE scored")) > 5
    assert len(there.store.sql("SUMMARIZE SELECT loss FROM scored")) == 1
    assert "scored" in there.store.sql("SHOW TABLES")["name"].to_list()
