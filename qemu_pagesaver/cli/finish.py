# SPDX-License-Identifier: LGPL-2.1-or-later
"""``finish``: load the rest of a guest now."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qemu_pagesaver.cli.delivery import rows
from qemu_pagesaver.cli.output import properties

if TYPE_CHECKING:
    from qemu_pagesaver.cli.output import Output

HELP = "load the rest of a guest at full speed"
DESCRIPTION = (
    "Tell the pager of a guest to load everything now, and wait until it has ended."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument(
        "guest",
        nargs="?",
        metavar="GUEST",
        help="pid of its QEMU, its name, or its snapshot (default: the only one)",
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Finish it, and print the restore's result."""
    from qemu_pagesaver import control  # noqa: PLC0415 - --help needs no asyncio

    document = control.finish(args.guest, out)
    out.result(document, properties(rows(document)))
    return 0
