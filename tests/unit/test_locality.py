# SPDX-License-Identifier: LGPL-2.1-or-later
"""How vCPUs translate addresses, as read from device state."""

from __future__ import annotations

from qemu_pagesaver import devices
from qemu_pagesaver.locality import paging
from qemu_pagesaver.native import Architecture, CpuPaging
from tests.unit import streams
from tests.unit.streams import State


def cpus(*states: State) -> list[CpuPaging]:
    given = [("cpu", number, state) for number, state in enumerate(states)]
    data, description = streams.device_sections(
        [("timer", 0, State("timer").number("x", "uint32", 1)), *given]
    )
    return list(paging(devices.decode(description, data, footers=True)))


def x86(cr3: int) -> State:
    state = State("cpu", 12)
    for name, value in (("0", 0x80050033), ("3", cr3), ("4", 0x3506F0)):
        state.number(f"env.cr[{name}]", "uint64", value)
    return state.number("env.efer", "uint64", 0xD01)


def test_x86_64() -> None:
    assert cpus(x86(0x1000), x86(0x8000_0000_0000_2000)) == [
        CpuPaging(
            architecture=Architecture.X86_64,
            registers=(0x80050033, cr3, 0x3506F0, 0xD01),
        )
        for cr3 in (0x1000, 0x8000_0000_0000_2000)
    ]


def test_aarch64() -> None:
    # SCTLR_EL1, TTBR0_EL1, TTBR1_EL1, TCR_EL1 among others, as KVM numbers them.
    known = {
        0x6030_0000_0013_C080: 0x30D0_198D,
        0x6030_0000_0013_C082: 0x1F,
        0x6030_0000_0013_C100: 0x4100_0000,
        0x6030_0000_0013_C101: 0x4200_0000,
        0x6030_0000_0013_C102: 0x3_5590_3510,
    }
    state = State("cpu")
    state.numbers("env.xregs", "uint64", range(32))
    state.numbers("cpreg_vmstate_indexes", "uint64", list(known))
    state.numbers("cpreg_vmstate_values", "uint64", list(known.values()))
    assert cpus(state) == [
        CpuPaging(
            architecture=Architecture.AARCH64,
            registers=(0x30D0_198D, 0x4100_0000, 0x4200_0000, 0x3_5590_3510),
        )
    ]


def test_riscv64() -> None:
    state = State("cpu").number("env.satp", "uint64", 8 << 60 | 0x81234)
    (found,) = cpus(state)
    assert found.architecture is Architecture.RISCV64
    assert found.registers == (8 << 60 | 0x81234,)


def test_unknown_cpus_are_left_out() -> None:
    assert cpus(State("cpu").number("env.psw.mask", "uint64", 1)) == []
    assert cpus(State("cpu").number("env.cr[3]", "uint64", 1)) == []
