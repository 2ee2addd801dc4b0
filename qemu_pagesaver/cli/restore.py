# SPDX-License-Identifier: LGPL-2.1-or-later
"""``restore``: a guest runs again before its memory is read."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from qemu_pagesaver import errors
from qemu_pagesaver.cli.output import properties, size

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from qemu_pagesaver.cli.output import Output
    from qemu_pagesaver.delivery import RestoreResult

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


def add_delivery(parser: argparse.ArgumentParser, *, preempt: bool) -> None:
    """Add how pages are brought; the same for ``recover``."""
    how = parser.add_argument_group("how memory is brought")
    how.add_argument(
        "--prefetch",
        choices=("none", "physical"),
        default="physical",
        help="what comes with a page that was touched: nothing, or its neighbours "
        "in the file (default: %(default)s)",
    )
    how.add_argument(
        "--prefetch-window",
        type=int,
        default=15,
        metavar="PAGES",
        help="neighbours at most (default: %(default)s)",
    )
    how.add_argument(
        "--background",
        metavar="off|RATE|max",
        default="max",
        help="loading of what nobody touched: bytes/s with K, M or G "
        "(default: %(default)s)",
    )
    if preempt:
        how.add_argument(
            "--preempt",
            choices=("auto", "on", "off"),
            default="auto",
            help="a second connection for what was touched (default: %(default)s)",
        )
    how.add_argument(
        "--place",
        choices=("auto", "off"),
        default="auto",
        help="put the threads of a fault on one CPU where that is measured to be "
        "faster (default: %(default)s)",
    )


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
    }
    how = delivery(args) | {"preempt": args.preempt}
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


def delivery(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of :func:`add_delivery`."""
    return {
        "prefetch": args.prefetch,
        "prefetch_window": args.prefetch_window,
        "background": args.background,
        "place": args.place,
    }


def finish(result: RestoreResult, out: Output) -> int:
    """Print the result and return the exit code; the same for ``recover``."""
    document = result.document()
    out.result(document, properties(rows(document)))
    if result.ended == "qemu-ended":
        how = (
            "" if result.qemu_status in (None, 0) else f" ({_how(result.qemu_status)})"
        )
        out.note(
            f"QEMU (pid {result.pid}) ended{how} before all of the guest was loaded"
        )
        if result.qemu_status:
            return errors.QemuDied.exit_code
    if result.ended == "let-go":
        out.note(
            f"the guest (pid {result.pid}) waits at the next page that it misses: "
            f"`recover {result.snapshot} --attach {result.qmp}` goes on"
        )
    return errors.Interrupted.exit_code if result.interrupted else 0


def _how(status: int) -> str:
    return f"killed by signal {-status}" if status < 0 else f"status {status}"


def _running(document: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    yield (
        "guest runs" if not document["paused"] else "guest stands",
        (f"pid {document['pid']}, QMP {document['qmp']}"),
    )
    yield "time to running", _seconds(document["time-to-running"])
    yield "pager", f"pid {document['pager-pid']}"
    for before, now in document["sockets"].items():
        yield before, now


def rows(document: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield what people want to know of a result."""
    yield "guest", f"pid {document['pid']}, QMP {document['qmp']}"
    for before, now in document["sockets"].items():
        yield before, now
    if document["time-to-running"] is not None:
        yield (
            "time to running",
            f"{_seconds(document['time-to-running'])} after QMP answered, "
            f"{_seconds(document['time-from-start'])} in all",
        )
    yield "duration", _seconds(document["duration"])
    yield from counts(document)
    yield "complete", "yes" if document["complete"] else f"no: {document['ended']}"


def counts(document: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield the counters; the same for ``status``."""
    sent = document["pages-sent"]
    latency = document["latency"]
    yield "faults", f"{document['faults']} ({document['faults-late']} late)"
    if latency["p50"] is not None:
        times = ", ".join(
            f"{name} {latency[name] * 1e6:.0f} us" for name in ("p50", "p99", "max")
        )
        yield "latency", times
    yield (
        "pages sent",
        f"{sent['requested']} requested, {sent['prefetched']} prefetched, "
        f"{sent['background']} in the background",
    )
    yield "pages avoided", document["pages-avoided"]
    pages = document["pages"]
    yield "left", f"{size(pages['left'] * 4096)} of {size(pages['total'] * 4096)}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"
