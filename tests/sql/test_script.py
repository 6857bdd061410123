"""Scripts as parts of a job: definitions, INSERTs that share their sources, and answers."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from operators import DataStream, SchemaError, StreamContext, UnsupportedQueryError
from operators.errors import BadInputError, OperatorError
from operators.report import JobOutcome
from operators.sinks import MemorySink

ROWS = 20


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a stream of a row per second, and a table, which is the working directory."""
    times = pa.array(range(0, ROWS * 1000, 1000), pa.timestamp("ms"))
    rows = pa.table({"t": times, "k": ["a", "b"] * (ROWS // 2), "v": range(ROWS)})
    pq.write_table(rows, tmp_path / "x.parquet")
    (tmp_path / "y.csv").write_text("t;k;v\n1970-01-01 00:00:01;a;1\n1970-01-01 00:00:02;b;2\n")
    (tmp_path / "dim.csv").write_text("k|label\na|Alpha\nb|Beta\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


X = """CREATE EXTERNAL TABLE x STORED AS PARQUET LOCATION 'x.parquet'
       OPTIONS ('event_time' 't', 'watermark_delay' '2 s');"""
DIM = """CREATE EXTERNAL TABLE dim STORED AS CSV LOCATION 'dim.csv'
         OPTIONS ('mode' 'static', 'has_header' 'true', 'delimiter' '|');"""
SINK = (
    "CREATE EXTERNAL TABLE o (w TIMESTAMP(3), k VARCHAR, n BIGINT) STORED AS PARQUET LOCATION 'o' OPTIONS (mode sink);"
)


def context(*scripts: str) -> StreamContext:
    found = StreamContext()
    for script in scripts:
        found.execute(script)
    return found


def written(place: Path, name: str) -> list[tuple[object, ...]]:
    table = pq.read_table(place / name)
    return sorted(zip(*(column.to_pylist() for column in table.columns), strict=True), key=str)


def rows_of(stream: DataStream) -> list[dict[str, object]]:
    sink = MemorySink()
    stream.sink(sink)
    stream.context.run()
    return sink.table().to_pylist()


def test_a_stream_that_is_defined_can_be_asked(place: Path) -> None:
    job = context(X)
    (stream,) = job.execute("SELECT tumble(t, INTERVAL '10 s') AS w, count(*) AS c FROM x GROUP BY 1")
    assert isinstance(stream, DataStream)
    assert [row["c"] for row in rows_of(stream)] == [10, 10]


def test_definitions_are_known_to_sql_and_its_verbs(place: Path) -> None:
    job = context(X, "CREATE VIEW big AS SELECT * FROM x WHERE v >= 18")
    assert [row["v"] for row in rows_of(job.sql("SELECT v FROM big"))] == [18, 19]


def test_columns_of_a_csv_stream_are_declared(place: Path) -> None:
    job = context(
        """CREATE EXTERNAL TABLE y (t TIMESTAMP(6), v SMALLINT) STORED AS CSV LOCATION 'y.csv'
           OPTIONS ('event_time' 't', 'delimiter' ';')"""
    )
    (stream,) = job.execute("SELECT * FROM y")
    assert isinstance(stream, DataStream)
    assert stream.schema == pa.schema({"t": pa.timestamp("us"), "v": pa.int16()})
    assert stream.event_time == "t"
    assert [row["v"] for row in rows_of(stream)] == [1, 2]


def test_columns_of_a_parquet_stream_are_those_that_are_declared_of_the_declared_types(place: Path) -> None:
    job = context("CREATE EXTERNAL TABLE x (v INT, k VARCHAR) STORED AS PARQUET LOCATION 'x.parquet'")
    (stream,) = job.execute("SELECT * FROM x WHERE v > 18")
    assert isinstance(stream, DataStream)
    assert stream.schema == pa.schema({"v": pa.int32(), "k": pa.string()})
    assert rows_of(stream) == [{"v": 19, "k": "b"}]


def test_an_event_time_is_declared_as_it_is_or_not_at_all(place: Path) -> None:
    with pytest.raises(SchemaError, match=r"event time 't' is timestamp\[ms\].*TIMESTAMP\(3\)"):
        context("CREATE EXTERNAL TABLE x (t TIMESTAMP) STORED AS PARQUET LOCATION 'x.parquet' OPTIONS (event_time t)")


def test_every_format_that_is_written_is_read_with_the_columns_in_names_of_directories(place: Path) -> None:
    for kind in ("PARQUET", "CSV", "JSON", "ARROW"):
        where = f"STORED AS {kind} PARTITIONED BY (k) LOCATION '{kind}'"
        context(X, f"COPY (SELECT k, v FROM x WHERE v < 3) TO '{kind}' STORED AS {kind} PARTITIONED BY (k)").run()
        for table in ("back", "back (k VARCHAR, v BIGINT)"):
            job = context(f"CREATE EXTERNAL TABLE {table} {where}")
            rows = rows_of(job.sql("SELECT k, v FROM back"))
            assert sorted(rows, key=lambda row: str(row["v"])) == [
                {"k": "a", "v": 0},
                {"k": "b", "v": 1},
                {"k": "a", "v": 2},
            ]


def test_a_directory_is_followed_until_the_job_is_stopped(place: Path) -> None:
    job = context(
        """CREATE EXTERNAL TABLE later (t TIMESTAMP(3), k VARCHAR, v BIGINT) STORED AS PARQUET LOCATION '.'
           OPTIONS ('mode' 'follow', 'event_time' 't', 'poll_interval' '10 milliseconds')"""
    )
    sink = MemorySink()
    job.sql("SELECT v FROM later").sink(sink)
    running = job.job(lambda progress: running.stop() if progress.rows_read else None)
    assert running.run().outcome is JobOutcome.STOPPED
    assert sink.table().num_rows == ROWS


def test_a_topic_is_declared_without_asking_for_it(place: Path) -> None:
    job = context(
        """CREATE EXTERNAL TABLE clicks (who VARCHAR, n BIGINT, "timestamp" TIMESTAMP(3)) STORED AS KAFKA
           LOCATION 'clicks'
           OPTIONS ('bootstrap_servers' 'localhost:1', 'metadata' 'timestamp', kafka.client.id 'me')"""
    )
    assert job.sql("SELECT * FROM clicks").schema.names == ["who", "n", "timestamp"]


def test_a_topic_is_written_as_the_verb_does(place: Path) -> None:
    job = context(
        X,
        """CREATE EXTERNAL TABLE t (k VARCHAR, n BIGINT) STORED AS KAFKA LOCATION 'counts'
           OPTIONS ('mode' 'sink', 'bootstrap_servers' 'localhost:1', 'key' 'k', kafka.client.id 'me');
           INSERT INTO t SELECT k, count(*) FROM x GROUP BY k;""",
    )
    assert job.explain().startswith("sink t (exactly once)")
    assert dict(job.graph.sinks[0].describe()["sink"]) == {"kind": "kafka", "topic": "counts"}


def test_a_static_table_is_what_datafusion_reads_and_is_joined(place: Path) -> None:
    job = context(X, DIM)
    (stream,) = job.execute("SELECT v, label FROM x JOIN dim ON x.k = dim.k WHERE v < 2")
    assert isinstance(stream, DataStream)
    assert rows_of(stream) == [{"v": 0, "label": "Alpha"}, {"v": 1, "label": "Beta"}]


def test_questions_about_tables_are_answered_at_once(place: Path) -> None:
    rows, two = context(X, DIM).execute("SELECT label FROM dim ORDER BY k DESC LIMIT 1; SELECT 1 + 1 AS two")
    assert isinstance(rows, pa.Table)
    assert rows.to_pylist() == [{"label": "Beta"}]
    assert isinstance(two, pa.Table)
    assert two.to_pylist() == [{"two": 2}]


def test_a_subquery_over_a_stream_is_no_question_about_tables(place: Path) -> None:
    with pytest.raises(UnsupportedQueryError):
        context(X, DIM).execute("SELECT label FROM dim WHERE k IN (SELECT k FROM x)")


def test_inserts_of_a_script_are_one_job_that_shares_its_sources(place: Path) -> None:
    job = context(
        X,
        SINK,
        """INSERT INTO o SELECT tumble(t, INTERVAL '10 s'), k, count(*) FROM x GROUP BY 1, 2;
           INSERT INTO o (w, n) SELECT t, v FROM x WHERE v = 19;
           COPY (SELECT k, v FROM x WHERE v < 2) TO 'copied' STORED AS PARQUET PARTITIONED BY (k);""",
    )
    assert [sink.operator_id for sink in job.graph.sinks] == ["o", "copy-copied"]
    assert sum(not node.inputs for node in job.graph.nodes()) == 1
    job.run()
    assert [(k, n) for _, k, n in written(place, "o")] == [("a", 5), ("b", 5), ("a", 5), ("b", 5), (None, 19)]
    assert written(place, "copied") == [(0, "a"), (1, "b")]


def test_rows_are_written_with_the_declared_types(place: Path) -> None:
    sink = "CREATE EXTERNAL TABLE o (t DATE, v VARCHAR) STORED AS PARQUET LOCATION 'o' OPTIONS ('mode' 'sink');"
    context(X, sink, "INSERT INTO o SELECT t, v FROM x WHERE v = 3").run()
    assert pq.read_schema(next((place / "o").glob("part*.parquet"))).types == [pa.date32(), pa.string()]


def test_a_sink_gets_a_changelog_or_what_is_valid_in_the_end(place: Path) -> None:
    columns = "(k VARCHAR, n BIGINT) STORED AS PARQUET LOCATION"
    context(
        X,
        f"""CREATE EXTERNAL TABLE changes {columns} 'changes' OPTIONS ('mode' 'sink');
            CREATE EXTERNAL TABLE final {columns} 'final' OPTIONS ('mode' 'sink', 'emit' 'final');
            INSERT INTO changes SELECT k, count(*) FROM x GROUP BY k;
            INSERT INTO final SELECT k, count(*) FROM x GROUP BY k;""",
    ).run()
    assert written(place, "changes")[0][0] == "insert"
    assert written(place, "final") == [("a", 10), ("b", 10)]


def test_names_are_shown_and_described(place: Path) -> None:
    shown, described = context(X, DIM, SINK, "CREATE VIEW big AS SELECT k, count(*) AS c FROM x GROUP BY k").execute(
        "SHOW TABLES; DESCRIBE x"
    )
    assert isinstance(shown, pa.Table)
    assert [tuple(row.values()) for row in shown.to_pylist()] == [
        ("big", "view"),
        ("dim", "table"),
        ("o", "sink"),
        ("x", "stream"),
    ]
    assert isinstance(described, pa.Table)
    assert described.to_pylist()[0] == {"column": "t", "type": "timestamp[ms]", "note": "event time"}


def test_what_datafusion_knows_is_shown(place: Path) -> None:
    for answer in context(X).execute("SHOW FUNCTIONS; SHOW ALL; SHOW COLUMNS FROM x"):
        assert isinstance(answer, pa.Table)
        assert answer.num_rows > 0


def test_explain_shows_operators_and_leaves_nothing_behind(place: Path) -> None:
    job = context(X, SINK)
    query = "SELECT tumble(t, INTERVAL '10 s') AS w, k, count(*) AS c FROM x GROUP BY 1, 2"
    of_query, of_insert = job.execute(f"EXPLAIN {query}; EXPLAIN INSERT INTO o {query}")
    assert isinstance(of_query, str)
    assert "state query-1-tumble-k-10000: one row per group" in of_query
    assert isinstance(of_insert, str)
    assert of_insert.startswith("sink o (exactly once)")
    assert not job.graph.sinks
    job.execute(f"INSERT INTO o {query}")
    assert len(job.graph.sinks) == 1


def test_a_name_is_dropped_and_given_anew(place: Path) -> None:
    job = context(X)
    job.execute(f"DROP TABLE x; {X} DROP TABLE IF EXISTS nothing; {X.replace('TABLE', 'TABLE IF NOT EXISTS')}")
    job.execute(X.replace("CREATE", "CREATE OR REPLACE").replace("x STORED", "x (v BIGINT, t TIMESTAMP(3)) STORED"))
    assert job.sql("SELECT * FROM x").schema.names == ["v", "t"]
    assert list(job.definitions) == ["x"]
    with pytest.raises(SchemaError, match="there is a stream 'x' already"):
        job.execute(X)
    with pytest.raises(SchemaError, match="there is no table 'nothing'"):
        job.execute("DROP TABLE nothing")


def test_what_a_view_reads_is_not_dropped(place: Path) -> None:
    job = context(X, "CREATE VIEW big AS SELECT * FROM x WHERE v > 18")
    with pytest.raises(SchemaError, match="the view 'big' reads 'x'"):
        job.execute("DROP TABLE x")
    job.execute("DROP VIEW big; DROP TABLE x;")
    assert not job.definitions


def test_two_operators_of_one_name_are_never_in_one_job(place: Path) -> None:
    job = context(X)
    old = job.sql("SELECT * FROM x")
    job.execute(f"DROP TABLE x; {X}")
    old.sink(MemorySink(), name="one")
    job.sql("SELECT * FROM x").sink(MemorySink(), name="two")
    with pytest.raises(ValueError, match="two operators are called 'x'"):
        job.run()


def test_a_statement_that_fails_leaves_nothing_behind_and_tells_its_line(place: Path) -> None:
    job = context(X, SINK)
    with pytest.raises(SchemaError) as raised:
        job.execute("SHOW TABLES;\n\nINSERT INTO o\nSELECT t, k, nothing FROM x;")
    assert raised.value.__notes__ == ["in line 3: INSERT INTO o …"]
    job.execute("INSERT INTO o SELECT t, k, v FROM x")


OF_CSV, OF_PARQUET = ("CREATE EXTERNAL TABLE e STORED AS " + kind for kind in ("CSV", "PARQUET"))


@pytest.mark.parametrize(
    ("statement", "error", "text"),
    [
        (f"{OF_PARQUET} LOCATION 'nothing'", BadInputError, "no such file"),
        ("CREATE EXTERNAL TABLE e STORED AS AVRO LOCATION 'x'", UnsupportedQueryError, "'mode' 'static'"),
        ("CREATE EXTERNAL TABLE e STORED AS KAFKA LOCATION 'x'", SchemaError, "'bootstrap_servers' 'host:port'"),
        (f"{OF_PARQUET} LOCATION '*.parquet' OPTIONS (mode follow)", SchemaError, "only a directory can be followed"),
        (f"{OF_CSV} LOCATION 'x' OPTIONS (max_rows_per_second '-1')", SchemaError, "a positive number"),
        (f"{OF_CSV} LOCATION 'dim.csv' OPTIONS (x 'y')", SchemaError, "no option 'x'; there are mode, event_time"),
        (f"{OF_CSV} LOCATION 'x' OPTIONS (mode 'y')", SchemaError, "bounded, follow, static, sink"),
        (f"{OF_CSV} LOCATION 'x' OPTIONS (watermark_delay 'long')", SchemaError, "4 seconds"),
        (f"{OF_CSV} LOCATION 'x' OPTIONS (max_drift '1 month')", SchemaError, "in days"),
        (f"{OF_CSV} LOCATION 'x' OPTIONS (storage.key 'env:NO_SUCH')", SchemaError, "NO_SUCH"),
        (f"{OF_PARQUET} LOCATION 'x.parquet' OPTIONS (batch_rows '0')", SchemaError, "least 1"),
        (f"{OF_PARQUET} LOCATION 'x' OPTIONS (mode sink)", SchemaError, "needs its columns"),
        ("CREATE EXTERNAL TABLE e (a INT) STORED AS AVRO LOCATION 'x' OPTIONS (mode sink)", OperatorError, "AVRO"),
        (f"{OF_CSV} LOCATION 'no.csv' OPTIONS (mode static, no 'x')", SchemaError, "table e"),
        ("CREATE VIEW e AS SELECT * FROM o", UnsupportedQueryError, "only written to"),
        ("SELECT * FROM o", UnsupportedQueryError, "only written to"),
        ("INSERT INTO x SELECT * FROM x", SchemaError, "that is a stream"),
        ("INSERT INTO o SELECT 1", SchemaError, "Column count"),
        ("INSERT INTO o SELECT * FROM x ORDER BY v", UnsupportedQueryError, "ORDER BY"),
        (
            "COPY (SELECT * FROM x) TO 'c' STORED AS AVRO",
            UnsupportedQueryError,
            "AVRO: it may be PARQUET, CSV, .* or KAFKA",
        ),
        ("COPY (SELECT * FROM x) TO 'c' STORED AS PARQUET OPTIONS (mode 'sink')", SchemaError, "no option 'mode'"),
    ],
)
def test_errors_say_what_is_wrong(place: Path, statement: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        context(X, SINK).execute(statement)


def test_what_is_to_be_replaced_stays_if_that_fails(place: Path) -> None:
    job = context(X)
    with pytest.raises(BadInputError):
        job.execute("CREATE OR REPLACE EXTERNAL TABLE x STORED AS PARQUET LOCATION 'nothing'")
    assert list(job.definitions) == ["x"]
    assert job.sql("SELECT v FROM x").schema.names == ["v"]
