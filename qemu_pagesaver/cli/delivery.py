# SPDX-License-Identifier: LGPL-2.1-or-later
"""What ``restore``, ``recover``, ``status`` and ``finish`` have in common."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from qemu_pagesaver import errors
from qemu_pagesaver.cli.output import properties, size

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from qemu_pagesaver.cli.output import Output
    from qemu_pagesaver.delivery import RestoreResult


def add_delivery(parser: argparse.ArgumentParser, *, preempt: bool) -> None:
    """Add how pages are brought."""
    how = parser.add_argument_group("how memory is brought")
    how.add_argument(
        "--prefetch",
        choices=("none", "physical", "virtual"),
        default="virtual",
        help="what comes with a page that was touched: nothing, or its neighbours "
        "in physical or in the guest's virtual memory (default: %(default)s)",
    )
    how.add_argument(
        "--prefetch-window",
        type=int,
        default=64,
        metavar="PAGES",
        help="neighbours at most; how many is told from earlier faults "
        "(default: %(default)s)",
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
    how.add_argument(
        "--trace",
        metavar="FILE",
        help="write a record of every fault into a new file (TRACE.md)",
    )


def options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of :func:`add_delivery`."""
    return {
        "prefetch": args.prefetch,
        "prefetch_window": args.prefetch_window,
        "background": args.background,
        "place": args.place,
        "trace": args.trace,
    }


def finish(result: RestoreResult, out: Output) -> int:
    """Print the result and return the exit code."""
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


def rows(document: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield what people want to know of a result."""
    yield "guest", f"pid {document['pid']}, QMP {document['qmp']}"
    yield from document["sockets"].items()
    if document["time-to-running"] is not None:
        times = (
            f"{seconds(document['time-to-running'])} after QMP answered, "
            f"{seconds(document['time-from-start'])} in all"
        )
        yield "time to running", times
    yield "duration", seconds(document["duration"])
    yield from counts(document)
    yield "complete", "yes" if document["complete"] else f"no: {document['ended']}"


def counts(document: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield the counters."""
    sent = document["pages-sent"]
    latency = document["latency"]
    yield "faults", f"{document['faults']} ({document['faults-late']} late)"
    if latency["p50"] is not None:
        times = ", ".join(
            f"{name} {latency[name] * 1e6:.0f} us" for name in ("p50", "p99", "max")
        )
        yield "latency", times
    text = (
        f"{sent['requested']} requested, {sent['prefetched']} prefetched, "
        f"{sent['background']} in the background"
    )
    yield "pages sent", text
    if sent["prefetched"]:
        text = (
            f"{document['faults-saved']} pages of windows that proved right, "
            f"{document['pages-unused']} of others"
        )
        yield "prefetch", text
    yield "pages avoided", document["pages-avoided"]
    pages = document["pages"]
    yield "left", f"{size(pages['left'] * 4096)} of {size(pages['total'] * 4096)}"


def seconds(value: float | None) -> str:
    """Return a time as people read it."""
    if value is None:
        return "-"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.2f} s"
