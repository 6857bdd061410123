"""Operators that keep state, each beside the node that builds it; one module per family."""
