# SPDX-License-Identifier: LGPL-2.1-or-later
"""Classes of pages over guest memory: counted in cells, for pictures and tools."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from qemu_pagesaver import devices as device_state
from qemu_pagesaver import errors
from qemu_pagesaver.native import PAGE_SIZE, Image, PageClass, RamBlock, Run

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qemu_pagesaver.snapshot import Meta, Snapshot

# In the order of a cell's counts. A page is shared where it refers to a
# canonical page that another page owns.
CLASSES = ("absent", "zero", "fill", "data", "shared")
_SHARED = 4

_4_GIB = 1 << 32
_VIRT_RAM = 1 << 30  # hw/arm/virt.c and hw/riscv/virt.c differ:
_RISCV_RAM = 1 << 31


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
    blocks = {block.name: block for block in guest.ram_blocks}
    machine = guest.machine or ""
    pc = blocks.get("pc.ram")
    if pc is not None and machine.startswith(("pc-", "pc", "q35")):
        below = _below_4g(guest, pc.length)
        if below is None:
            return
        yield Region(block=pc, first=0, pages=below // PAGE_SIZE, address=0)
        if below < pc.length:
            yield Region(
                block=pc,
                first=below // PAGE_SIZE,
                pages=(pc.length - below) // PAGE_SIZE,
                address=_4_GIB,
            )
    arm = blocks.get("mach-virt.ram")
    if arm is not None and machine.startswith("virt"):
        yield Region(
            block=arm, first=0, pages=arm.length // PAGE_SIZE, address=_VIRT_RAM
        )
    riscv = blocks.get("riscv_virt_board.ram")
    if riscv is not None:
        yield Region(
            block=riscv, first=0, pages=riscv.length // PAGE_SIZE, address=_RISCV_RAM
        )


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
    return below if below + above == length and not below % PAGE_SIZE else None
