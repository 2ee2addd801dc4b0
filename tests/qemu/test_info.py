# SPDX-License-Identifier: LGPL-2.1-or-later
"""What `info` and `map` tell about real guests, against what QEMU tells."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

import qemu_pagesaver
from qemu_pagesaver import devices
from qemu_pagesaver.convert import convert
from qemu_pagesaver.info import describe
from tests.conftest import Vms
from tests.support import qemus
from tests.support.qemus import AARCH64, X86_64, Architecture, Platform
from tests.support.vm import Vm

# As many kinds of state as one machine takes.
CROWD = (
    *("-device", "virtio-scsi-pci", "-device", "qemu-xhci", "-device", "usb-tablet"),
    *("-device", "usb-kbd", "-device", "virtio-serial-pci"),
    *("-chardev", "null,id=null0", "-device", "virtconsole,chardev=null0"),
    *("-device", "virtio-balloon-pci", "-device", "virtio-rng-pci", "-device", "VGA"),
    *("-device", "e1000", "-device", "rtl8139", "-device", "virtio-keyboard-pci"),
    *("-device", "lsi53c895a", "-device", "ich9-ahci", "-device", "virtio-iommu-pci"),
    *("-device", "sdhci-pci", "-device", "pcie-root-port,chassis=1"),
)

# What the monitor calls registers, and the stream.
REGISTERS = {
    "x86_64": {
        **{f"CR{number}": f"env.cr[{number}]" for number in (0, 2, 3, 4)},
        "EFER": "env.efer",
        "RIP": "env.eip",
        "RAX": "env.regs[0]",
        "RSP": "env.regs[4]",
        "R15": "env.regs[15]",
    },
    "aarch64": {
        "PC": "env.pc",
        "SP": "env.xregs[31]",
        **{f"X{number:02}": f"env.xregs[{number}]" for number in range(31)},
    },
}
BOARDS = [
    *itertools.product(qemus.VERSIONS, [X86_64], ["pc", "q35"]),
    (qemus.NEWEST, AARCH64, "virt"),
]


def saved(vm: Vm, directory: Path) -> Path:
    vm.save_stream(directory / "stream")
    convert(directory / "stream", directory / "psnap")
    return directory / "psnap"


def monitor(vm: Vm, line: str) -> str:
    arguments: dict[str, Any] = {"command-line": line}
    return str(vm.qmp.command("human-monitor-command", **arguments))


@pytest.mark.parametrize("smp", [1, 2])
def test_registers(platform: Platform, vms: Vms, disk_path: Path, smp: int) -> None:
    """Every CPU's registers are those that the monitor shows."""
    names = REGISTERS[platform.architecture.name]
    vm = vms.start(Vm(platform.qemu, platform.guest("busybox"), smp=smp))
    vm.qmp.command("stop")
    text = monitor(vm, "info registers -a")
    told = [
        dict(re.findall(r"(\w+) ?= ?([0-9a-f]+)", cpu)) for cpu in text.split("CPU#")
    ]
    told = [cpu for cpu in told if names.keys() <= cpu.keys()]
    assert len(told) == smp
    with qemu_pagesaver.open(saved(vm, disk_path)) as snapshot:
        for number, registers in enumerate(told):
            cpu = devices.find(snapshot.devices, "cpu", number)
            assert cpu.exact
            for name, field in names.items():
                assert cpu.field(field).value == int(registers[name], 16), name


@pytest.mark.parametrize(
    ("version", "architecture", "machine"), BOARDS, ids=lambda v: getattr(v, "name", v)
)
def test_every_section_to_its_end(
    vms: Vms, disk_path: Path, version: str, architecture: Architecture, machine: str
) -> None:
    guest = f"busybox{architecture.suffix}"
    extra = () if machine == "pc" else CROWD
    vm = Vm(qemus.get(version), guest, machine=machine, smp=2, extra=extra)
    vms.start(vm)
    with qemu_pagesaver.open(saved(vm, disk_path)) as snapshot:
        found = snapshot.devices
        assert [device.name for device in found if not device.exact] == []
        assert len(found) > (50 if machine == "q35" else 25)
        for device in found:
            assert sum(each.size for each in device.fields()) <= len(device.data)
            first = {each.name: each for each in reversed(list(device.fields()))}
            for each in first.values():
                assert device.field(each.name).data == each.data, each.name
        assert devices.run_state(found) == "running"
        assert devices.architecture(found) == architecture.name
        document = describe(snapshot)
    current = vm.qmp.command("query-machines")
    (name,) = [m["name"] for m in current if m.get("alias") == machine]
    assert document["machine"] == name
    assert len(document["devices"]) == len(found)
    names = {block["name"] for block in document["ram-blocks"]}
    expected = {"x86_64": {"pc.ram", "pc.bios"}, "aarch64": {"mach-virt.ram"}}
    assert names >= expected[architecture.name]
