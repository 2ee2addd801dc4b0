# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which pages are neighbours: asked of the guest's page tables, between the passes.

The C core walks and orders (``native/src/spaces.c``); here is what it has to be
told: how each vCPU translates addresses, read from the device state, and where
guest-physical memory lies in RAM blocks. Whatever is missing or makes no sense
costs the neighbourhood, never the save.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qemu_pagesaver import devices as device_state
from qemu_pagesaver import errors, memory_map
from qemu_pagesaver.native import (
    Architecture,
    CpuPaging,
    Locality,
    PhysicalRange,
    Saver,
    Section,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from qemu_pagesaver.native import RamBlock
    from qemu_pagesaver.snapshot import Meta

# QEMU keeps system registers of aarch64 by KVM's numbers (target/arm/helper.c,
# cpreg_to_kvm_id; linux/arch/arm64/include/uapi/asm/kvm.h, ARM64_SYS_REG).
_ARM64_SYSTEM = 0x6030_0000_0013_0000
_AARCH64 = {
    "SCTLR_EL1": (3, 0, 1, 0, 0),
    "TTBR0_EL1": (3, 0, 2, 0, 0),
    "TTBR1_EL1": (3, 0, 2, 0, 1),
    "TCR_EL1": (3, 0, 2, 0, 2),
}


@dataclass(frozen=True)
class _Saved:
    """The guest as the saver has it between the passes, as memory_map wants it."""

    saver: Saver
    meta: Meta

    @cached_property
    def ram_blocks(self) -> tuple[RamBlock, ...]:
        return self.saver.ram_blocks()

    @cached_property
    def devices(self) -> tuple[device_state.Device, ...]:
        return device_state.decode(
            self.saver.section(Section.DESCRIPTION),
            self.saver.section(Section.DEVICES),
            footers=self.saver.stream_info().footers,
        )

    @property
    def machine(self) -> str | None:
        return self.meta.machine


def locate(saver: Saver, meta: Meta) -> Meta:
    """Find address spaces, so that the second pass follows them; for a thread.

    Returns:
        META with what was found (FORMAT.md, ``locality``).
    """
    guest = _Saved(saver, meta)
    note = ""
    cpus: tuple[CpuPaging, ...] = ()
    ranges: list[PhysicalRange] = []
    try:
        cpus = tuple(paging(guest.devices))
        ranges = [
            PhysicalRange(
                address=region.address,
                block=region.block.index,
                page=region.first,
                pages=region.pages,
            )
            for region in memory_map.main_memory(guest)
            if region.address is not None
        ]
    except errors.Damaged as error:
        note = f"the device state cannot be read: {error.message}"
    if not note and not cpus:
        note = "the registers of the CPUs are not known"
    if not note and not ranges:
        note = "it is not known where the machine has its memory"
    if not note:
        try:
            found = document(saver.locate(cpus, ranges))
        except errors.OutOfMemory as error:
            note = f"there was no memory to look at page tables: {error.message}"
    return dataclasses.replace(meta, locality={"note": note} if note else found)


def document(found: Locality) -> dict[str, Any]:
    """Return what META and ``info --json`` say of it."""
    return {
        "mode": found.mode or None,
        "note": found.note or None,
        "address-spaces": found.spaces,
        "virtual-runs": found.runs,
        "candidates": {
            "seen": found.candidates,
            "live": found.live,
            "dead": found.dead,
            "duplicate": found.duplicates,
            "pairs": found.pairs,
        },
        "files": found.files,
        "placed": {
            "user": found.from_user,
            "page-cache": found.from_files,
            "kernel": found.from_kernel,
            "free": found.from_free,
            "physical": found.from_rest,
        },
        "duration": found.duration,
    }


def paging(devices: Sequence[device_state.Device]) -> Iterator[CpuPaging]:
    """Yield how each vCPU translates addresses, as far as the stream tells."""
    for device in devices:
        if device.name != "cpu":
            continue
        for read in (_x86_64, _aarch64, _riscv64):
            try:
                yield read(device)
                break
            except KeyError:
                continue


def _number(device: device_state.Device, path: str) -> int:
    value = device.field(path).value
    if not isinstance(value, int):
        raise KeyError(path)
    return value & (1 << 64) - 1


def _x86_64(device: device_state.Device) -> CpuPaging:
    names = ("env.cr[0]", "env.cr[3]", "env.cr[4]", "env.efer")
    return CpuPaging(
        architecture=Architecture.X86_64,
        registers=tuple(_number(device, name) for name in names),
    )


def _aarch64(device: device_state.Device) -> CpuPaging:
    indexes = _numbers(device, "cpreg_vmstate_indexes")
    values = _numbers(device, "cpreg_vmstate_values")
    known = dict(zip(indexes, values, strict=False))
    return CpuPaging(
        architecture=Architecture.AARCH64,
        registers=tuple(known[_arm_id(*where)] for where in _AARCH64.values()),
    )


def _arm_id(op0: int, op1: int, crn: int, crm: int, op2: int) -> int:
    return _ARM64_SYSTEM | op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2


def _numbers(device: device_state.Device, path: str) -> list[int]:
    """Return an array of be64 numbers."""
    data = device.field(path).data
    return [int.from_bytes(data[at : at + 8]) for at in range(0, len(data), 8)]


def _riscv64(device: device_state.Device) -> CpuPaging:
    return CpuPaging(
        architecture=Architecture.RISCV64,
        registers=(_number(device, "env.satp"),),
    )
