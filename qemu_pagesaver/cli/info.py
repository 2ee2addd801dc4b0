# SPDX-License-Identifier: LGPL-2.1-or-later
"""``info``: what a snapshot or a stream holds."""

from __future__ import annotations

import asyncio
import shlex
from typing import TYPE_CHECKING, Any

from qemu_pagesaver import errors
from qemu_pagesaver.cli.output import Output, printable, properties, size, table

if TYPE_CHECKING:
    import argparse

    from rich.console import RenderableType

    from qemu_pagesaver.devices import Device
    from qemu_pagesaver.snapshot import Snapshot

HELP = "show what a snapshot or a stream holds"
DESCRIPTION = (
    "Show machine, memory, devices and disks of a snapshot (or of a QEMU stream, "
    "which is unpacked first). Nothing in it is executed."
)
_TEXT_BYTES = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("file", metavar="FILE", help="a snapshot or stream file")
    more = parser.add_mutually_exclusive_group()
    more.add_argument(
        "--device",
        metavar="NAME[:INSTANCE]",
        help="show every field of a device section, as `cpu` or `cpu:1`",
    )
    more.add_argument(
        "--command-line",
        action="store_true",
        help="show QEMU's recorded command line only",
    )
    parser.add_argument(
        "--spool-dir",
        metavar="DIR",
        help="where a stream is unpacked (default: /var/tmp)",
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Open and print."""
    return asyncio.run(_run(args, out))


async def _run(args: argparse.Namespace, out: Output) -> int:
    from qemu_pagesaver.convert import opened  # noqa: PLC0415

    async with opened(args.file, spool_dir=args.spool_dir, report=out) as snapshot:
        if args.device is not None:
            _show_device(_choose(snapshot, args.device), out)
        elif args.command_line:
            _show_command_line(snapshot, out)
        else:
            _show(snapshot, out)
    return 0


def _choose(snapshot: Snapshot, wanted: str) -> Device:
    from qemu_pagesaver import devices  # noqa: PLC0415

    name, instance = wanted, None
    # PCI addresses have colons, too.
    head, _, tail = wanted.rpartition(":")
    for candidate, number in ((wanted, None), (head, tail)):
        if number is not None and not number.isdecimal():
            continue
        name, instance = candidate, None if number is None else int(number)
        try:
            return devices.find(snapshot.devices, name, instance)
        except KeyError:
            continue
    known = sorted({device.name for device in snapshot.devices})
    raise errors.UsageError(
        f"{snapshot.path} has no device section {wanted!r}, or several",
        hint=f"It has: {', '.join(known)}.",
    )


def _show_device(device: Device, out: Output) -> None:
    from qemu_pagesaver.compare import plain  # noqa: PLC0415

    listed = list(device.fields())
    document = {
        "name": device.name,
        "instance": device.instance,
        "version": device.version,
        "bytes": len(device.data),
        "exact": device.exact,
        "fields": [
            {
                "name": each.name,
                "type": each.type,
                "offset": each.offset - device.offset,
                "size": each.size,
                "value": each.value.hex()
                if isinstance(each.value, bytes)
                else plain(each.value),
            }
            for each in listed
        ],
    }
    if out.json:
        out.result(document, "")
        return
    from rich.console import Group  # noqa: PLC0415

    title = f"{device.name}:{device.instance}, version {device.version}, "
    parts: list[RenderableType] = [printable(title + f"{len(device.data)} bytes")]
    rows = [
        (each.offset - device.offset, each.name, each.type, _shown(each.value))
        for each in listed
    ]
    parts.append(table(("offset", "field", "type", "value"), rows, right=(0,)))
    if not device.exact:
        parts.append("The description does not fit; what follows is not shown.")
    out.result(document, Group(*parts))


def _shown(value: object) -> str:
    from qemu_pagesaver.compare import plain  # noqa: PLC0415

    if isinstance(value, bytes) and len(value) > _TEXT_BYTES:
        if not any(value):
            return f"0 ({len(value)} bytes)"
        return f"{value[:_TEXT_BYTES].hex()}.. ({len(value)} bytes)"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 9:
        return f"{value} ({value:#x})"
    return "NULL" if value is None else str(plain(value))


def _show_command_line(snapshot: Snapshot, out: Output) -> None:
    recorded = snapshot.meta.command_line
    if recorded is None:
        out.note(f"{snapshot.path}: no command line is recorded.")
    words = None if recorded is None else list(recorded)
    text = shlex.join(recorded) if recorded else ""
    out.result({"command-line": words, "qemu-binary": snapshot.meta.qemu_binary}, text)


def _show(snapshot: Snapshot, out: Output) -> None:
    from qemu_pagesaver.info import describe  # noqa: PLC0415

    document = describe(snapshot)
    if snapshot.meta.command_line is not None:
        document["command-line"] = list(snapshot.meta.command_line)
    if out.json:
        out.result(document, "")
        return
    from rich.console import Group  # noqa: PLC0415

    parts: list[RenderableType] = [properties(_properties(document)), ""]
    parts.append(_blocks(document["ram-blocks"]))
    if document["disks"]:
        parts += ["", _disks(document["disks"])]
    if document["devices"] is not None:
        names = sorted({device["name"] for device in document["devices"]})
        parts += ["", f"devices: {printable(', '.join(names))}"]
    out.result(document, Group(*parts))


def _properties(document: dict[str, Any]) -> list[tuple[str, object]]:
    pages = ", ".join(f"{count} {name}" for name, count in document["pages"].items())
    shown = (
        "file", "format-version", "uuid", "parent", "created", "creator", "machine",
        "qemu-version", "architecture", "run-state", "compression",
    )  # fmt: skip
    pairs: list[tuple[str, object]] = [
        (name, document[name]) for name in shown if document[name] is not None
    ]
    pairs.append(("memory", size(document["ram-bytes"])))
    pairs.append(("pages", pages))
    index = size(document["index-bytes"])
    pairs.append(("size", f"{size(document['bytes'])}, of it {index} index"))
    if document["capabilities"]:
        pairs.append(("capabilities", ", ".join(document["capabilities"])))
    if document["hotplugged"]:
        pairs.append(("hotplugged", len(document["hotplugged"])))
    pairs.append(("neighbours", document["neighbours"]))
    if document["pause"] is not None:
        pairs.append(("pause", f"{document['pause']:.3f} s"))
    return pairs


def _blocks(blocks: list[dict[str, Any]]) -> RenderableType:
    rows = [
        (
            block["name"],
            size(block["bytes"]),
            "" if block["page-size"] is None else size(block["page-size"]),
            *(block["pages"][name] for name in ("zero", "fill", "stored", "absent")),
        )
        for block in blocks
    ]
    columns = ("RAM block", "size", "host page", "zero", "fill", "stored", "absent")
    return table(columns, rows, right=(1, 2, 3, 4, 5, 6))


def _disks(disks: list[dict[str, Any]]) -> RenderableType:
    keys = ("node", "filename", "format", "read-only", "mode", "size")
    rows = [[disk.get(key, "") for key in keys] for disk in disks]
    return table(keys, rows)
