"""Manifests as tables for a terminal: one thing, one line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from statebackend.bench import Figure
from statebackend.histogram import Histogram
from statebackend.inspect import StoreView
from statebackend.manifest import Manifest, TableState
from statebackend.metrics import Sample
from statebackend.quantities import byte_size, in_unit, moment, utc
from statebackend.tables import TableSpec

__all__ = [
    "branches_table",
    "figures_table",
    "files_table",
    "identity_table",
    "job_table",
    "manifests_table",
    "pins_table",
    "samples_table",
    "savepoints_table",
    "schema_table",
    "tables_table",
]


class TitledTable(Table):
    """A table whose title is a line of its own, however narrow the table."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.heading:
            yield Text(self.heading, style="bold")
        yield from super().__rich_console__(console, options)

    heading: str = ""


def _table(
    title: str, *columns: str, right: Sequence[str] = (), fold: Sequence[str] = (), header: bool = True
) -> Table:
    table = TitledTable(box=box.SIMPLE_HEAD, show_header=header)
    table.heading = title
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=name not in fold, overflow="fold")
    return table


def manifests_table(view: StoreView) -> Table:
    """The newest manifests, one a line; what cannot be read says why."""
    numbers = ("manifest", "checkpoint", "epoch", "tables", "files", "rows", "bytes")
    table = _table("manifests, newest first", *numbers, "time (UTC)", right=numbers)
    by_number = {int(m.number): m for m in view.manifests}
    for number in view.numbers[: len(by_number) + len(view.unreadable)]:
        if number in view.unreadable:
            table.add_row(str(number), *["?"] * 6, type(view.unreadable[number]).__name__)
        elif number in by_number:
            m = by_number[number]
            files = m.files.values()
            table.add_row(
                str(number), str(m.checkpoint_id or "-"), str(m.writer_epoch), str(len(m.tables)), str(len(files)),
                f"{sum(f.rows for f in files):,}", byte_size(sum(f.size for f in files)), utc(m.created_ms),
            )  # fmt: skip
    return table


def tables_table(manifest: Manifest) -> Table:
    """The tables of a manifest, one a line."""
    numbers = ("files", "rows", "bytes")
    table = _table("tables", "name", "kind", "order", *numbers, "watermark", "key", right=numbers, fold=("name", "key"))
    for name, state in sorted(manifest.tables.items()):
        table.add_row(
            name, state.spec.kind, state.spec.order, str(len(state.files)), f"{sum(f.rows for f in state.files):,}",
            byte_size(sum(f.size for f in state.files)), _watermark(state), ", ".join(state.spec.key),
        )  # fmt: skip
    return table


def identity_table(manifest: Manifest) -> Table:
    """Who wrote the manifest, and where it stands in the history."""
    table = _table(f"manifest {manifest.number}", "field", "value", fold=("value",), header=False)
    for name in ("store_id", "timeline", "writer_epoch", "writer_id", "attempt_id", "parent_attempt", "checkpoint_id"):
        table.add_row(name, str(getattr(manifest, name)))
    table.add_row("created (UTC)", utc(manifest.created_ms))
    kept = [str(r.checkpoint_id) for r in manifest.retained]
    table.add_row("retained checkpoints", ", ".join(kept) or "none")
    for why in manifest.copies:
        table.add_row("keeps for", why)
    for number, root in sorted(manifest.roots.items()):
        table.add_row(f"root/{number}/", f"{root.url} (store {root.store_id})")
    return table


def job_table(manifest: Manifest) -> Table:
    """What the job committed beside its tables."""
    table = _table("job", "operator", "what", "value", fold=("operator", "value"))
    job = manifest.job
    for operator, position in sorted(job.sources.items()):
        table.add_row(operator, "next position", _json(position))
    for operator, watermark in sorted(job.watermarks.items()):
        table.add_row(operator, "watermark", moment(watermark))
    for operator, committables in sorted(job.committables.items()):
        table.add_row(operator, "to publish", f"{len(committables)}: {_json(list(committables))}")
    for operator, plan in sorted(job.plan.items()):
        table.add_row(operator, "plan", _json(plan))
    return table


