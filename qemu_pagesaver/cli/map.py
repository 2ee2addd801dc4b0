# SPDX-License-Identifier: LGPL-2.1-or-later
"""``map``: what guest memory is made of, as a picture."""

from __future__ import annotations

import asyncio
import itertools
import sys
from typing import TYPE_CHECKING, Any

from qemu_pagesaver.cli.output import Output, printable, properties, size, table

if TYPE_CHECKING:
    import argparse

    from rich.console import RenderableType
    from rich.text import Text

    from qemu_pagesaver.memory_map import Region
    from qemu_pagesaver.snapshot import Snapshot

HELP = "show the classes of pages over guest memory"
DESCRIPTION = (
    "Draw guest memory: each character is a stretch of pages; its kind and colour "
    "say which class most of its pages with content have, its fullness how many of "
    "its pages have content at all. Main memory is drawn by guest-physical address "
    "where the machine's state tells it, everything else by RAM block."
)

_ROWS = 32
_LEAF = 512
_ALIKE = 4
# For each class: colour, and characters from nearly empty to full.
_UNICODE = {
    "fill": ("yellow", "▁▃▅█"),
    "data": ("blue", "░▒▓█"),
    "shared": ("green", "○◔◑●"),
}
_ASCII = {
    "fill": ("yellow", "'=fF"),
    "data": ("blue", ",:dD"),
    "shared": ("green", "-~sS"),
}
_ZERO = {True: "·", False: "."}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("file", metavar="FILE", help="a snapshot or stream file")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--block", metavar="NAME", help="only this RAM block, as `pc.ram`"
    )
    what.add_argument(
        "--spaces",
        action="store_true",
        help="the guest's address spaces, with the pages that they map",
    )
    what.add_argument(
        "--page",
        metavar="ADDRESS",
        type=address,
        help="one page by its guest-physical address: class, mappings, neighbours",
    )
    parser.add_argument(
        "--runs",
        action="store_true",
        help="with --json: every run of pages, not counts for each 2 MiB",
    )
    parser.add_argument(
        "--spool-dir",
        metavar="DIR",
        help="where a stream is unpacked (default: /var/tmp)",
    )


def address(text: str) -> int:
    """Return a number as people write addresses; argparse shows this name."""
    return int(text, 0)


def run(args: argparse.Namespace, out: Output) -> int:
    """Open, count, draw."""
    return asyncio.run(_run(args, out))


async def _run(args: argparse.Namespace, out: Output) -> int:
    from qemu_pagesaver import errors, memory_map  # noqa: PLC0415
    from qemu_pagesaver.convert import opened  # noqa: PLC0415

    async with opened(args.file, spool_dir=args.spool_dir, report=out) as snapshot:
        if args.spaces:
            _show_spaces(snapshot, out)
            return 0
        if args.page is not None:
            _show_page(snapshot, args.page, out)
            return 0
        regions = memory_map.regions(snapshot)
        if args.block is not None:
            regions = tuple(r for r in regions if r.block.name == args.block)
            if not regions:
                known = ", ".join(b.name for b in snapshot.image.ram_blocks)
                raise errors.UsageError(
                    f"{args.file} has no RAM block {args.block!r}",
                    hint=f"It has: {known}.",
                )
        if out.json:
            out.result(_document(snapshot, regions, runs=args.runs), "")
        else:
            out.result({}, _picture(snapshot, regions, out))
    return 0


def _document(
    snapshot: Snapshot, regions: tuple[Region, ...], *, runs: bool
) -> dict[str, Any]:
    from qemu_pagesaver import memory_map  # noqa: PLC0415

    listed: list[dict[str, Any]] = []
    for region in regions:
        item: dict[str, Any] = {
            "ram-block": region.block.name,
            "offset": region.first * 4096,
            "bytes": region.pages * 4096,
            "address": region.address,
        }
        if runs:
            item["runs"] = _runs(snapshot, region)
        else:
            item["leaves"] = memory_map.count_cells(
                snapshot.image, region, pages_per_cell=_LEAF
            )
        listed.append(item)
    return {
        "file": str(snapshot.path),
        "uuid": snapshot.uuid,
        "page-size": 4096,
        "classes": list(memory_map.CLASSES),
        "pages-per-leaf": _LEAF,
        "regions": listed,
    }


def _runs(snapshot: Snapshot, region: Region) -> list[list[int]]:
    """List [first page of the block, pages, index of the class]."""
    from qemu_pagesaver import memory_map  # noqa: PLC0415

    end = region.first + region.pages
    found: list[list[int]] = []
    for each in snapshot.image.runs(region.block.index):
        first = max(each.first, region.first)
        after = min(each.first + each.count, end)
        if first < after:
            found.append([first, after - first, memory_map.class_of(each)])
    return found


# ---------------------------------------------------------- address spaces


