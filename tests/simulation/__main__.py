"""``python -m tests.simulation --seeds N [--seed S]``: run many schedules, or replay one with its trace."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter

from tests.simulation.simulate import Result, simulate


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many schedules (default 1000)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (default 0)")
    parser.add_argument("--seed", type=int, help="replay this one and print everything that happens")
    options = parser.parse_args()
    logging.disable()  # failures are what this is about
    if options.seed is not None:
        result = simulate(options.seed)
        print("\n".join(result.trace))
        return _verdict([result])
    began, counts, failed = time.monotonic(), Counter[str](), []
    for seed in range(options.first, options.first + options.seeds):
        result = simulate(seed)
        counts.update(result.counts)
        if result.problem is not None:
            failed.append(result)
            print(f"seed {seed}: {result.problem}", flush=True)
    print(f"{options.seeds} schedules in {time.monotonic() - began:.1f} s: {dict(counts)}")
    return _verdict(failed)


def _verdict(results: list[Result]) -> int:
    failed = [r for r in results if r.problem is not None]
    for result in failed[:10]:
        print(f"seed {result.seed}: {result.problem}\n  replay: python -m tests.simulation --seed {result.seed}")
    print("every property held" if not failed else f"{len(failed)} schedules violate a property")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
