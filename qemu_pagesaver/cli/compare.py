# SPDX-License-Identifier: LGPL-2.1-or-later
"""``compare``: two snapshots or streams, page by page and device by device."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from qemu_pagesaver.cli.output import Output
    from qemu_pagesaver.compare import Difference

HELP = "compare two snapshots or streams"
DESCRIPTION = (
    "Compare memory page by page and device state field by field. Exit code 1: "
    "they differ. A guest that ran in between differs at least in its clocks."
)
_LINES_AT_MOST = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("a", metavar="A", help="a snapshot or stream file")
    parser.add_argument("b", metavar="B", help="another one")
    parser.add_argument(
        "--ignore-devices",
        action="store_true",
        help="compare memory only",
    )
    parser.add_argument(
        "--spool-dir",
        metavar="DIR",
        help="where a stream is unpacked (default: /var/tmp)",
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Compare, print, answer."""
    from qemu_pagesaver.compare import compare_async  # noqa: PLC0415

    found = asyncio.run(
        compare_async(
            args.a,
            args.b,
            devices=not args.ignore_devices,
            spool_dir=args.spool_dir,
            report=out,
        )
    )
    document = {
        "equal": found.equal,
        "pages-compared": found.pages_compared,
        "pages-different": found.pages,
        "differences": [_document(each) for each in found.differences],
    }
    lines = [_line(each) for each in found.differences[:_LINES_AT_MOST]]
    if len(found.differences) > len(lines):
        lines.append(f".. and {len(found.differences) - len(lines)} more (--json)")
    if found.equal:
        lines.append(f"Equal: {found.pages_compared} pages.")
    else:
        lines.append(f"Different: {found.pages} of {found.pages_compared} pages.")
    out.result(document, "\n".join(lines))
    return 0 if found.equal else 1


def _document(difference: Difference) -> dict[str, object]:
    optional = {"first", "count", "field"}
    return {
        key: value
        for key, value in asdict(difference).items()
        if key not in optional or value not in (None, "")
    }


def _line(difference: Difference) -> str:
    where, a, b = difference.where, _shown(difference.a), _shown(difference.b)
    if difference.kind == "pages":
        first, count = difference.first or 0, difference.count or 0
        pages = f"page {first}" if count == 1 else f"pages {first}-{first + count - 1}"
        return f"{where}: {pages} (offset {first * 4096:#x})"
    if difference.kind == "ram-block":
        return f"RAM block {where}: bytes: {a} | {b}"
    if difference.kind == "field":
        return f"device {where}: {difference.field}: {a} | {b}"
    if difference.kind == "device" and difference.first is not None:
        return f"device {where}: from byte {difference.first} on ({a} | {b} bytes)"
    if difference.kind == "device":
        return f"device {where}: {difference.field or 'bytes'}: {a} | {b}"
    return f"{where}: {a} | {b}"


def _shown(value: object) -> str:
    return "absent" if value is None else str(value)
