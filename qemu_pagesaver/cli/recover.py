# SPDX-License-Identifier: LGPL-2.1-or-later
"""``recover``: a new pager for a guest that has lost its own."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qemu_pagesaver.cli.delivery import add_delivery, finish, options

if TYPE_CHECKING:
    from qemu_pagesaver.cli.output import Output

HELP = "go on with a guest whose pager is gone"
DESCRIPTION = (
    "Take over a restored guest whose pager was killed, or found a damaged block: ask "
    "QEMU which pages it has, and bring the others."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument(
        "file", metavar="FILE", help="the snapshot that it was restored from"
    )
    parser.add_argument(
        "--attach", metavar="SOCKET", required=True, help="QMP socket of the guest"
    )
    parser.add_argument(
        "--from",
        dest="source",
        metavar="COPY",
        help="another copy of FILE to read from, where FILE is damaged",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="nothing is known about the guest, and it was restored from FILE",
    )
    parser.add_argument(
        "--socket-dir",
        metavar="DIR",
        help="where QEMU listens for its memory; its user must be able to write there",
    )
    add_delivery(parser, preempt=False)


def run(args: argparse.Namespace, out: Output) -> int:
    """Recover, and print what was done."""
    from qemu_pagesaver.recover import recover  # noqa: PLC0415 - --help needs no C

    result = recover(
        args.file,
        attach=args.attach,
        source=args.source,
        force=args.force,
        socket_dir=args.socket_dir,
        report=out,
        **options(args),
    )
    return finish(result, out)
