# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where RAM blocks are, by what machine, clock and command line tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import cast

import pytest

from qemu_pagesaver import devices, memory_map
from qemu_pagesaver.native import RamBlock
from qemu_pagesaver.snapshot import Meta, Snapshot
from tests.unit import streams

MIB, GIB = 1 << 20, 1 << 30
ROM = {"pc.bios": 256 << 10}
TWO = (
    *("-object", "memory-backend-ram,id=a,size=1G", "-numa", "node,memdev=a"),
    *("-numa", "node,memdev=b,nodeid=1", "-machine", "pc"),
)


def clock(below: int, above: int) -> tuple[devices.Device, ...]:
    """A PC's clock, with the sizes that the board leaves in it."""
    cmos = bytearray(128)
    cmos[0x34:0x36] = ((below - 16 * MIB) >> 16).to_bytes(2, "little")
    cmos[0x5B:0x5E] = (above >> 16).to_bytes(3, "little")
    state = streams.State("mc146818rtc", 3).put("cmos_data", "buffer", bytes(cmos))
    data, description = streams.device_sections([("mc146818rtc", 0, state)])
    return devices.decode(description, data, footers=True)


def snapshot(
    machine: str,
    blocks: Mapping[str, int],
    *,
    architecture: str | None = None,
    command_line: Sequence[str] = (),
    state: tuple[devices.Device, ...] = (),
) -> Snapshot:
    """As much of a snapshot as regions() looks at."""
    names = ("first_leaf", "pages_zero", "pages_fill", "pages_data", "pages_absent")
    made = [
        RamBlock(
            index=index,
            name=name,
            length=length,
            page_size=None,
            address=None,
            **dict.fromkeys(names, 0),
        )
        for index, (name, length) in enumerate(blocks.items())
    ]
    meta = Meta(architecture=architecture, command_line=tuple(command_line))
    return cast(
        "Snapshot",
        SimpleNamespace(
            machine=machine, meta=meta, ram_blocks=tuple(made), devices=state
        ),
    )


def places(of: Snapshot) -> list[tuple[str, int, int, int | None]]:
    """Block, offset in it, bytes, guest-physical address."""
    return [
        (region.block.name, region.first * 4096, region.pages * 4096, region.address)
        for region in memory_map.regions(of)
        if region.block.name != "pc.bios"
    ]


@pytest.mark.parametrize("machine", ["pc-i440fx-10.0", "pc-q35-7.2", "pc"])
def test_the_hole_of_a_pc(machine: str) -> None:
    ram = {"pc.ram": 6 * GIB, **ROM}
    assert places(snapshot(machine, ram, state=clock(3 * GIB, 3 * GIB))) == [
        ("pc.ram", 0, 3 * GIB, 0),
        ("pc.ram", 3 * GIB, 3 * GIB, 4 * GIB),
    ]
    small = {"pc.ram": 512 * MIB}
    whole = [("pc.ram", 0, 512 * MIB, 0)]
    assert places(snapshot(machine, small, state=clock(512 * MIB, 0))) == whole


@pytest.mark.parametrize(
    "state",
    [
        (),
        clock(3 * GIB, 2 * GIB),
        clock(3 * GIB, 0),
        clock(4 * GIB + 8 * MIB, 2 * GIB - 8 * MIB),
    ],
    ids=["none", "less", "no-more", "over-4-gib"],
)
def test_a_clock_that_does_not_add_up(state: tuple[devices.Device, ...]) -> None:
    found = snapshot("pc-q35-10.0", {"pc.ram": 6 * GIB, **ROM}, state=state)
    assert places(found) == [("pc.ram", 0, 6 * GIB, None)]


@pytest.mark.parametrize(
    ("name", "architecture", "address"),
    [
        ("mach-virt.ram", "aarch64", GIB),
        ("mach-virt.ram", None, GIB),
        ("riscv_virt_board.ram", "riscv64", 2 * GIB),
        ("m68k_virt.ram", "m68k", None),
    ],
)
def test_memory_without_a_hole(
    name: str, architecture: str | None, address: int | None
) -> None:
    found = snapshot("virt-10.0", {name: 6 * GIB}, architecture=architecture)
    assert places(found) == [(name, 0, 6 * GIB, address)]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("own", ("-machine", "virt,memory-backend=own")),
        ("/objects/own", ("-M", "virt,memory-backend=other,memory-backend=own")),
        ("own", ("--machine", "virt", "-machine", "memory-backend=own")),
    ],
)
def test_a_backend_of_the_users_own(name: str, options: tuple[str, ...]) -> None:
    line = ("qemu-system-aarch64", *options)
    arm = snapshot("virt-10.0", {name: GIB}, architecture="aarch64", command_line=line)
    assert places(arm) == [(name, 0, GIB, GIB)]
    riscv = snapshot("virt", {name: GIB}, architecture="riscv64", command_line=line)
    assert places(riscv) == [(name, 0, GIB, 2 * GIB)]
    pc = snapshot("pc-q35", {name: GIB}, command_line=line, state=clock(GIB, 0))
    assert places(pc) == [(name, 0, GIB, 0)]


def test_nodes_are_joined_in_their_order() -> None:
    found = snapshot(
        "pc-i440fx-10.0",
        {"b": 4 * GIB, "a": GIB, **ROM},
        state=clock(3 * GIB, 2 * GIB),
        command_line=TWO,
    )
    assert places(found) == [
        ("a", 0, GIB, 0),
        ("b", 0, 2 * GIB, GIB),
        ("b", 2 * GIB, 2 * GIB, 4 * GIB),
    ]


@pytest.mark.parametrize(
    "line",
    [
        (),
        ("-machine",),
        ("-machine", "pc,memory-backend=none"),
        ("-machine", "{", "-numa", "node,nodeid=x,memdev=own"),
        ("-name", "-machine", "-name", "own"),
        ("-numa", "node,memdev=own", "-numa", "node,memdev=own"),
    ],
)
def test_not_known_where(line: tuple[str, ...]) -> None:
    state = clock(GIB, 0)
    found = snapshot("pc", {"own": GIB, **ROM}, command_line=line, state=state)
    assert places(found) == [("own", 0, GIB, None)]
