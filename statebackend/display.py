"""Stores, manifests, checkpoints and tables as a notebook shows them.

One function for each kind of object, from its values to `Markup`; the ``_repr_html_`` of the object hands itself over.
So types of objects are named for the type checker only: the objects know this module, it does not import theirs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from statebackend.markup import Markup, card, details, element, facts, grid, joined
from statebackend.quantities import byte_size, counted, in_unit, moment, utc

if TYPE_CHECKING:
    from statebackend.backend import Checkpoint, JobState
    from statebackend.manifest import Manifest, TableState
    from statebackend.metrics import StoreMetrics, TableMetrics
    from statebackend.relation import Relation
    from statebackend.tables import TableSpec

__all__ = [
    "catalog",
    "checkpoint",
    "checkpoint_tables",
    "job_state",
    "manifest",
    "metrics",
    "no_catalog",
    "relation",
    "table_spec",
]

_ROWS = 10
"""Rows of a table that are shown."""


def checkpoint(of: Checkpoint) -> Markup:
    """A checkpoint: when it was made, and what the job committed with it."""
    return card(f"checkpoint {of.checkpoint_id}", "Checkpoint", _made(of), job_state(of.job))


def checkpoint_tables(of: Checkpoint, url: str, state: Manifest) -> Markup:
    """A checkpoint that is open for reading: its tables and positions."""
    return card(
        f"checkpoint {of.checkpoint_id} of {_near(url)}", "CheckpointReader", _made(of), _tables(state), _job(of.job)
    )


def catalog(
    of: Checkpoint | None,
    url: str,
    tables: Mapping[str, TableState],
    columns: Mapping[str, Sequence[str]],
    system: Iterable[str],
) -> Markup:
    """What can be asked: the tables, under the names by which SQL knows them, and their ``columns``."""
    rows = []
    for name, shown in sorted(columns.items()):
        sizes = _sizes(tables[name]) if name in tables else (None, None)  # None: all in memory so far
        rows.append((sql_name("state", name), ", ".join(shown), *sizes))
    asked = ("state_at('TABLE', CHECKPOINT)", "state_diff('TABLE', CHECKPOINT, CHECKPOINT)")
    return card(
        f"state of {_near(url)}",
        "StateCatalog",
        facts({"checkpoint": "none yet"}) if of is None else _made(of),
        grid(("table", "columns", "stored rows", "bytes"), rows, right=("bytes",)),
        facts({"also": 'raw."TABLE"', "other checkpoints": ", ".join(asked)}),
        facts({"system": ", ".join(f"system.{name}" for name in sorted(system))}),
    )


def no_catalog(error: Exception) -> Markup:
    """Why nothing can be asked."""
    return card("no state to be seen", "StateCatalog", element("div", error))


def manifest(of: Manifest) -> Markup:
    """A manifest: who wrote it, what it names, and what it keeps."""
    kept = [str(r.checkpoint_id) for r in of.retained]
    return card(
        f"manifest {of.number}",
        "Manifest",
        facts(
            {
                "checkpoint": int(of.checkpoint_id) or None,
                "made": f"{utc(of.created_ms)} UTC",
                "store": of.store_id,
                "writer epoch": int(of.writer_epoch),
                "compactor epoch": of.compactor_epoch,
                "timeline": of.timeline,
            }
        ),
        facts({"checkpoints kept": ", ".join(kept) or None, "copies kept for": ", ".join(of.copies) or None}),
        _tables(of),
        _job(of.job),
    )


def metrics(of: StoreMetrics, url: str | None = None, *, closed: bool = False) -> Markup:
    """An open store: what it has written, holds, and does in the background. ``url``: as the user wrote it."""
    made = of.checkpoint_created_ms
    return card(
        url or of.url,
        "StateStore, closed" if closed else "StateStore",
        facts(
            {
                "checkpoint": of.checkpoint_id or "none yet",
                "made": None if made is None else f"{utc(made)} UTC",
                "manifest": of.manifest_number,
                "writer epoch": of.writer_epoch,
            }
        ),
        facts(
            {
                "memory": byte_size(of.memory.total),
                "read": byte_size(of.bytes_read),
                "written": byte_size(of.bytes_written),
                "write amplification": of.amplification.write,
            }
        ),
        grid(
            ("table", "kind", "rows in memory", "rows in files", "bytes in files", "flushed files", "sorted runs"),
            [_table_metrics(table) for table in of.tables],
            right=("bytes in files",),
        ),
        details(
            "background",
            grid(
                ("task", "state", "done", "waiting", "failed", "last failure"),
                [(t.task, t.state.value, t.completed, t.backlog, t.failures, t.last_error) for t in of.tasks],
            ),
        ),
    )


def relation(of: Relation) -> Markup:
    """The first rows of a table, with the types of its columns."""
    rows, more = _first(of, _ROWS)
    if not rows:
        return facts({"no rows": ", ".join(f"{f.name} {f.type}" for f in of.schema)})
    shown = grid([f"{f.name}\n{f.type}" for f in of.schema], rows)
    return joined(shown, facts({"…": f"more than {_ROWS} rows"}) if more else None)


def table_spec(of: TableSpec) -> Markup:
    """The declaration of a table: its columns and what they are for."""
    roles: dict[str | None, str] = {**dict.fromkeys(of.key, "key"), of.time_field: "key, time", of.ttl_field: "ttl"}
    rows = [(field.name, str(field.type), roles.get(field.name, "")) for field in of.schema]
    stored = facts({"kind": of.kind.value, "order": of.order.value})
    return card(of.name, "TableSpec", stored, grid(("column", "type", "role"), rows))


def job_state(of: JobState) -> Markup:
    """Positions and watermarks of a job."""
    sources = [(name, _json(position), _marks(name, of.watermarks)) for name, position in sorted(of.sources.items())]
    own = {name.split("/")[0]: name for name in of.sources}
    marks = [(name, moment(mark)) for name, mark in sorted(of.watermarks.items()) if name.split("/")[0] not in own]
    staged = [(name, len(values)) for name, values in sorted(of.committables.items()) if values]
    return joined(
        grid(("source", "next position", "watermark"), sources, "positions") if sources else None,
        grid(("operator", "watermark"), marks, "event time") if marks else None,
        grid(("sink", "to publish"), staged, "staged output") if staged else None,
    )


def sql_name(schema: str, table: str) -> str:
    """The name of a table as SQL wants it."""
    quoted = table.replace('"', '""')
    return f'{schema}."{quoted}"'


def _near(url: str) -> str:
    """A path below the working directory as it is seen from there; any other URL as it is."""
    here = Path.cwd()
    return str(Path(url).relative_to(here)) if Path(url).is_relative_to(here) else url


def _job(of: JobState) -> Markup | None:
    return details("positions and watermarks", job_state(of)) if of.sources or of.watermarks else None


def _made(of: Checkpoint) -> Markup:
    return facts(
        {
            "checkpoint": int(of.checkpoint_id),
            "made": f"{utc(of.created_ms)} UTC",
            "manifest": of.manifest_number,
            "written": f"{counted(of.rows_written, 'row')}, {byte_size(of.bytes_written)}" if of.rows_written else None,
            "took": f"{of.duration_s * 1000:.0f} ms" if of.duration_s else None,
        }
    )


def _tables(of: Manifest) -> Markup:
    rows = [
        (name, state.spec.kind.value, ", ".join(state.spec.key), *_sizes(state), _levels(state), _watermark(state))
        for name, state in sorted(of.tables.items())
    ]
    columns = ("table", "kind", "key", "stored rows", "bytes", "files", "watermark")
    return grid(columns, rows, counted(len(rows), "table"), right=("bytes",))


def _sizes(of: TableState) -> tuple[int, str]:
    return sum(f.rows for f in of.files), byte_size(sum(f.size for f in of.files))


def _levels(of: TableState) -> str:
    """How many files were flushed, and how many each sorted run has: ``3 flushed, run of 2``."""
    parts = []
    for run, files in groupby(of.files, lambda f: f.run):
        count = len(list(files))
        parts.append(f"{count} flushed" if run is None else f"run of {count}")
    return ", ".join(parts) or "none"


def _watermark(of: TableState) -> str | None:
    if of.watermark is None or of.spec.expiry_field is None:
        return None
    return in_unit(of.spec.schema.field(of.spec.expiry_field).type, of.watermark)


def _table_metrics(of: TableMetrics) -> Sequence[object]:
    return (of.name, of.kind, of.memtable_rows, of.rows, byte_size(of.bytes), of.l0_files, of.sorted_runs)


def _marks(source: str, watermarks: Mapping[str, int]) -> str | None:
    """The watermark of a source, and those of its splits."""
    marks = [moment(watermarks[source])] if source in watermarks else []
    prefix = f"{source}/"
    marks += [f"{n.removeprefix(prefix)}: {moment(m)}" for n, m in sorted(watermarks.items()) if n.startswith(prefix)]
    return "\n".join(marks) or None


def _json(value: Any) -> str:
    return json.dumps(value, default=lambda data: f"<{len(data)} bytes>", ensure_ascii=False)


def _first(of: Relation, count: int) -> tuple[list[tuple[Any, ...]], bool]:
    """The first rows, and whether there are more."""
    rows: list[tuple[Any, ...]] = []
    for batch in of.batches():
        part = batch.slice(0, count + 1 - len(rows))
        rows += zip(*(_plain(column) for column in part.columns), strict=True)
        if len(rows) > count:
            return rows[:count], True
    return rows, False


def _plain(column: pa.Array) -> list[Any]:
    """Values for reading; of what Python has no type for (times in ns, say) the text that Arrow gives it."""
    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except (ValueError, OverflowError):
        return [None if not value.is_valid else str(value.cast(pa.string())) for value in column]
