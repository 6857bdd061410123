"""Whether the partial states that a table holds are those of the aggregation that it is opened for."""

from __future__ import annotations

from statebackend.aggregate_declaration import Declaration
from statebackend.errors import SchemaMismatchError
from statebackend.merge import TableLayout
from statebackend.tables import TableSpec

__all__ = ["require_same_states"]


def require_same_states(
    known: TableSpec, layout: TableLayout, wanted: TableSpec, url: str, fingerprint: str | None = None
) -> None:
    """Raise `SchemaMismatchError` unless the aggregation is the one whose states the table holds."""
    # Compared as values: the bytes of a type may differ between versions of Arrow.
    old_states, new_states = _declaration(known), _declaration(wanted)
    if old_states != new_states:
        raise SchemaMismatchError(
            f"{url}: table {known.name!r} holds the states of {_functions(old_states)}, "
            f"asked for {_functions(new_states)}"
        )
    if fingerprint is not None and fingerprint != layout.fingerprint:
        raise SchemaMismatchError(
            f"{url}: table {known.name!r} holds states of layout {fingerprint}, "
            f"this DataFusion makes {layout.fingerprint}"
        )


def _declaration(spec: TableSpec) -> Declaration | None:
    return None if spec.aggregation is None else Declaration.decode(spec.aggregation)


def _functions(declaration: Declaration | None) -> str:
    if declaration is None:
        return "no aggregation"
    return ", ".join(f"{declaration.calls[o.call].described()} as {o.name}" for o in declaration.outputs)
