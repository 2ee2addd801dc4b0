# SPDX-License-Identifier: LGPL-2.1-or-later
"""`ci/run bench [SCENARIO...]`: run, print tables, keep everything in build/bench.

scenarios:
  touch     first touches as the guest sees them, against the floor
  pause     the pause of a save, against QEMU sending to nobody
  redis     all ways of restoring one guest; file sizes; loading everything
  use       the same over the memory that is in use
  scale     time to running over the size of RAM
  locality  workloads in a guest with aged memory, for each kind of prefetch, also on
            storage with 1 ms and 200 MB/s (root and /dev/fuse; 3 pairs at most)
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from . import locality, scenarios
from .figures import Table, write

IN_USE = (100, 400, 780, 1500)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="ci/run bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenario", nargs="*", help="default: all")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--cold", action="store_true", help="dropped caches as well")
    parser.add_argument(
        "--window",
        type=int,
        default=locality.WINDOW,
        help="locality: pages that a fault may bring, for each kind of prefetch",
    )
    parser.add_argument("--directory", default="/var/tmp", help="for snapshots")
    parser.add_argument("--output", type=Path, default=Path("build/bench"))
    args = parser.parse_args()
    pairs: int = args.pairs
    known: dict[str, Callable[[Path], list[Table]]] = {
        "touch": lambda d: [scenarios.first_touches(d, pairs)],
        "pause": lambda d: [scenarios.save_pause(d, 2048, 780, pairs)],
        "redis": lambda d: scenarios.restore_table(d, 2048, 780, pairs, cold=args.cold),
        "use": lambda d: [
            table
            for in_use in IN_USE
            for table in _in(
                d,
                lambda place, n=in_use: scenarios.restore_table(  # type: ignore[misc]
                    place, 2048, n, pairs, cold=args.cold
                ),
            )
        ],
        "scale": lambda d: [scenarios.scale_table(d, pairs)],
        "locality": lambda d: locality.tables(d, pairs, args.window),
    }
    chosen = args.scenario or list(known)
    if unknown := set(chosen) - set(known):
        parser.error(f"no scenario {', '.join(unknown)}; there are {', '.join(known)}")
    tables: list[Table] = []
    output = args.output / time.strftime("%Y%m%d-%H%M%S")
    for name in chosen:
        print(f"== {name}", flush=True)
        found = _in(Path(args.directory), known[name])
        for table in found:
            print("\n" + table.markdown(), flush=True)
        tables += found
        write(tables, output)
    print(f"kept in {output}")


def _in(parent: Path, run: Callable[[Path], list[Table]]) -> list[Table]:
    """Run with a directory that is gone afterwards."""
    place = Path(tempfile.mkdtemp(prefix="psbench-", dir=parent))
    try:
        return run(place)
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
