# SPDX-License-Identifier: LGPL-2.1-or-later
"""Streams of real QEMU to snapshots and back, run by stock QEMU again."""

from __future__ import annotations

from pathlib import Path

import pytest

import qemu_pagesaver
from qemu_pagesaver.check import check
from qemu_pagesaver.compare import compare
from qemu_pagesaver.convert import convert
from tests.conftest import Vms
from tests.support import pattern
from tests.support.pattern import content
from tests.support.qemus import Qemu
from tests.support.vm import Vm

KINDS = ("data", "text", "zero", "dup", "unit:1:5a", "unit:8:0123456789abcdef")
COUNT = 500


def fill(vm: Vm) -> None:
    vm.pattern.nonce = "5eed"
    for number, kind in enumerate(KINDS):
        vm.pattern.fill(7, COUNT * number, COUNT, kind)


def prove(vm: Vm) -> None:
    """It is that guest, with that memory."""
    assert vm.pattern.nonce == "5eed"
    for number, kind in enumerate(KINDS):
        vm.pattern.check(7, COUNT * number, COUNT, kind)


def running(vm: Vm) -> bool:
    status = vm.qmp.command("query-status")
    assert isinstance(status["running"], bool)
    return status["running"]


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_there_and_back(qemu: Qemu, vms: Vms, disk_path: Path, machine: str) -> None:
    vm = vms.start(Vm(qemu, "pattern", machine=machine))
    fill(vm)
    vm.save_stream(disk_path / "stream")
    vm.close()

    made = convert(disk_path / "stream", disk_path / "guest.psnap")
    assert made.run_state == "running"
    assert made.pages.data < made.bytes // 1024
    # Of the formula: one page of each of 16 kinds of "dup", 500 of each fill.
    assert made.pages.fill >= 2 * COUNT
    assert made.pages.shared >= COUNT - pattern.DUP_PERIOD
    assert made.bytes < (disk_path / "stream").stat().st_size
    assert check(disk_path / "guest.psnap").ok

    with qemu_pagesaver.open(disk_path / "guest.psnap") as snapshot:
        assert snapshot.machine == made.machine
        (ram,) = [b for b in snapshot.image.ram_blocks if b.name == "pc.ram"]
        for number, kind in enumerate(KINDS):
            first = pattern.physical(COUNT * number) // pattern.PAGE
            pages = snapshot.image.read_pages(ram.index, first, COUNT)
            assert pages == b"".join(
                content(kind, 7, COUNT * number + n) for n in range(COUNT)
            )

    back = convert(disk_path / "guest.psnap", disk_path / "back")
    assert back.run_state == "running"
    same = compare(disk_path / "stream", disk_path / "back")
    assert same.equal
    assert same.pages_compared > 128 << 8

    again = vms.start(Vm(qemu, "pattern", machine=machine, incoming=True))
    again.load_stream(disk_path / "back")
    assert running(again)
    prove(again)


def test_incoming_file(newest_qemu: Qemu, vms: Vms, disk_path: Path) -> None:
    """QEMU reads it itself, from 8.2 on."""
    vm = vms.start(Vm(newest_qemu, "pattern"))
    fill(vm)
    vm.save_stream(disk_path / "stream")
    vm.close()
    convert(disk_path / "stream", disk_path / "psnap", compression="none")
    convert(disk_path / "psnap", disk_path / "back")
    again = vms.start(Vm(newest_qemu, "pattern", incoming=True))
    again.qmp.command("migrate-incoming", uri=f"file:{disk_path / 'back'}")
    again.qmp.wait_migration("completed")
    prove(again)


def test_a_paused_guest_stays_paused(qemu: Qemu, vms: Vms, disk_path: Path) -> None:
    vm = vms.start(Vm(qemu, "pattern"))
    fill(vm)
    vm.qmp.command("stop")
    vm.save_stream(disk_path / "stream")
    vm.close()
    assert convert(disk_path / "stream", disk_path / "psnap").run_state == "paused"
    assert convert(disk_path / "psnap", disk_path / "back").run_state == "paused"
    again = vms.start(Vm(qemu, "pattern", incoming=True))
    again.load_stream(disk_path / "back")
    assert not running(again)
    again.qmp.command("cont")
    prove(again)


def test_pages_sent_again(qemu: Qemu, vms: Vms, disk_path: Path) -> None:
    """Saved while it writes: the last version of each page counts."""
    vm = vms.start(Vm(qemu, "pattern"))
    fill(vm)
    vm.pattern.spin_on(COUNT * len(KINDS), 2000)
    vm.save_stream(disk_path / "stream")
    vm.close()
    convert(disk_path / "stream", disk_path / "psnap")
    convert(disk_path / "psnap", disk_path / "back")
    again = vms.start(Vm(qemu, "pattern", incoming=True))
    again.load_stream(disk_path / "back")
    assert again.pattern.spin_check() > 0
    assert again.pattern.spin_off() > 0
    prove(again)


def test_linux(qemu: Qemu, vms: Vms, disk_path: Path) -> None:
    vm = vms.start(Vm(qemu, "busybox", smp=2))
    nonce = "cafe-0123"
    vm.shell.run(f"nonce={nonce}")
    vm.shell.run("head -c 20000000 /dev/urandom > /tmp/random")
    digest = vm.shell.run("sha256sum /tmp/random")
    vm.save_stream(disk_path / "stream")
    vm.close()
    convert(disk_path / "stream", disk_path / "psnap")
    convert(disk_path / "psnap", disk_path / "back")
    assert compare(disk_path / "psnap", disk_path / "back").equal
    again = vms.start(Vm(qemu, "busybox", smp=2, incoming=True))
    again.load_stream(disk_path / "back")
    assert again.shell.run("echo $nonce") == nonce
    assert again.shell.run("sha256sum /tmp/random") == digest
