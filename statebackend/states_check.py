"""Whether the partial states that a table holds are those of the aggregation that it is opened for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from statebackend.accumulators import StateMerger
from statebackend.aggregate_declaration import Declaration
from statebackend.errors import SchemaMismatchError
from statebackend.manifest import TableState
from statebackend.merge import TableLayout
from statebackend.tables import TableSpec

if TYPE_CHECKING:
    from datafusion.user_defined import AggregateUDF

__all__ = ["require_known_states", "require_same_states"]


def require_same_states(known: TableSpec, wanted: TableSpec, url: str) -> None:
    """Raise `SchemaMismatchError` unless the aggregation is that of the table, which is open already."""
    # Compared as values: the bytes of a type may differ between versions of Arrow.
    old_states, new_states = _declaration(known), _declaration(wanted)
    if old_states != new_states:
        raise SchemaMismatchError(
            f"{url}: table {known.name!r} holds the states of {_functions(old_states)}, "
            f"asked for {_functions(new_states)}"
        )


def require_known_states(state: TableState, layout: TableLayout, udafs: Mapping[str, AggregateUDF], url: str) -> None:
    """Raise `SchemaMismatchError` unless this DataFusion makes states of the layout that the table holds.

    ``layout``: under which it is opened, maybe for another aggregation than the one that it is declared with.
    Raises `UnsupportedAggregateError` when a function of its aggregation is not known here.
    """
    if state.fingerprint is None or state.spec.aggregation is None:
        return
    made = layout.fingerprint
    if layout.spec.aggregation != state.spec.aggregation:
        made = StateMerger.from_declaration(state.spec.aggregation, udafs).fingerprint
    if state.fingerprint != made:
        raise SchemaMismatchError(
            f"{url}: table {state.spec.name!r} holds states of layout {state.fingerprint}, this DataFusion makes {made}"
        )


def _declaration(spec: TableSpec) -> Declaration | None:
    return None if spec.aggregation is None else Declaration.decode(spec.aggregation)


def _functions(declaration: Declaration | None) -> str:
    if declaration is None:
        return "no aggregation"
    return ", ".join(f"{declaration.calls[o.call].described()} as {o.name}" for o in declaration.outputs)
