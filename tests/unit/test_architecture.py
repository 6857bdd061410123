"""The direction of imports, and one door for each outside library."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

import operators
import statebackend

ROOT = Path(__file__).resolve().parents[2]
DOORS = {
    ("statebackend", "fsspec"): {"objectstore", "objectstore_s3"},
    ("statebackend", "aiobotocore"): {"objectstore_s3"},
    ("statebackend", "aiohttp"): {"objectstore_s3"},
    ("statebackend", "botocore"): {"objectstore_s3"},
    ("statebackend", "obstore"): {"objectstore_obstore"},
    ("statebackend", "slatedb"): {"slatedb_backend"},
    ("statebackend", "msgpack"): {"format"},
    ("statebackend", "prometheus_client"): {"metrics_server"},
    ("statebackend", "datafusion"): {
        "accumulators", "aggregate_declaration", "aggregate_expressions", "aggregate_merge", "plan_surgery", "prepared",
        "aggregate_trial", "canonical_keys", "catalog", "state_layout",
    },
    ("operators", "msgpack"): set(),
    ("operators", "confluent_kafka"): {"library"},
    ("operators", "deltalake"): {"delta"},
    ("operators", "psycopg"): {"postgres_session"},
    ("operators", "prompt_toolkit"): {"shell"},
    ("operators", "pygments"): {"statements"},
}  # fmt: skip


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@cache
def imports(path: Path) -> frozenset[str]:
    """Top-level and second-level names of everything that a module imports while it runs."""
    names: set[str] = set()
    for node in _outside_type_checking(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return frozenset(names)


def _outside_type_checking(tree: ast.AST) -> list[ast.AST]:
    found: list[ast.AST] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        found.append(node)
        found.extend(_outside_type_checking(node))
    return found


def test_the_state_store_never_imports_the_operators() -> None:
    for path in modules("statebackend"):
        assert not {n for n in imports(path) if n.split(".")[0] == "operators"}, path


def test_operators_see_only_what_the_package_exports() -> None:
    for path in modules("operators"):
        deep = {
            n for n in imports(path) if n.startswith("statebackend.") and n.split(".")[1] not in statebackend.__all__
        }
        assert not deep, f"{path} reaches into {deep}"


@pytest.mark.parametrize(("package", "library"), DOORS)
def test_an_outside_library_has_one_door(package: str, library: str) -> None:
    users = {p.stem for p in modules(package) if any(n.split(".")[0] == library for n in imports(p))}
    assert users <= DOORS[package, library]


def test_nothing_stored_can_be_a_pickle() -> None:
    for path in [*modules("statebackend"), *modules("operators")]:
        assert not {n for n in imports(path) if n.split(".")[0] in ("pickle", "cloudpickle", "marshal", "shelve")}, path


@pytest.mark.parametrize("package", ["statebackend", "operators"])
def test_modules_import_without_cycles(package: str) -> None:
    names = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in modules(package)}
    graph = {name: imports(path) & names.keys() for name, path in names.items() if not name.endswith("__init__")}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join((*above, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


FLOORS = [
    {"errors"},
    {"hive", "kafka", "formats", "encoders", "sources", "sinks", "windows", "watermark"},
    {"changelog", "engine", "rows", "pairs", "ordering"},
    {"runtime"},
    {"graph", "picture", "explain"},
    {"flow", "functions", "process", "stateful"},
    {
        "source_driver",
        "pipeline",
        "report",
        "plan_diff",
        "upgrade_report",
        "upgrade",
        "checkpoint",
        "signals",
        "live_state",
        "job",
    },
    {"verbs", "stream", "sql", "reading", "context"},
    {"topics", "denormalized", "testing", "exit_codes", "flights", "demo", "nexmark", "console", "cli", "__main__"},
]
"""The floors of `operators`, from the ground up, as its docstring draws them."""


def test_no_operator_module_imports_one_of_a_floor_above() -> None:
    floor_of = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    for path in modules("operators"):
        name = path.relative_to(ROOT / "operators").with_suffix("").parts[0]
        if name == "__init__":
            continue
        for other in imports(path):
            parts = other.split(".")
            if parts[0] == "operators" and len(parts) > 1 and parts[1] in floor_of:
                assert floor_of[parts[1]] <= floor_of[name], f"operators.{name} imports {other}"


@pytest.mark.parametrize("package", [statebackend, operators], ids=lambda p: p.__name__)
def test_every_exported_name_exists_and_lists_are_sorted(package: object) -> None:
    names = [package.__name__]  # type: ignore[attr-defined]
    names += [m.name for m in pkgutil.walk_packages(package.__path__, f"{names[0]}.") if "__main__" not in m.name]  # type: ignore[attr-defined]
    for name in names:
        module = importlib.import_module(name)
        for exported in getattr(module, "__all__", []):
            assert hasattr(module, exported), f"{name} exports {exported}, which does not exist"


def test_the_top_level_holds_what_it_is_for() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a clone: git does not know the files")
    top = {line.split("/")[0] for line in listed.stdout.splitlines() if not line.startswith(".")}
    directories = {"statebackend", "operators", "tests", "notebooks"}
    assert top == directories | {"pyproject.toml", "README.md", "LICENSE", "Makefile", "BENCHMARKS.md", "CHANGELOG.md"}
