"""Subqueries over registered tables alone: DataFusion answers them when the stream is built."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import pyarrow as pa
from datafusion import LogicalPlan, SessionContext
from datafusion.expr import TableScan

from operators.errors import SchemaError, UnsupportedQueryError
from operators.sql.expressions import CHANGING

__all__ = ["reads_tables_only", "rows_of"]


def reads_tables_only(plan: LogicalPlan, tables: AbstractSet[str]) -> bool:
    """Whether a plan reads these tables and no stream; no if an expression holds a subquery, which is not seen."""
    if "(<subquery>)" in plan.display_indent():
        return False
    names = _scanned(plan)
    return bool(names) and names <= tables


def _scanned(plan: LogicalPlan) -> set[str]:
    """The names of everything that is read below a node."""
    variant = plan.to_variant()
    if isinstance(variant, TableScan):
        return {variant.table_name()}
    return {name for child in plan.inputs() for name in _scanned(child)}


def rows_of(session: SessionContext, plan: LogicalPlan, alias: str) -> pa.Table:
    """The rows of a plan over tables, the same ones whenever the job is built."""
    text = plan.display_indent()
    if changing := sorted(name for name in CHANGING if f"{name}()" in text):
        raise UnsupportedQueryError(
            f"{changing[0]}() in the subquery {alias}", "its rows would be other ones after a restart; leave it out"
        )
    try:
        return session.create_dataframe_from_logical_plan(plan).to_arrow_table()
    except Exception as error:  # the binding raises bare exceptions
        raise SchemaError(f"sql: the subquery {alias}: {str(error)[:300]}") from error
