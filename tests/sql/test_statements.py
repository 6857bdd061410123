"""Where statements end, and what DataFusion says that they say."""

from __future__ import annotations

import pyarrow as pa
import pytest
from datafusion import SessionContext

from operators.errors import SchemaError, UnsupportedQueryError
from operators.sql.catalog import planning_session
from operators.sql.statements import (
    Copy,
    CreateTable,
    CreateView,
    Describe,
    Drop,
    Explain,
    Insert,
    Query,
    is_complete,
    read_statement,
    split_script,
)

TABLE = pa.table({"a": [1, 2], "b": ["x", "y"]})


@pytest.fixture(scope="module")
def session() -> SessionContext:
    return planning_session({}, {"t": TABLE}, [], [], {"o": pa.schema({"n": pa.int64(), "s": pa.string()})})


@pytest.mark.parametrize(
    ("script", "statements"),
    [
        ("SELECT 1", ["SELECT 1"]),
        ("SELECT 1; SELECT 2;", ["SELECT 1", "SELECT 2"]),
        (";; ;", []),
        ("", []),
        ("-- nothing; at all\n/* ; */", []),
        ("SELECT ';', 'it''s; so';SELECT 2", ["SELECT ';', 'it''s; so'", "SELECT 2"]),
        ('SELECT "a;b", `c;d`', ['SELECT "a;b", `c;d`']),
        ("SELECT 1 -- one; two\n, 2; SELECT 3", ["SELECT 1 -- one; two\n, 2", "SELECT 3"]),
        ("SELECT /* ; /* ; */ ; */ 1; SELECT 2", ["SELECT /* ; /* ; */ ; */ 1", "SELECT 2"]),
        ("SELECT $$a;b$$, $x$;$x$", ["SELECT $$a;b$$, $x$;$x$"]),
        ("SELECT E'it\\'s; so'; SELECT 2", ["SELECT E'it\\'s; so'", "SELECT 2"]),
        ("SELECT 'never; ended", ["SELECT 'never; ended"]),
    ],
)
def test_statements_end_at_semicolons_that_are_no_part_of_a_text_name_or_comment(
    script: str, statements: list[str]
) -> None:
    assert [statement.text for statement in split_script(script)] == statements


def test_a_statement_knows_its_line() -> None:
    assert [s.line for s in split_script("-- one\nSELECT 1;\n\nSELECT\n2; SELECT 3")] == [2, 4, 5]


@pytest.mark.parametrize(
    "script", ["SELECT 1", "SELECT 1; SELECT", "SELECT ';", "SELECT 1 -- ;", "/* */ SELECT 1 /* ;"]
)
def test_a_script_goes_on_until_its_last_statement_is_ended(script: str) -> None:
    assert not is_complete(script)
    assert is_complete(script.removesuffix("/* ;").rstrip("-; '") + ";")


def test_a_definition_is_read_with_all_that_it_says(session: SessionContext) -> None:
    found = read_statement(
        session,
        """CREATE OR REPLACE EXTERNAL TABLE "Odd Name"
           (n BIGINT, "T" TIMESTAMP(3), s VARCHAR, d DECIMAL(19, 3), l INT[]) STORED AS parquet
           PARTITIONED BY (s) LOCATION 's3://bucket/it''s' OPTIONS ('mode' 'x', a.b 'c')""",
    )
    assert isinstance(found, CreateTable)
    assert (found.name, found.stored_as, found.location) == ("Odd Name", "PARQUET", "s3://bucket/it's")
    assert found.columns == pa.schema(
        {
            "n": pa.int64(),
            "T": pa.timestamp("ms"),
            "s": pa.string(),
            "d": pa.decimal128(19, 3),
            "l": pa.list_(pa.field("item", pa.int32())),
        }
    )
    assert found.partition_by == ("s",)
    assert dict(found.options) == {"mode": "x", "a.b": "c"}
    assert found.or_replace
    assert not found.if_not_exists


def test_a_definition_is_not_carried_out(session: SessionContext) -> None:
    for text in (
        "CREATE VIEW v AS SELECT a FROM t",
        "DROP TABLE t",
        "CREATE EXTERNAL TABLE e STORED AS CSV LOCATION 'x'",
    ):
        read_statement(session, text)
    assert session.table_exist("t")
    assert not session.table_exist("v")
    assert not session.table_exist("e")


