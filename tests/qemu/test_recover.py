# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pager is killed, or finds damage: the guest waits and is brought on."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import qemu_pagesaver
from tests.conftest import Vms
from tests.support import qemus
from tests.support.console import ShellConsole
from tests.support.qemus import Qemu
from tests.support.qmp import Qmp
from tests.support.restoring import Restoring, check, cli, fill, wait_gone
from tests.support.vm import Vm, private_directory


class Saved:
    """A snapshot, another one, and the QEMU that they are of."""

    def __init__(self, qemu: Qemu, directory: Path) -> None:
        self.qemu = qemu
        self.file = directory / "guest.psnap"
        self.other = directory / "other.psnap"
        with Vm(qemu, "pattern") as vm:
            fill(vm.start().pattern)
            for file in (self.file, self.other):
                qemu_pagesaver.save(str(vm.qmp_path), file)


@pytest.fixture(scope="module", params=qemus.VERSIONS, ids=lambda v: f"qemu-{v}")
def saved(request: pytest.FixtureRequest) -> Iterator[Saved]:
    directory = private_directory()
    yield Saved(qemus.get(request.param), directory)
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def restoring(saved: Saved, runtime: Path, disk_path: Path) -> Iterator[Restoring]:
    """A guest that runs and misses nearly all of its memory."""
    with Restoring(
        *("restore", saved.file, "--qmp", disk_path / "q"),
        *("--qemu", saved.qemu.system, "--background", "off"),
        runtime=runtime,
    ) as made:
        yield made.wait_running()


def kill_pager(restoring: Restoring) -> None:
    restoring.process.kill()
    restoring.process.wait()


def states(runtime: Path) -> list[str]:
    listed = cli("--json", "status", runtime=runtime)
    return [guest["state"] for guest in json.loads(listed.stdout)["guests"]]


def test_pager_is_killed(restoring: Restoring, saved: Saved, runtime: Path) -> None:
    restoring.console.check(7, 0, 1000)
    kill_pager(restoring)
    assert states(runtime) == ["lost"]
    # The guest goes on with what it has, and waits at the next page.
    restoring.console.check(7, 0, 1000)
    restoring.console.send("check 7 0 6000 data\n")
    arguments = (saved.file, "--attach", restoring.qmp_path, "--background", "4M")
    with Restoring("recover", *arguments, runtime=runtime) as recovering:
        received = recovering.event("running")["pages-received"]
        assert received > 1000
        check_answer(restoring)
        document = recovering.finish()
        assert document["complete"]
        assert document["time-to-running"] is None
    check(restoring.console)
    assert [x.name for x in runtime.iterdir() if "guest-" not in x.name] == []


def check_answer(restoring: Restoring) -> None:
    """The guest answers the check that it was at when its pager went."""
    match = restoring.console.expect(re.compile(r"([^\n]*)\n"), 60.0)
    assert match[1].startswith("ok"), match[1]


def test_killed_again_and_again(
    restoring: Restoring, saved: Saved, runtime: Path
) -> None:
    kill_pager(restoring)
    arguments = (saved.file, "--attach", restoring.qmp_path, "--background", "2M")
    for count in range(3):
        with Restoring("recover", *arguments, runtime=runtime) as recovering:
            recovering.event("progress")
            restoring.console.check(7, 0, 500 * (count + 1))
            kill_pager(recovering)
    found = cli("--json", "recover", *arguments[:3], runtime=runtime)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["complete"]
    check(restoring.console)


@pytest.mark.parametrize("preempt", [False, True], ids=["", "preempt"])
def test_attached_guest(
    saved: Saved, runtime: Path, vms: Vms, *, preempt: bool
) -> None:
    vm = vms.start(Vm(saved.qemu, "pattern", incoming=True))
    more = ("--preempt", "on") if preempt else ()
    arguments = (saved.file, "--attach", vm.qmp_path)
    slow = ("--background", "off", *more)
    with Restoring("restore", *arguments, *slow, runtime=runtime) as restoring:
        restoring.wait_running()
        vm.pattern.check(7, 0, 1000)
        kill_pager(restoring)
        restoring.running = None
    found = cli("--json", "recover", *arguments, runtime=runtime)
    assert found.returncode == 0, found.stderr
    check(vm.pattern)
    on = vm.qmp.command("query-migrate-capabilities")
    assert not any(x["state"] for x in on if x["capability"] == "postcopy-ram")


def test_a_guest_that_holds_up_its_qemu(
    saved: Saved, runtime: Path, restoring: Restoring
) -> None:
    """QEMU's main loop itself waits for a page: no new QMP connection works."""
    kill_pager(restoring)
    with Qmp(restoring.qmp_path) as qmp:
        # The monitor reads guest memory that is not there.
        line = b'{"execute":"human-monitor-command","arguments":'
        qmp._socket.sendall(line + b'{"command-line":"xp /4xw 0x1000000"}}\n')
        found = cli(
            *("--json", "recover", saved.file, "--attach", restoring.qmp_path),
            runtime=runtime,
        )
        assert found.returncode == 0, found.stderr
    check(restoring.console)


