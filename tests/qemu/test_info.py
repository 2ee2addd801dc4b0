# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `info` and `map` tell about real guests, against what QEMU tells."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import qemu_pagesaver
from qemu_pagesaver import devices, memory_map
from qemu_pagesaver.convert import convert
from qemu_pagesaver.info import describe
from tests.conftest import Vms
from tests.support.qemus import Qemu
from tests.support.vm import Vm

# As many kinds of state as one machine takes.
CROWD = (
    *("-device", "virtio-scsi-pci", "-device", "qemu-xhci", "-device", "usb-tablet"),
    *("-device", "usb-kbd", "-device", "virtio-serial-pci"),
    *("-chardev", "null,id=null0", "-device", "virtconsole,chardev=null0"),
    *("-device", "virtio-balloon-pci", "-device", "virtio-rng-pci", "-vga", "std"),
    *("-device", "e1000", "-device", "rtl8139", "-device", "virtio-keyboard-pci"),
    *("-device", "lsi53c895a", "-device", "ich9-ahci", "-device", "virtio-iommu-pci"),
    *("-device", "sdhci-pci", "-device", "pcie-root-port,chassis=1"),
)


def saved(vm: Vm, directory: Path) -> Path:
    vm.save_stream(directory / "stream")
    convert(directory / "stream", directory / "psnap")
    return directory / "psnap"


def monitor(vm: Vm, line: str) -> str:
    arguments: dict[str, Any] = {"command-line": line}
    return str(vm.qmp.command("human-monitor-command", **arguments))


@pytest.mark.parametrize("smp", [1, 2])
def test_registers(qemu: Qemu, vms: Vms, disk_path: Path, smp: int) -> None:
    """Every CPU's registers are those that the monitor shows."""
    vm = vms.start(Vm(qemu, "busybox", smp=smp))
    vm.qmp.command("stop")
    text = monitor(vm, "info registers -a")
    told = [
        dict(re.findall(r"(\w+) ?= ?([0-9a-f]+)", cpu)) for cpu in text.split("CPU#")
    ]
    told = [cpu for cpu in told if "CR3" in cpu]
    assert len(told) == smp
    with qemu_pagesaver.open(saved(vm, disk_path)) as snapshot:
        for number, registers in enumerate(told):
            cpu = devices.find(snapshot.devices, "cpu", number)
            assert cpu.exact
            for name, field in (
                *(("CR0", "env.cr[0]"), ("CR2", "env.cr[2]"), ("CR3", "env.cr[3]")),
                *(("CR4", "env.cr[4]"), ("EFER", "env.efer"), ("RIP", "env.eip")),
                *(("RAX", "env.regs[0]"), ("RSP", "env.regs[4]")),
                *(("R15", "env.regs[15]"),),
            ):
                assert cpu.field(field).value == int(registers[name], 16), name


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_every_section_to_its_end(
    qemu: Qemu, vms: Vms, disk_path: Path, machine: str
) -> None:
    extra = CROWD if machine == "q35" else ()
    vm = vms.start(Vm(qemu, "busybox", machine=machine, smp=2, extra=extra))
    with qemu_pagesaver.open(saved(vm, disk_path)) as snapshot:
        found = snapshot.devices
        assert [device.name for device in found if not device.exact] == []
        assert len(found) > (50 if extra else 25)
        for device in found:
            assert sum(each.size for each in device.fields()) <= len(device.data)
            for each in device.fields():
                assert device.field(each.name).data == each.data, each.name
        assert devices.run_state(found) == "running"
        assert devices.architecture(found) == "x86_64"
        document = describe(snapshot)
    current = vm.qmp.command("query-machines")
    (name,) = [m["name"] for m in current if m.get("alias") == machine]
    assert document["machine"] == name
    assert len(document["devices"]) == len(found)
    assert {block["name"] for block in document["ram-blocks"]} >= {"pc.ram", "pc.bios"}


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_where_memory_is(
    newest_qemu: Qemu, vms: Vms, disk_path: Path, machine: str
) -> None:
    """A guest with memory on both sides of the hole below 4 GiB."""
    vm = vms.start(
        Vm(newest_qemu, "pattern", machine=machine, memory=4608, paused=True)
    )
    # Not even started: the CMOS is written when the machine is made.
    text = monitor(vm, "info mtree -f")
    with qemu_pagesaver.open(saved(vm, disk_path)) as snapshot:
        regions = [
            region
            for region in memory_map.regions(snapshot)
            if region.block.name == "pc.ram"
        ]
    assert [region.address for region in regions] == [0, 1 << 32]
    below, above = (region.pages * 4096 for region in regions)
    assert below + above == 4608 << 20
    assert re.search(rf"100000000-{(1 << 32) + above - 1:016x}", text)
