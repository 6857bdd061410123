"""Subqueries over tables and table functions alone: DataFusion answers them when the stream is built."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import pyarrow as pa
from datafusion import LogicalPlan, SessionContext
from datafusion.expr import TableScan

from operators.errors import SchemaError, UnsupportedQueryError
from operators.sql.expressions import CHANGING

__all__ = ["SYSTEM_TABLES", "is_table_function", "reads_tables_only", "rows_of", "scanned"]

SYSTEM_TABLES = frozenset(
    f"information_schema.{name}" for name in ("tables", "views", "columns", "df_settings", "routines", "parameters")
)
"""What SHOW TABLES, SHOW COLUMNS, SHOW FUNCTIONS and SHOW ALL read."""


def reads_tables_only(plan: LogicalPlan, tables: AbstractSet[str], *, constants: bool = False) -> bool:
    """Whether a plan reads these tables, or table functions, and no stream.

    No if an expression holds a subquery, which is not seen. ``constants``: what is said of a plan that reads nothing.
    """
    if "(<subquery>)" in plan.display_indent():
        return False
    names = scanned(plan)
    return all(name in tables or is_table_function(name) for name in names) if names else constants


def is_table_function(name: str) -> bool:
    """Whether a scan of this name is a call of a table function, whose arguments the plan does not show."""
    return name.endswith("()")


def scanned(plan: LogicalPlan) -> set[str]:
    """The names of everything that is read below a node, those in a schema with it."""
    variant = plan.to_variant()
    if isinstance(variant, TableScan):
        return {".".join(part for part in variant.fqn() if part is not None)}
    return {name for child in plan.inputs() for name in scanned(child)}


def rows_of(session: SessionContext, plan: LogicalPlan, alias: str | None) -> pa.Table:
    """The rows of a plan over tables, the same ones whenever the job is built; ``alias`` is None if that is now."""
    text = plan.display_indent()
    if alias is not None and (changing := sorted(name for name in CHANGING if f"{name}()" in text)):
        raise UnsupportedQueryError(
            f"{changing[0]}() in the subquery {alias}", "its rows would be other ones after a restart; leave it out"
        )
    try:
        return session.create_dataframe_from_logical_plan(plan).to_arrow_table()
    except Exception as error:  # the binding raises bare exceptions
        what = "sql" if alias is None else f"sql: the subquery {alias}"
        raise SchemaError(f"{what}: {str(error).removeprefix('DataFusion error: ')[:300]}") from error