def savepoints_table(manifest: Manifest) -> Table:
    """Named savepoints, one a line."""
    table = _table("savepoints", "name", "checkpoint", "made (UTC)", "expires (UTC)", "object", fold=("name",))
    for name, s in sorted(manifest.savepoints.items()):
        expires = "never" if s.expires_ms is None else utc(s.expires_ms)
        table.add_row(name, str(s.checkpoint_id), utc(s.created_ms), expires, s.object_name)
    return table


def branches_table(manifest: Manifest) -> Table:
    """Stores that were branched off this one, one a line."""
    table = _table("branches", "store", "checkpoint", "made (UTC)", "object", "URL", fold=("URL",))
    for store_id, b in sorted(manifest.branches.items(), key=lambda item: item[1].created_ms):
        table.add_row(store_id, str(b.checkpoint_id), utc(b.created_ms), b.object_name, b.url)
    return table


def pins_table(manifest: Manifest) -> Table:
    """Leases on checkpoints that are being read, one a line."""
    table = _table("pins", "pin", "checkpoint", "made (UTC)", "expires (UTC)", "object")
    for pin, p in sorted(manifest.pins.items(), key=lambda item: item[1].created_ms):
        table.add_row(pin, str(p.checkpoint_id), utc(p.created_ms), utc(p.expires_ms), p.object_name)
    return table


def schema_table(spec: TableSpec) -> Table:
    """Columns of a table, their types and roles."""
    title = f"table {spec.name}: {spec.kind}, order {spec.order}"
    table = _table(title, "column", "type", "role", fold=("type",))
    for field in spec.schema:
        role = "key" if field.name in spec.key else ""
        role = {spec.time_field: "key, time", spec.ttl_field: "ttl"}.get(field.name, role)
        table.add_row(field.name, str(field.type), role)
    return table


def files_table(state: TableState) -> Table:
    """Files of a table with their ranges, one a line."""
    numbers = ("level", "rows", "bytes")
    table = _table(f"files of {state.spec.name}, oldest first", "file", *numbers, "times", "hashes", right=numbers)
    for f in state.files:
        timed = f.time_min is not None and f.time_max is not None and f.time_min <= f.time_max
        times = "-" if not timed else f"{_in_unit(state, f.time_min)} .. {_in_unit(state, f.time_max)}"
        hashes = f"{f.hash_min:016x} .. {f.hash_max:016x}"
        table.add_row(f.name, str(f.level), f"{f.rows:,}", byte_size(f.size), times, hashes)
    return table


def _watermark(state: TableState) -> str:
    return "-" if state.watermark is None else _in_unit(state, state.watermark)


def _in_unit(state: TableState, value: int | None) -> str:
    """A value of the column by which the table's rows expire."""
    if value is None or state.spec.expiry_field is None:
        return "-"
    return in_unit(state.spec.schema.field(state.spec.expiry_field).type, value)


def _json(value: Any) -> str:
    return json.dumps(value, default=lambda b: f"<{len(b)} bytes>")


def samples_table(samples: Sequence[Sample]) -> Table:
    """Figures by name and labels; bytes and times as people read them."""
    table = _table("", "figure", "labels", "value", right=("value",))
    for s in samples:
        labels = ", ".join(f"{k}={v}" for k, v in s.labels.items())
        assert not isinstance(s.value, Histogram), "nothing from outside is a distribution"
        name = s.name.removeprefix("statebackend_")
        if s.unit == "bytes":
            shown = byte_size(s.value)
        elif name.endswith("created_seconds"):
            shown = utc(int(s.value * 1000))
        else:
            shown = f"{s.value:,.2f}".removesuffix(".00")
        table.add_row(name, labels, shown)
    return table


def figures_table(title: str, figures: Sequence[Figure]) -> Table:
    """Steps of a benchmark with their rates."""
    table = _table(title, "step", "rows", "seconds", "rows/s", right=("rows", "seconds", "rows/s"))
    for figure in figures:
        rate = f"{figure.rows / figure.seconds:,.0f}" if figure.rows and figure.seconds else "-"
        table.add_row(figure.step, f"{figure.rows:,}" if figure.rows else "-", f"{figure.seconds:.3f}", rate)
    return table
