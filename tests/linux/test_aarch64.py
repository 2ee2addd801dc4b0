# SPDX-License-Identifier: LGPL-2.1-or-later
"""aarch64 guests, where they differ: the others are parameters of `platform`."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

import qemu_pagesaver
from qemu_pagesaver import errors
from qemu_pagesaver.host_validate import host_validate
from tests.conftest import Vms
from tests.support.console import ShellConsole
from tests.support.qemus import AARCH64, Qemu, guest_files
from tests.support.redisclient import RedisClient
from tests.support.redisguests import remember
from tests.support.restoring import Restoring, cli
from tests.support.vm import Vm, free_port

KEYS = 5000


def test_restored_as_it_was_started(
    newest_qemu: Qemu,
    vms: Vms,
    disk_path: Path,
    runtime: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No command line is given: the recorded one is of qemu-system-aarch64."""
    monkeypatch.setenv("PATH", f"{newest_qemu.bin}:{os.environ['PATH']}")
    snapshot, overlay = disk_path / "guest.psnap", disk_path / "root.qcow2"
    create = [str(newest_qemu.img), "create", "-q", "-f", "qcow2", "-F", "raw"]
    disk = guest_files("redis-arm64").disk
    subprocess.run([*create, "-b", str(disk), str(overlay)], check=True)
    vm = Vm(newest_qemu, "redis-arm64", memory=512, smp=2, writable_disk=overlay)
    vms.start(vm)
    assert vm.shell.run("uname -m; nproc") == "aarch64\n2"
    vm.shell.run("nonce=$$; echo $$ > /root/nonce; sync")
    with vm.redis() as redis:
        redis.load(KEYS)
        memory = remember(redis, vm.shell)
    found = cli("save", "--qmp", vm.qmp_path, "-o", snapshot, "--quit", runtime=runtime)
    assert found.returncode == 0, found.stderr
    vm.wait()

    document = json.loads(cli("info", "--json", snapshot, runtime=runtime).stdout)
    assert document["architecture"] == "aarch64"
    assert document["machine"].startswith("virt-")
    assert {"cpu"} <= {device["name"] for device in document["devices"]}
    found = cli("info", snapshot, "--device", "cpu", runtime=runtime)
    assert "env.xregs[30]" in found.stdout, found.stderr
    document = json.loads(cli("map", "--json", snapshot, runtime=runtime).stdout)
    places = {region["ram-block"]: region["address"] for region in document["regions"]}
    assert places["mach-virt.ram"] == 1 << 30
    found = cli("check", snapshot, runtime=runtime)
    assert found.returncode == 0, found.stderr

    port = free_port()
    forward = ("--hostfwd", f"tcp:127.0.0.1:{port}-:6379")
    arguments = (snapshot, "--qmp", disk_path / "q", *forward)
    with Restoring("restore", *arguments, runtime=runtime) as restoring:
        restoring.wait_running()
        shell = ShellConsole(restoring.serial_path)
        with RedisClient(port) as redis:
            memory.prove(redis, shell)
        assert shell.run('test "$nonce" = "$(cat /root/nonce)"; uname -m') == "aarch64"
        assert restoring.finish()["complete"]
        with RedisClient(port) as redis:
            memory.prove(redis, shell)
        shell.close()


def test_not_into_another_machine(newest_qemu: Qemu, vms: Vms, disk_path: Path) -> None:
    """Refused in a sentence, and the QEMU that waits goes on waiting."""
    snapshot = disk_path / "guest.psnap"
    vm = vms.start(Vm(newest_qemu, "busybox-arm64", paused=True))
    qemu_pagesaver.save(vm.qmp_path, snapshot)
    vm = vms.start(Vm(newest_qemu, "busybox", incoming=True))
    with pytest.raises(errors.MachineMismatch, match=r"machine virt-.* pc-i440fx"):
        qemu_pagesaver.restore(snapshot, attach=str(vm.qmp_path))
    assert vm.qmp.command("query-status")["status"] == "inmigrate"
    with pytest.raises(errors.MachineMismatch, match="unsupported machine type"):
        qemu_pagesaver.restore(
            snapshot, qmp=str(disk_path / "q"), qemu=str(newest_qemu.system)
        )


def test_host_validate(newest_qemu: Qemu) -> None:
    """On demand needs nothing of the guest's architecture."""
    binary = str(newest_qemu.system_for(AARCH64))
    found = host_validate(qemu=[binary])
    (finding,) = [f for f in found.findings if f.name == "qemu qemu-system-aarch64"]
    assert (finding.state, found.ok) == ("ok", True), finding
