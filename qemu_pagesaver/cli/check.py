# SPDX-License-Identifier: LGPL-2.1-or-later
"""``check``: every checksum, reference and bound of a snapshot."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from qemu_pagesaver.cli.output import Output
    from qemu_pagesaver.native import Problem

HELP = "check a snapshot for damage"
DESCRIPTION = (
    "Read the whole file and check every checksum, reference and bound, and that "
    "the device state can be taken apart. Exit code 1: it is damaged."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("file", metavar="FILE", help="a snapshot")


def run(args: argparse.Namespace, out: Output) -> int:
    """Check, print, answer."""
    from qemu_pagesaver.check import check_async  # noqa: PLC0415

    checked = asyncio.run(check_async(args.file, report=out))
    document = {
        "ok": checked.ok,
        "file": args.file,
        "count": checked.count,
        "errors": [
            {"message": problem.message, "offset": problem.offset}
            for problem in checked.problems
        ],
    }
    if checked.ok:
        text = f"{args.file}: no errors."
    else:
        lines = [_line(problem) for problem in checked.problems]
        if checked.count > len(lines):
            lines.append(f".. and {checked.count - len(lines)} more")
        count = f"{checked.count} error{'s' if checked.count > 1 else ''}"
        text = "\n".join([*lines, f"{args.file}: {count}."])
    out.result(document, text)
    return 0 if checked.ok else 1


def _line(problem: Problem) -> str:
    if problem.offset is None:
        return problem.message
    return f"at offset {problem.offset}: {problem.message}"