def _show_spaces(snapshot: Snapshot, out: Output) -> None:
    from rich.console import Group  # noqa: PLC0415

    from qemu_pagesaver import address_spaces, info  # noqa: PLC0415

    found = address_spaces.spaces(snapshot)
    locality = snapshot.meta.locality
    document = {
        "file": str(snapshot.path),
        "uuid": snapshot.uuid,
        "spaces": found,
        "locality": None if locality is None else dict(locality),
    }
    rows = [
        (
            space["index"],
            space["kind"],
            f"{space['root']:#x}",
            size(space["bytes"]),
            space["exclusive"],
            space["shared"],
            space["runs"],
        )
        for space in found
    ]
    columns = ("space", "kind", "root", "size", "exclusive", "shared", "runs")
    shown = table(columns, rows, right=(0, 2, 3, 4, 5, 6))
    where = printable(f"neighbours: {info.neighbours(snapshot)}")
    out.result(document, Group(where, shown))


def _show_page(snapshot: Snapshot, address: int, out: Output) -> None:
    from rich.console import Group  # noqa: PLC0415

    from qemu_pagesaver import address_spaces  # noqa: PLC0415

    found = address_spaces.page(snapshot, address)
    place = f"page {found['page']} of {printable(found['ram-block'])}"
    pairs: list[tuple[str, object]] = [("page", place), ("class", found["class"])]
    if found["canonical-page"] is not None:
        pairs.append(("canonical page", found["canonical-page"]))
    if found["note"]:
        pairs.append(("note", found["note"]))
    rows = [
        (
            mapping["space"],
            f"{mapping['address']:#x}",
            " ".join(str(page) for _, _, page in mapping["neighbours"]),
        )
        for mapping in found["mappings"]
    ]
    shown = table(("space", "mapped at", "neighbours"), rows, right=(0, 1))
    out.result(found, Group(properties(pairs), shown))


# ------------------------------------------------------------------ picture


def _picture(
    snapshot: Snapshot, regions: tuple[Region, ...], out: Output
) -> RenderableType:
    from rich.console import Group  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    label = 14
    width = max(16, min(out.console().width, 160) - label)
    largest = max(region.pages for region in regions)
    per_cell = 1
    while per_cell * width * _ROWS < largest:
        per_cell *= 2
    lines: list[Text] = []
    for region in regions:
        lines.append(Text(_title(region), style="bold"))
        lines += _rows(snapshot, region, per_cell, width, label, unicode=unicode)
    lines += [Text(""), *_legend(per_cell, unicode=unicode)]
    return Group(*lines)


def _title(region: Region) -> str:
    name = f"{printable(region.block.name)}, {size(region.pages * 4096)}"
    if region.address is not None:
        return f"{name}, at guest-physical {region.address:#x}"
    return name


def _rows(
    snapshot: Snapshot,
    region: Region,
    per_cell: int,
    width: int,
    label: int,
    *,
    unicode: bool,
) -> list[Text]:
    from rich.text import Text  # noqa: PLC0415

    from qemu_pagesaver import memory_map  # noqa: PLC0415

    cells = memory_map.count_cells(snapshot.image, region, pages_per_cell=per_cell)
    base = region.first * 4096 if region.address is None else region.address
    rows: list[Text] = []
    for first in range(0, len(cells), width):
        address = base + first * per_cell * 4096
        row = Text(f"{address:#{label - 1}x} ", style="dim")
        for cell in cells[first : first + width]:
            character, style = _cell(cell, unicode=unicode)
            row.append(character, style=style)
        rows.append(row)
    return _folded(rows, label)


def _folded(rows: list[Text], label: int) -> list[Text]:
    """Put a line of dots for three or more rows in a row that look alike."""
    from rich.text import Text  # noqa: PLC0415

    folded: list[Text] = []
    for _, group in itertools.groupby(rows, key=lambda row: row.plain[label:]):
        alike = list(group)
        if len(alike) > _ALIKE:
            between = f"{'..':>{label - 1}} ({len(alike) - 2} rows like this)"
            alike = [alike[0], Text(between, style="dim"), alike[-1]]
        folded += alike
    return folded


def _cell(counts: list[int], *, unicode: bool) -> tuple[str, str]:
    """Choose character and style: absent, zero, or the class of most content."""
    absent, zero, *content = counts
    filled = sum(content)
    if not filled:
        return (_ZERO[unicode], "dim") if zero else (" ", "")
    name = ("fill", "data", "shared")[content.index(max(content))]
    style, characters = (_UNICODE if unicode else _ASCII)[name]
    total = absent + zero + filled
    # The last character is for cells that are full.
    return characters[3 * filled // total], style


def _legend(per_cell: int, *, unicode: bool) -> list[Text]:
    from rich.text import Text  # noqa: PLC0415

    legend = Text()
    for name, (style, characters) in (_UNICODE if unicode else _ASCII).items():
        legend.append(characters, style=style)
        legend.append(f" {name}   ")
    legend.append(_ZERO[unicode], style="dim")
    legend.append(" zero   (blank) absent")
    return [
        legend,
        Text(f"One character: {per_cell} page(s), {size(per_cell * 4096)}."),
    ]
