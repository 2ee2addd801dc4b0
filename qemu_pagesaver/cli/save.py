# SPDX-License-Identifier: LGPL-2.1-or-later
"""``save``: a running guest becomes a snapshot file."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from qemu_pagesaver.cli.output import properties, size

if TYPE_CHECKING:
    from qemu_pagesaver.cli.output import Output
    from qemu_pagesaver.save import SaveResult

HELP = "save a running guest into a snapshot file"
DESCRIPTION = (
    "Save the guest behind a QMP socket into a new file. The guest goes on as it "
    "was, running or paused; with --quit QEMU ends when the file is whole."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument(
        "--qmp", metavar="SOCKET", required=True, help="unix socket of QEMU's -qmp"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        required=True,
        help="the file to make; it must not exist",
    )
    parser.add_argument(
        "--quit", action="store_true", help="end QEMU when the file is whole"
    )
    parser.add_argument(
        "--disks",
        choices=("overlay", "check", "none"),
        help="writable disks: the guest goes on writing to overlays; or a restore "
        "refuses disks that have changed (default with --quit and for guests "
        "without writable disks); or you take care of them",
    )
    parser.add_argument(
        "--compression",
        metavar="none|zstd[:LEVEL]",
        default="zstd:3",
        help="of the memory in the file (default: %(default)s)",
    )
    parser.add_argument(
        "--spool-dir",
        metavar="DIR",
        help="where memory waits to be put in order (default: beside FILE)",
    )
    parser.add_argument(
        "--pid",
        type=_pid,
        metavar="PID",
        help="QEMU's process, where a manager has opened the QMP socket",
    )


def _pid(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is no process id")
    return value


def run(args: argparse.Namespace, out: Output) -> int:
    """Save, and print what was done."""
    from qemu_pagesaver.save import save  # noqa: PLC0415 - --help needs no C core

    result = save(
        args.qmp,
        args.output,
        quit=args.quit,
        disks=args.disks,
        compression=args.compression,
        spool_dir=args.spool_dir,
        pid=args.pid,
        report=out,
    )
    out.result(result.document(), properties(_rows(result)))
    return 0


def _rows(result: SaveResult) -> list[tuple[str, object]]:
    pages = result.pages
    counts = (
        f"{pages.zero} zero, {pages.fill} fill, {pages.data} data, "
        f"{pages.shared} shared"
    )
    return [
        ("snapshot", result.snapshot),
        ("size", size(result.bytes)),
        ("pages", counts),
        ("guest paused for", f"{result.downtime:.3f} s"),
        ("duration", f"{result.duration:.1f} s"),
        ("uuid", result.uuid),
    ]
