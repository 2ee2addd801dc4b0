# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where RAM blocks are in guest-physical memory, proved by what is there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import qemu_pagesaver
from qemu_pagesaver import memory_map
from qemu_pagesaver.memory_map import Region
from qemu_pagesaver.native import PAGE_SIZE, PageClass
from qemu_pagesaver.snapshot import Snapshot
from tests.conftest import Vms
from tests.support import qemus
from tests.support.qemus import AARCH64, X86_64, Architecture
from tests.support.vm import Vm

MIB, GIB = 1 << 20, 1 << 30
MEMORY = 6 * 1024  # MiB
# Pages compared in each region, spread over it.
SAMPLES = 150


@dataclass(frozen=True)
class Board:
    """A machine, and where it has its memory (hw/i386/pc*.c, hw/arm/virt.c)."""

    architecture: Architecture
    machine: str
    ranges: tuple[tuple[int, int], ...]
    memory: int = MEMORY
    version: str = qemus.NEWEST
    extra: tuple[str, ...] = ()

    def __str__(self) -> str:
        numa = "-numa" if "-numa" in self.extra else ""
        return f"qemu-{self.version}-{self.machine}-{self.memory}M{numa}"

    def vm(self, *, paused: bool = False) -> Vm:
        qemu, guest = qemus.get(self.version), f"busybox{self.architecture.suffix}"
        return Vm(
            qemu,
            guest,
            machine=self.machine,
            memory=self.memory,
            extra=self.extra,
            paused=paused,
        )


def split(below: int, memory: int = MEMORY * MIB) -> tuple[tuple[int, int], ...]:
    """The ranges of a PC with so much below 4 GiB."""
    return (0, below), (4 * GIB, 4 * GIB + memory - below)


PC = Board(X86_64, "pc", split(3 * GIB))
Q35 = Board(X86_64, "q35", split(2 * GIB))
VIRT = Board(AARCH64, "virt", ((GIB, 7 * GIB),))


def backends(*options: str) -> tuple[str, ...]:
    """RAM of the user's own, as libvirt gives it."""
    return tuple(
        word for each in options for word in ("-object", f"memory-backend-ram,{each}")
    )


# The nodes are joined by their numbers, and the hole is within the first.
NODES = (
    *backends("id=second,size=1G", "id=first,size=3G"),
    *("-numa", "node,nodeid=1,memdev=second", "-numa", "node,nodeid=0,memdev=first"),
)
BOARDS = (
    *(PC, Q35, VIRT),
    Board(X86_64, "pc", split(3 * GIB), version="7.2"),
    Board(X86_64, "q35", split(2 * GIB), version="7.2"),
    # All of it below: more than q35 has there when there is more still.
    Board(X86_64, "pc", ((0, 3 * GIB),), memory=3 * 1024),
    Board(X86_64, "q35", ((0, 2560 * MIB),), memory=2560),
    Board(X86_64, "pc,max-ram-below-4g=1G", split(GIB, 3 * GIB), memory=3 * 1024),
    Board(X86_64, "q35,max-ram-below-4g=1G", split(GIB, 3 * GIB), memory=3 * 1024),
    Board(AARCH64, "virt", ((GIB, GIB + 256 * MIB),), memory=256),
    Board(
        *(X86_64, "pc,memory-backend=own", split(3 * GIB, 4 * GIB), 4096),
        extra=backends("id=own,size=4G"),
    ),
    Board(
        *(AARCH64, "virt,memory-backend=own", ((GIB, 2 * GIB),), 1024),
        extra=backends("id=own,size=1G"),
    ),
    Board(X86_64, "q35", split(2 * GIB, 4 * GIB), 4096, extra=NODES),
    Board(AARCH64, "virt", ((GIB, 5 * GIB),), 4096, extra=NODES),
)


