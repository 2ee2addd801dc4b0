# SPDX-License-Identifier: LGPL-2.1-or-later
"""``restore``: a guest runs again before its memory is read."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from qemu_pagesaver import errors
from qemu_pagesaver.cli.delivery import add_delivery, finish, options, seconds
from qemu_pagesaver.cli.output import properties

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from qemu_pagesaver.cli.output import Output

HELP = "run a saved guest; its memory comes when it is touched"
DESCRIPTION = (
    "Start QEMU as it was saved, or with the command line after `--`, or take one that "
    "waits with -incoming defer (--attach); the guest runs at once. The command stays "
    "until all of its memory is loaded or QEMU ends. Ctrl-C loads the rest at full "
    "speed and ends; a second one lets go of the guest, which then waits for `recover`."
)
TAKES_COMMAND = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("file", metavar="FILE", help="the snapshot")
    which = parser.add_argument_group("which QEMU")
    which.add_argument(
        "--attach",
        metavar="SOCKET",
        help="QMP socket of a QEMU that was started with -incoming defer",
    )
    which.add_argument(
        "--qmp", metavar="SOCKET", help="where QEMU's QMP socket is to be"
    )
    which.add_argument(
        "--qemu", metavar="BINARY", help="the QEMU to start (default: from PATH)"
    )
    which.add_argument(
        "--trust",
        action="store_true",
        help="the recorded command line may run code and open further files",
    )
    which.add_argument(
        "--disk-dir",
        metavar="DIR",
        help="where overlays over frozen disks go (default: beside FILE)",
    )
    which.add_argument(
        "--socket-dir",
        metavar="DIR",
        help="where QEMU listens for its memory; its user must be able to write there",
    )
    which.add_argument(
        "--paused",
        action="store_true",
        help="the guest stands still (`cont` starts it)",
    )
    which.add_argument(
        "--hostfwd",
        metavar="RULE",
        action="append",
        help="forward this port, as -netdev user does (tcp::2222-:22), instead of "
        "the recorded ones; repeat for more",
    )
    which.add_argument(
        "--detach",
        action="store_true",
        help="return when the guest runs; a pager stays and ends by itself",
    )
    which.add_argument(
        "--status-file",
        metavar="FILE",
        help="with --detach: where the result goes at the end, as JSON",
    )
    add_delivery(parser, preempt=True)


def run(args: argparse.Namespace, out: Output) -> int:
    """Restore, and print what was done."""
    from qemu_pagesaver.delivery import Delivery  # noqa: PLC0415 - --help needs no C
    from qemu_pagesaver.restore import (  # noqa: PLC0415
        Target,
        restore,
        restore_detached,
    )

    if args.status_file and not args.detach:
        raise errors.UsageError("--status-file goes with --detach")
    target: dict[str, Any] = {
        "attach": args.attach,
        "qmp": args.qmp,
        "qemu": args.qemu,
        "args": None if args.command is None else tuple(args.command),
        "paused": args.paused,
        "trust": args.trust,
        "disk_dir": args.disk_dir,
        "socket_dir": args.socket_dir,
        "hostfwd": None if args.hostfwd is None else tuple(args.hostfwd),
    }
    how = options(args) | {"preempt": args.preempt}
    if args.detach:
        detached = restore_detached(
            args.file,
            Target(**target),
            Delivery(**how),
            status_file=args.status_file,
            report=out,
        )
        out.result(detached.document(), properties(_running(detached.document())))
        return 0
    return finish(restore(args.file, **target, **how, report=out), out)


def _running(document: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    yield (
        "guest runs" if not document["paused"] else "guest stands",
        (f"pid {document['pid']}, QMP {document['qmp']}"),
    )
    yield "time to running", seconds(document["time-to-running"])
    yield "pager", f"pid {document['pager-pid']}"
    yield from document["sockets"].items()
