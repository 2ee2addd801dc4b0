# SPDX-License-Identifier: LGPL-2.1-or-later
"""Classes of pages over guest memory: counted in cells, for pictures and tools."""

from __future__ import annotations

import contextlib
import itertools
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from qemu_pagesaver import devices as device_state
from qemu_pagesaver import errors
from qemu_pagesaver.native import PAGE_SIZE, Image, PageClass, RamBlock, Run
from qemu_pagesaver.option_string import OptionString

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qemu_pagesaver.snapshot import Meta, Snapshot

# In the order of a cell's counts. A page is shared where it refers to a
# canonical page that another page owns.
CLASSES = ("absent", "zero", "fill", "data", "shared")
_SHARED = 4

_4_GIB = 1 << 32
# Boards called `virt` whose memory has no hole: hw/arm/virt.c, hw/riscv/virt.c.
_CONTIGUOUS = (
    (("aarch64", "arm"), "mach-virt.ram", 1 << 30),
    (("riscv64", "riscv32"), "riscv_virt_board.ram", 1 << 31),
)
_MACHINE = ("-machine", "--machine", "-M", "--M")
_NUMA = ("-numa", "--numa")


class Guest(Protocol):
    """What tells where memory is: a snapshot, or one that is being made."""

    @property
    def ram_blocks(self) -> tuple[RamBlock, ...]:
        """Its RAM blocks."""

    @property
    def devices(self) -> tuple[device_state.Device, ...]:
        """Its device sections."""

    @property
    def machine(self) -> str | None:
        """Its exact machine type."""

    @property
    def meta(self) -> Meta:
        """What else is known of it."""


@dataclass(frozen=True, kw_only=True)
class Region:
    """A part of a RAM block, and where the guest sees it.

    ``address`` is guest-physical; None where the stream does not tell.
    """

    block: RamBlock
    first: int
    pages: int
    address: int | None


def class_of(run: Run) -> int:
    """Return the index in CLASSES of a run's pages."""
    if run.page_class is PageClass.DATA and run.shared:
        return _SHARED
    return int(run.page_class)


def count_cells(
    image: Image, region: Region, *, pages_per_cell: int
) -> list[list[int]]:
    """Count pages by class (CLASSES) in cells of equal size.

    Works by runs, so uniform memory costs a step for each cell, not each page.
    """
    if pages_per_cell < 1:
        raise ValueError("a cell has at least one page")
    cells = [[0] * len(CLASSES) for _ in range(-(-region.pages // pages_per_cell))]
    for run in image.runs(region.block.index):
        at = max(run.first, region.first) - region.first
        end = min(run.first + run.count, region.first + region.pages) - region.first
        if run.first >= region.first + region.pages:
            break
        kind = class_of(run)
        while at < end:
            cell = at // pages_per_cell
            upto = min(end, (cell + 1) * pages_per_cell)
            cells[cell][kind] += upto - at
            at = upto
    return cells


def regions(snapshot: Snapshot) -> tuple[Region, ...]:
    """Return all memory: by guest-physical address first, then the other blocks."""
    placed = main_memory(snapshot)
    known = {region.block.index for region in placed}
    rest = [
        Region(
            block=block, first=0, pages=block.length // PAGE_SIZE, address=block.address
        )
        for block in snapshot.ram_blocks
        if block.index not in known
    ]
    return tuple(
        sorted(
            [*placed, *rest],
            key=lambda r: (r.address is None, r.address or 0, r.block.index, r.first),
        )
    )


def main_memory(guest: Guest) -> tuple[Region, ...]:
    """Return where the main memory is, ascending; empty where nothing tells it."""
    return tuple(_placed(guest))


def _placed(guest: Guest) -> Iterator[Region]:
    """Yield where the main memory is, if the machine's state tells it.

    Memory that a board moves above 1 TiB (an AMD CPU's, hw/i386/pc.c) is not known
    by the stream to be there.
    """
    machine = guest.machine or ""
    if machine.startswith(("pc", "q35")):
        main = _blocks(guest, "pc.ram")
        length = sum(block.length for block in main)
        below = _below_4g(guest, length)
        if below is not None:
            yield from _spread(main, (0, below), (_4_GIB, length - below))
        return
    if not machine.startswith("virt"):
        return
    names = {block.name for block in guest.ram_blocks}
    for architectures, name, address in _CONTIGUOUS:
        if name in names or guest.meta.architecture in architectures:
            main = _blocks(guest, name)
            yield from _spread(main, (address, sum(block.length for block in main)))
            return


def _spread(main: Sequence[RamBlock], *ranges: tuple[int, int]) -> Iterator[Region]:
    """Yield blocks, one behind the other, cut into ranges of address and bytes."""
    blocks = iter(main)
    block, at = next(blocks, None), 0
    for address, length in ranges:
        done = 0
        while block is not None and done < length:
            part = min(length - done, block.length - at)
            yield Region(
                block=block,
                first=at // PAGE_SIZE,
                pages=part // PAGE_SIZE,
                address=address + done,
            )
            done, at = done + part, at + part
            if at == block.length:
                block, at = next(blocks, None), 0


def _blocks(guest: Guest, name: str) -> list[RamBlock]:
    """Return the blocks of the main memory in order: the board's, or the user's.

    The user gives one by ``-machine memory-backend=ID`` or one for each node by
    ``-numa node,memdev=ID`` (hw/core/numa.c joins them by the nodes' numbers).
    Empty where a stream was imported and no command line tells.
    """
    blocks = {block.name: block for block in guest.ram_blocks}
    if name in blocks:
        return [blocks[name]]
    nodes: dict[int, str] = {}
    backend = ""
    for option, text in itertools.pairwise(guest.meta.command_line or ()):
        with contextlib.suppress(ValueError):
            values = OptionString.parse(text, implied="type")
            if option in _MACHINE:
                backend = values.get("memory-backend") or backend
            elif option in _NUMA and values.get("memdev"):
                number = int(values.get("nodeid") or len(nodes))
                nodes[number] = values.get("memdev")
    named = [backend] if backend else [nodes[number] for number in sorted(nodes)]
    # A backend of an older machine type is called by its place.
    found = [blocks.get(each) or blocks.get(f"/objects/{each}") for each in named]
    known = {block.index: block for block in found if block is not None}
    return list(known.values()) if len(known) == len(named) else []


def _below_4g(guest: Guest, length: int) -> int | None:
    """Return how much of a PC's memory is below 4 GiB.

    The board tells the firmware in the clock's CMOS (hw/i386/x86-common.c,
    x86_cmos_init): bytes 0x34 and 0x35 hold what is between 16 MiB and 4 GiB,
    0x5b to 0x5d what is above, in units of 64 KiB. Believed only if the sum is
    the RAM block's length.
    """
    try:
        clock = device_state.find(guest.devices, "mc146818rtc")
        cmos = clock.field("cmos_data").data
    except (KeyError, errors.Damaged):
        return None
    if len(cmos) < 0x5E:
        return None
    (between,) = struct.unpack_from("<H", cmos, 0x34)
    above = int.from_bytes(cmos[0x5B:0x5E], "little") << 16
    if not above and length < _4_GIB:
        return length
    below = (between << 16) + (16 << 20)
    return below if below + above == length and below <= _4_GIB else None
