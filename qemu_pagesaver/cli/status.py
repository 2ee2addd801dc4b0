# SPDX-License-Identifier: LGPL-2.1-or-later
"""``status``: the guests that are still being loaded."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from qemu_pagesaver import errors
from qemu_pagesaver.cli.delivery import counts
from qemu_pagesaver.cli.output import properties, size, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from qemu_pagesaver.cli.output import Output

HELP = "show guests that are still being loaded"
DESCRIPTION = (
    "List the guests whose memory is still being loaded, or show one of them. `lost` "
    "is a guest whose pager has gone: `recover` brings it on."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument(
        "guest",
        nargs="?",
        metavar="GUEST",
        help="pid of its QEMU, its name, or its snapshot",
    )
    parser.add_argument(
        "--set-background",
        metavar="off|RATE|max",
        help="change how fast the pager of GUEST loads what nobody touched",
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Print a table, or what is known about one guest."""
    from qemu_pagesaver import control  # noqa: PLC0415 - --help needs no asyncio

    if args.set_background is not None:
        from qemu_pagesaver.delivery import parse_rate  # noqa: PLC0415

        if args.guest is None:
            raise errors.UsageError("--set-background goes with a GUEST")
        control.set_background(args.guest, parse_rate(args.set_background))
    guests = control.status(args.guest)
    if args.guest is not None:
        out.result(guests[0], properties(_rows(guests[0])))
        return 0
    document = {"guests": guests}
    if not guests:
        out.result(document, "no guest is being loaded")
        return 0
    columns = ("GUEST", "PID", "PAGER", "STATE", "LEFT", "FAULTS", "SNAPSHOT")
    out.result(document, table(columns, map(_line, guests), right=(1, 2, 4, 5)))
    return 0


def _line(guest: Mapping[str, Any]) -> tuple[object, ...]:
    pages = guest.get("pages")
    return (
        guest["guest"],
        guest["pid"],
        guest["pager-pid"] or "-",
        guest["state"],
        size(pages["left"] * 4096) if pages else "-",
        guest.get("faults", "-"),
        guest["snapshot"],
    )


def _rows(guest: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    yield "guest", guest["guest"]
    yield "pid", guest["pid"]
    yield "pager", guest["pager-pid"] or "gone"
    yield "state", guest["state"]
    yield "snapshot", guest["snapshot"]
    yield "QMP", guest["qmp"]
    if "pages" in guest:
        yield from counts(guest)
