"""``python -m tests.benchmarks [NAME]``: run benchmarks, print the figures and write them to build/bench."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.benchmarks import nexmark, store, window
from tests.benchmarks.machine import describe_machine

BENCHMARKS: dict[str, Callable[..., dict[str, Any]]] = {
    "window": lambda *, seconds, repeats, **_: window.run(seconds=seconds, repeats=repeats),
    "window-parquet": lambda *, seconds, repeats, **_: window.run(sink="parquet", seconds=seconds, repeats=repeats),
    "store": store.run,
    "nexmark": nexmark.run,
}
PICTURES: dict[str, Callable[[dict[str, Any], Path], None]] = {"nexmark": nexmark.draw}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which (default: all): {', '.join(BENCHMARKS)}")
    parser.add_argument("--seconds", type=float, default=12.0, help="steady state of each run (default 12)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind (default 3)")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the store's tables (default 1,000,000)")
    parser.add_argument("--large", type=int, default=10_000_000, help="of its large tables (default 10,000,000)")
    parser.add_argument("--events", type=int, default=6_000_000, help="of Nexmark (default 6,000,000)")
    parser.add_argument("--queries", nargs="*", default=(), metavar="Q", help="of Nexmark (default: all)")
    parser.add_argument("--checkpoint-s", type=float, default=1.0, help="between checkpoints of Nexmark (default 1)")
    args = parser.parse_args()
    if unknown := [n for n in args.names if n not in BENCHMARKS]:
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    console = Console(highlight=False)
    machine = describe_machine()
    console.print("  ".join(f"{k} {v}" for k, v in machine.items()))
    out = Path("build/bench")
    out.mkdir(parents=True, exist_ok=True)
    for name in args.names or BENCHMARKS:
        figures = BENCHMARKS[name](**{k: v for k, v in vars(args).items() if k != "names"})
        console.print(f"[bold]{name}[/]")
        for key, value in figures.items():
            console.print(f"  {key:<72} {_show(value)}" if isinstance(value, dict) else f"  {key:<40} {_show(value)}")
        report = {"benchmark": name, "at": datetime.now(UTC).isoformat(), "machine": machine, "figures": figures}
        (out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
        if name in PICTURES:
            PICTURES[name](figures, out / f"{name}.png")
    return 0


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{k} {_show(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(_show(v) for v in value)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


raise SystemExit(main())