def written(address: int) -> bytes:
    """A page that says where it is."""
    return address.to_bytes(8, "little") * (PAGE_SIZE // 8)


def places(board: Board) -> list[int]:
    """Some in each range, the last page too; its beginning may have firmware."""
    return [
        address
        for start, end in board.ranges
        for address in (
            start + 64 * MIB,
            start + (end - start) // 4 * 3,
            end - PAGE_SIZE,
        )
    ]


@dataclass(frozen=True)
class Part:
    """A region with an address."""

    region: Region
    start: int

    @property
    def end(self) -> int:
        return self.start + self.region.pages * PAGE_SIZE

    def page(self, address: int) -> int:
        """The page of the RAM block at a guest-physical address."""
        return self.region.first + (address - self.start) // PAGE_SIZE

    def address(self, page: int) -> int:
        return self.start + (page - self.region.first) * PAGE_SIZE


def main_memory(snapshot: Snapshot) -> list[Part]:
    return [
        Part(region, region.address)
        for region in memory_map.regions(snapshot)
        if region.address is not None
    ]


def ranges_of(parts: Sequence[Part]) -> tuple[tuple[int, int], ...]:
    """What is covered, adjacent parts as one."""
    found: list[tuple[int, int]] = []
    for part in parts:
        if found and found[-1][1] == part.start:
            found[-1] = (found[-1][0], part.end)
        else:
            found.append((part.start, part.end))
    return tuple(found)


def page_at(snapshot: Snapshot, address: int) -> bytes:
    """The snapshot's page of a guest-physical address."""
    (part,) = (p for p in main_memory(snapshot) if p.start <= address < p.end)
    block = part.region.block.index
    return snapshot.image.read_pages(block, part.page(address), 1)


@pytest.mark.parametrize("board", BOARDS, ids=str)
def test_known_content_at_known_addresses(
    board: Board, vms: Vms, disk_path: Path
) -> None:
    """QEMU's loader writes to guest-physical addresses; nothing has run yet."""
    vm = vms.add(board.vm(paused=True))
    for number, address in enumerate(places(board)):
        file = disk_path / f"page{number}"
        file.write_bytes(written(address))
        vm.extra += ["-device", f"loader,addr={address:#x},file={file},force-raw=on"]
    vm.start()
    qemu_pagesaver.save(vm.qmp_path, disk_path / "psnap")
    with qemu_pagesaver.open(disk_path / "psnap") as snapshot:
        parts = main_memory(snapshot)
        assert ranges_of(parts) == board.ranges
        assert sum(part.end - part.start for part in parts) == board.memory * MIB
        for address in places(board):
            assert page_at(snapshot, address) == written(address), hex(address)


@pytest.mark.parametrize("board", [PC, Q35, VIRT], ids=str)
def test_linux_with_6_gib(board: Board, vms: Vms, disk_path: Path) -> None:
    """What the guest has in each region is what QEMU finds at its addresses."""
    vm = vms.start(board.vm())
    told = [
        (int(start, 16), int(end, 16) + 1)
        for start, end in re.findall(
            r"(?m)^(\w+)-(\w+) : System RAM$", vm.shell.run("cat /proc/iomem")
        )
    ]
    assert sum(end - start for start, end in told) > 0.95 * MEMORY * MIB
    vm.qmp.command("stop")
    qemu_pagesaver.save(vm.qmp_path, disk_path / "psnap")
    with qemu_pagesaver.open(disk_path / "psnap") as snapshot:
        parts = main_memory(snapshot)
        assert ranges_of(parts) == board.ranges
        for start, end in told:
            assert any(low <= start < end <= high for low, high in board.ranges)
        for part in parts:
            pages = distinct_pages(snapshot, part.region)
            assert len(pages) == SAMPLES
            for page in pages:
                address, block = part.address(page), part.region.block.index
                content = snapshot.image.read_pages(block, page, 1)
                assert vm.physical_memory(address, PAGE_SIZE) == content, hex(address)
        # The guest's page tables were found and followed through that.
        found = snapshot.meta.locality
        assert found is not None
        assert found["mode"].startswith(board.architecture.name.replace("_", "-"))
        assert found["note"] is None
        assert found["address-spaces"] > 1
        assert found["placed"]["user"] > 100
    assert vm.memory_bytes() < GIB


def distinct_pages(snapshot: Snapshot, region: Region) -> list[int]:
    """Some pages of a region that have content, each of its own."""
    found = [
        page
        for run in snapshot.image.runs(region.block.index)
        if run.page_class is PageClass.DATA and not run.shared
        for page in range(run.first, run.first + run.count)
        if region.first <= page < region.first + region.pages
    ]
    return found[:: len(found) // SAMPLES][:SAMPLES]
