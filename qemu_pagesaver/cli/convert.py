# SPDX-License-Identifier: LGPL-2.1-or-later
"""``convert``: QEMU's stream files to snapshots and back."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import TYPE_CHECKING

from qemu_pagesaver.cli.output import Output, size

if TYPE_CHECKING:
    import argparse

    from qemu_pagesaver.convert import Pages

HELP = "convert a QEMU stream file to a snapshot, or back"
DESCRIPTION = (
    "Convert a QEMU migration stream to a snapshot, or a snapshot to a stream that "
    "stock QEMU takes with `-incoming file:` (or `-incoming 'exec:cat FILE'`). "
    "What IN is, its first bytes say. OUT must not exist."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("source", metavar="IN", help="a file, or - for a stream")
    parser.add_argument("target", metavar="OUT", help="the new file")
    parser.add_argument(
        "--to",
        choices=("psnap", "stream"),
        help="the format of OUT (default: the one that IN does not have)",
    )
    parser.add_argument(
        "--compression",
        default="zstd:3",
        metavar="C",
        help="of a snapshot: none, zstd or zstd:LEVEL (default: zstd:3)",
    )
    parser.add_argument(
        "--spool-dir",
        metavar="DIR",
        help="where pages are kept meanwhile (default: the directory of OUT)",
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Convert, say what was made."""
    from qemu_pagesaver.convert import convert_async  # noqa: PLC0415

    made = asyncio.run(
        convert_async(
            args.source,
            args.target,
            to=args.to,
            compression=args.compression,
            spool_dir=args.spool_dir,
            report=out,
        )
    )
    document = {
        "input": made.source,
        "output": made.target,
        "format": made.format,
        "bytes": made.bytes,
        "pages": asdict(made.pages),
        "machine": made.machine,
        "run-state": made.run_state,
        "duration": made.duration,
    }
    guest = f"The guest was {made.run_state}, and will be when it is restored."
    if made.run_state is None:
        guest = "Whether the guest was running is not known."
    what = "snapshot" if made.format == "psnap" else "stream"
    out.result(
        document,
        f"{made.target}: {what} of {size(made.bytes)}, "
        f"{made.duration:.1f} s; {_pages(made.pages)}.\n{guest}",
    )
    return 0


def _pages(pages: Pages) -> str:
    counts = asdict(pages).items()
    return "pages: " + ", ".join(f"{count} {name}" for name, count in counts)
