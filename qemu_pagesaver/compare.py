# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two snapshots or streams, page by page and device by device."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from qemu_pagesaver import errors
from qemu_pagesaver.convert import StrPath, opened
from qemu_pagesaver.native import Job
from qemu_pagesaver.report import Report, Silent
from qemu_pagesaver.work import in_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from qemu_pagesaver.devices import Device
    from qemu_pagesaver.native import RamBlock
    from qemu_pagesaver.snapshot import Snapshot

Kind: TypeAlias = Literal["machine", "ram-block", "pages", "device", "field"]

# Differences beyond these are counted only.
_RUNS_AT_MOST = 1000
_FIELDS_AT_MOST = 1000
_VALUE_BYTES = 64


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One thing that differs.

    ``where`` names the RAM block or the device ("cpu:0"); a run of pages has
    ``first`` and ``count``, a field its name. ``a`` and ``b`` are the two
    values; None where one side has nothing.
    """

    kind: Kind
    where: str
    field: str = ""
    first: int | None = None
    count: int | None = None
    a: object = None
    b: object = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What differs; ``pages`` is how many pages do, listed or not."""

    equal: bool
    pages: int
    pages_compared: int
    differences: tuple[Difference, ...]


def compare(
    a: StrPath,
    b: StrPath,
    *,
    devices: bool = True,
    spool_dir: StrPath | None = None,
    report: Report | None = None,
) -> Comparison:
    """Compare two files; see :func:`compare_async`."""
    return asyncio.run(
        compare_async(a, b, devices=devices, spool_dir=spool_dir, report=report)
    )


async def compare_async(
    a: StrPath,
    b: StrPath,
    *,
    devices: bool = True,
    spool_dir: StrPath | None = None,
    report: Report | None = None,
) -> Comparison:
    """Compare two snapshots or streams.

    RAM blocks are matched by name, device sections by name and instance; their
    order does not matter.

    Args:
        a, b: The files.
        devices: Compare device sections and machine types, too.
        spool_dir: Where a stream is unpacked; None: /var/tmp.
        report: Gets progress.
    """
    report = report or Silent()
    async with (
        opened(a, spool_dir=spool_dir, report=report) as left,
        opened(b, spool_dir=spool_dir, report=report) as right,
    ):
        found: list[Difference] = []
        if devices:
            found += _machines(left, right)
        pages, compared = await _memory(left, right, found, report)
        if devices:
            found += _devices(left, right)
    return Comparison(
        equal=not found,
        pages=pages,
        pages_compared=compared,
        differences=tuple(found),
    )


def _machines(left: Snapshot, right: Snapshot) -> Iterator[Difference]:
    if left.machine != right.machine:
        yield Difference(
            kind="machine", where="machine", a=left.machine, b=right.machine
        )


async def _memory(
    left: Snapshot, right: Snapshot, found: list[Difference], report: Report
) -> tuple[int, int]:
    """Add what differs in memory; returns pages that differ, pages compared."""
    blocks = {block.name: block for block in left.image.ram_blocks}
    others = {block.name: block for block in right.image.ram_blocks}
    both: list[tuple[RamBlock, RamBlock]] = []
    for name in (*blocks, *(name for name in others if name not in blocks)):
        a, b = blocks.get(name), others.get(name)
        if a is not None and b is not None and a.length == b.length:
            both.append((a, b))
        else:
            found.append(
                Difference(
                    kind="ram-block",
                    where=name,
                    a=None if a is None else a.length,
                    b=None if b is None else b.length,
                )
            )
    total = sum(a.length for a, _ in both)
    differing = done = 0
    for a, b in both:

        def watch(share: float, done: int = done, length: int = a.length) -> None:
            report.progress("comparing", done + int(length * share), total)

        count, runs = await _one_block(left, a, right, b, watch=watch)
        found += runs
        differing += count
        done += a.length
    return differing, done // 4096


async def _one_block(
    left: Snapshot,
    a: RamBlock,
    right: Snapshot,
    b: RamBlock,
    *,
    watch: Callable[[float], None],
) -> tuple[int, list[Difference]]:
    job = Job()
    count, runs = await in_thread(
        lambda: left.image.compare(
            a.index, right.image, b.index, job, at_most=_RUNS_AT_MOST
        ),
        cancel=job.cancel,
        watch=lambda: watch(job.done / job.total if job.total else 0.0),
    )
    return count, [
        Difference(kind="pages", where=a.name, first=run.first, count=run.count)
        for run in runs
    ]


def _devices(left: Snapshot, right: Snapshot) -> Iterator[Difference]:
    ours, theirs = _by_key(left), _by_key(right)
    for key in (*ours, *(key for key in theirs if key not in ours)):
        a, b = ours.get(key), theirs.get(key)
        if a is None or b is None:
            yield Difference(
                kind="device",
                where=key,
                a=None if a is None else len(a.data),
                b=None if b is None else len(b.data),
            )
        elif a.version != b.version:
            yield Difference(
                kind="device", where=key, field="version", a=a.version, b=b.version
            )
        elif a.data != b.data:
            yield from _fields(key, a, b)


def _by_key(snapshot: Snapshot) -> dict[str, Device]:
    found: dict[str, Device] = {}
    for device in snapshot.devices:
        key = f"{device.name}:{device.instance}"
        if key in found:
            raise errors.Damaged(f"{snapshot.path}: device {key} is there twice")
        found[key] = device
    return found


def _fields(key: str, a: Device, b: Device) -> Iterator[Difference]:
    """Name the fields that differ, or the bytes where these tell more."""
    ours = {field.name: field for field in a.fields()}
    theirs = {field.name: field for field in b.fields()}
    listed = 0
    for name in (*ours, *(name for name in theirs if name not in ours)):
        one, other = ours.get(name), theirs.get(name)
        if one is not None and other is not None and one.data == other.data:
            continue
        listed += 1
        if listed > _FIELDS_AT_MOST:
            break
        yield Difference(
            kind="field",
            where=key,
            field=name,
            a=None if one is None else plain(one.value),
            b=None if other is None else plain(other.value),
        )
    if not listed:  # in what no field describes
        first = next(
            (i for i, (x, y) in enumerate(zip(a.data, b.data, strict=False)) if x != y),
            min(len(a.data), len(b.data)),
        )
        yield Difference(
            kind="device",
            where=key,
            first=first,
            a=len(a.data),
            b=len(b.data),
        )


def plain(value: object) -> object:
    """Return a field's value as JSON has it: bytes as text or hexadecimal."""
    if isinstance(value, tuple):
        return [plain(each) for each in value]
    if not isinstance(value, bytes):
        return value
    text = value.rstrip(b"\0")
    if text and text.isascii() and text.decode("ascii").isprintable():
        return text.decode("ascii")
    if len(value) > _VALUE_BYTES:
        return f"{value[:_VALUE_BYTES].hex()}.. ({len(value)} bytes)"
    return value.hex()