def test_let_go_with_a_second_interrupt(
    saved: Saved, runtime: Path, disk_path: Path
) -> None:
    arguments = ("--qemu", saved.qemu.system, "--background", "off")
    where = (saved.file, "--qmp", disk_path / "q")
    with Restoring("restore", *where, *arguments, runtime=runtime) as restoring:
        restoring.wait_running().event("progress")
        # A stopped process takes both as soon as it goes on: the second comes
        # before the rest is loaded.
        restoring.signal(signal.SIGSTOP)
        restoring.signal(signal.SIGINT)
        restoring.signal(signal.SIGTERM)
        restoring.signal(signal.SIGCONT)
        code, document, err = restoring.end()
        assert code in (130, 143), err
        if document["complete"]:
            pytest.skip("it was faster than the second signal")
        assert document["ended"] == "let-go"
        assert "recover" in err
        found = cli("recover", *where[:1], "--attach", disk_path / "q", runtime=runtime)
        assert found.returncode == 0, found.stderr
        check(restoring.console)


def test_another_snapshot_is_refused(
    restoring: Restoring, saved: Saved, runtime: Path
) -> None:
    kill_pager(restoring)
    attach = ("--attach", restoring.qmp_path)
    found = cli("recover", saved.other, *attach, runtime=runtime)
    assert found.returncode == 40
    assert "uuid" in found.stderr
    found = cli("recover", saved.file, *attach, "--from", saved.other, runtime=runtime)
    assert found.returncode == 40
    assert cli("recover", saved.file, *attach, runtime=runtime).returncode == 0
    check(restoring.console)


def test_a_damaged_block_is_never_delivered(
    saved: Saved, runtime: Path, disk_path: Path
) -> None:
    damaged = disk_path / "damaged.psnap"
    shutil.copy(saved.file, damaged)
    with damaged.open("r+b") as file:
        # Somewhere in the blocks, which begin at 4096.
        file.seek(damaged.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes((byte[0] ^ 1,)))
    with Restoring(
        *("restore", damaged, "--qmp", disk_path / "q"),
        *("--qemu", saved.qemu.system, "--background", "8M"),
        runtime=runtime,
    ) as restoring:
        restoring.wait_running()
        code, document, err = restoring.end()
        assert (code, document["error"]) == (13, "damaged"), err
        assert "--from" in document["hint"]
        assert states(runtime) == ["lost"]
        attach = ("recover", damaged, "--attach", disk_path / "q")
        # It is damaged still.
        assert cli(*attach, runtime=runtime).returncode == 13
        found = cli(*attach, "--from", saved.file, runtime=runtime)
        assert found.returncode == 0, found.stderr
        check(restoring.console)


def test_nothing_to_recover(saved: Saved, runtime: Path, vms: Vms) -> None:
    vm = vms.start(Vm(saved.qemu, "pattern"))
    attach = ("recover", saved.file, "--attach", vm.qmp_path)
    assert cli(*attach, runtime=runtime).returncode == 40
    found = cli(*attach, "--force", runtime=runtime)
    assert found.returncode == 50, found.stderr
    assert vm.qmp.command("query-status")["status"] == "running"
    found = cli("recover", saved.file, "--attach", runtime / "no", runtime=runtime)
    assert found.returncode == 20


def test_without_a_record(restoring: Restoring, saved: Saved, runtime: Path) -> None:
    kill_pager(restoring)
    for file in runtime.glob("*.json"):
        file.unlink()
    attach = ("recover", saved.file, "--attach", restoring.qmp_path)
    assert cli(*attach, runtime=runtime).returncode == 40
    found = cli(*attach, "--force", runtime=runtime)
    assert found.returncode == 0, found.stderr
    check(restoring.console)


def test_qemu_ends_after_its_pager(restoring: Restoring, runtime: Path) -> None:
    kill_pager(restoring)
    pid = restoring.pid
    restoring.kill_guest()
    wait_gone(pid)
    assert states(runtime) == []
    assert list(runtime.iterdir()) == []


def test_linux_and_its_devices(
    qemu: Qemu, vms: Vms, runtime: Path, disk_path: Path
) -> None:
    """The guest's network makes QEMU's main loop wait for a page."""
    snapshot = disk_path / "linux.psnap"
    vm = vms.start(Vm(qemu, "busybox"))
    vm.shell.run("X=kept; dd if=/dev/urandom of=/r bs=1M count=8; md5sum /r > /m")
    qemu_pagesaver.save(vm.qmp_path, snapshot)
    vm.close()
    with Restoring(
        *("restore", snapshot, "--qmp", disk_path / "q"),
        *("--qemu", qemu.system, "--background", "off"),
        runtime=runtime,
    ) as restoring:
        restoring.wait_running()
        kill_pager(restoring)
        # Its timers fire, and it wants pages that nobody brings.
        time.sleep(0.5)
        found = cli(
            *("recover", snapshot, "--attach", restoring.qmp_path), runtime=runtime
        )
        assert found.returncode == 0, found.stderr
        assert restoring.running is not None
        (serial,) = restoring.running["sockets"].values()
        shell = ShellConsole(Path(serial))
        try:
            assert shell.run("echo $X; md5sum -c /m") == "kept\n/r: OK"
            log = shell.run("dmesg")
            assert not any(word in log for word in ("BUG", "Oops", "Call Trace"))
        finally:
            shell.close()