def test_each_kind_of_statement_is_known(session: SessionContext) -> None:
    view = read_statement(session, "CREATE OR REPLACE VIEW v(x) AS SELECT a FROM t")
    assert isinstance(view, CreateView)
    assert (view.name, view.or_replace) == ("v", True)
    assert read_statement(session, "DROP TABLE IF EXISTS t") == Drop(name="t", what="TABLE", if_exists=True)
    assert read_statement(session, "DROP VIEW t") == Drop(name="t", what="VIEW", if_exists=False)
    insert = read_statement(session, "INSERT INTO o SELECT a, b FROM t")
    assert isinstance(insert, Insert)
    assert insert.target == "o"
    copy = read_statement(
        session, "COPY (SELECT a FROM t) TO 'out' STORED AS PARQUET PARTITIONED BY (a) OPTIONS (x 'y')"
    )
    assert isinstance(copy, Copy)
    assert (copy.location, copy.stored_as, copy.partition_by, dict(copy.options)) == (
        "out",
        "PARQUET",
        ("a",),
        {"x": "y"},
    )
    assert isinstance(read_statement(session, "EXPLAIN SELECT a FROM t"), Explain)
    assert isinstance(read_statement(session, "EXPLAIN INSERT INTO o SELECT a, b FROM t"), Explain)
    assert isinstance(read_statement(session, "DESCRIBE t"), Describe)
    assert isinstance(read_statement(session, "SHOW TABLES"), Query)
    assert isinstance(read_statement(session, "WITH q AS (SELECT 1) SELECT * FROM q"), Query)


@pytest.mark.parametrize(
    ("statement", "part"),
    [
        ("CREATE EXTERNAL TABLE e (a INT PRIMARY KEY) STORED AS CSV LOCATION 'x'", "PRIMARY KEY"),
        ("CREATE EXTERNAL TABLE e (a INT NOT NULL) STORED AS CSV LOCATION 'x'", "NOT NULL of e.a"),
        ("CREATE EXTERNAL TABLE e (a INT DEFAULT 3) STORED AS CSV LOCATION 'x'", "DEFAULT"),
        ("CREATE EXTERNAL TABLE e (a INT) STORED AS CSV WITH ORDER (a) LOCATION 'x'", "WITH ORDER"),
        ("CREATE UNBOUNDED EXTERNAL TABLE e STORED AS CSV LOCATION 'x'", "UNBOUNDED"),
        ("CREATE EXTERNAL TABLE s.e STORED AS CSV LOCATION 'x'", "the name s.e"),
        ("CREATE TEMPORARY VIEW v AS SELECT 1", "TEMPORARY"),
        ("CREATE TABLE e (a INT)", "CREATE TABLE"),
        ("CREATE TABLE e AS SELECT 1", "CREATE TABLE"),
        ("CREATE SCHEMA s", "CreateCatalogSchema"),
        ("SET datafusion.execution.batch_size = 1", "SetVariable"),
        ("INSERT OVERWRITE o SELECT a, b FROM t", "OVERWRITE"),
        ("DELETE FROM o", "DELETE"),
        ("UPDATE o SET n = 1", "UPDATE"),
        ("EXPLAIN ANALYZE SELECT a FROM t", "EXPLAIN ANALYZE"),
        ("EXPLAIN DROP TABLE t", "EXPLAIN of a definition"),
        ("SELECT a FROM t FOR UPDATE", "FOR UPDATE"),
    ],
)
def test_what_a_stream_would_not_keep_to_is_refused(session: SessionContext, statement: str, part: str) -> None:
    with pytest.raises(UnsupportedQueryError, match=part):
        read_statement(session, statement)


@pytest.mark.parametrize(
    "statement", ["SELEC 1", "ANALYZE SELECT 1", "VERBOSE SELECT 1", "SELECT 1; SELECT 2", "DROP", ""]
)
def test_what_datafusion_does_not_understand_is_an_error(session: SessionContext, statement: str) -> None:
    with pytest.raises(SchemaError):
        read_statement(session, statement)
