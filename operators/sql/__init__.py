"""Streaming SQL: DataFusion parses and plans, the logical plan becomes operators of the package."""
