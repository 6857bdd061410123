"""UNNEST in a SELECT list: one row for each element of a list.

DataFusion puts the list into a column ``__unnest_placeholder(LIST)`` below the node, and calls its elements
``__unnest_placeholder(LIST,depth=1)`` above it.
"""

from __future__ import annotations

import re
from dataclasses import replace

from datafusion import LogicalPlan

from operators.errors import UnsupportedQueryError
from operators.sql.relation import Relation

__all__ = ["unnested"]

_ONE_LIST = re.compile(r"Unnest: lists\[((?:(?!\|depth=).)*)\|depth=1\] structs\[\]", re.DOTALL)


def unnested(relation: Relation, plan: LogicalPlan) -> Relation:
    """The rows of the input of an Unnest node, each once for every element of its list.

    Raises `UnsupportedQueryError` for several lists at once, lists in lists, and structs.
    """
    if (match := _ONE_LIST.fullmatch(plan.display())) is None:
        raise UnsupportedQueryError(
            "UNNEST of several lists, of lists in lists, or of a struct", "unnest one list in a subquery of its own"
        )
    name = match[1]
    column = relation.column(None, name)
    element = f"{name.removesuffix(')')},depth=1)"
    fields = tuple(replace(g, name=element) if g.column == column else g for g in relation.fields)
    return replace(relation, stream=relation.stream.unnest(column), fields=fields)
