# SPDX-License-Identifier: LGPL-2.1-or-later
"""Restore with real QEMUs: the guest itself proves that it is the same."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

import qemu_pagesaver
from qemu_pagesaver import errors
from tests.conftest import Vms
from tests.support import qemus
from tests.support.qemus import Qemu
from tests.support.qmp import Qmp
from tests.support.restoring import (
    NONCE,
    Restoring,
    check,
    cli,
    fill,
    is_alive,
    kill,
    wait_gone,
)
from tests.support.vm import Vm, private_directory

Start = Callable[..., Restoring]


class Saved:
    """A snapshot of the pattern guest, and the QEMU that it is of."""

    def __init__(self, qemu: Qemu, directory: Path) -> None:
        self.qemu = qemu
        self.directory = directory
        self.running = directory / "running.psnap"
        self.paused = directory / "paused.psnap"
        with Vm(qemu, "pattern") as vm:
            fill(vm.start().pattern)
            qemu_pagesaver.save(str(vm.qmp_path), self.running)
            vm.qmp.command("stop")
            qemu_pagesaver.save(str(vm.qmp_path), self.paused)


@pytest.fixture(scope="module", params=qemus.VERSIONS, ids=lambda v: f"qemu-{v}")
def saved(request: pytest.FixtureRequest) -> Iterator[Saved]:
    directory = private_directory()
    yield Saved(qemus.get(request.param), directory)
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def start(saved: Saved, runtime: Path, disk_path: Path) -> Iterator[Start]:
    """Starts a restore of the snapshot in its own QEMU."""
    started: list[Restoring] = []

    def make(
        *options: str, file: Path | None = None, command: Sequence[str] = ()
    ) -> Restoring:
        which = [] if command else ["--qemu", str(saved.qemu.system)]
        made = Restoring(
            "restore",
            *(file or saved.running, "--qmp", disk_path / "q"),
            *which,
            *options,
            runtime=runtime,
            command=command,
        )
        started.append(made)
        return made

    yield make
    for each in started:
        each.close()


def left(runtime: Path) -> list[str]:
    """What is left in the run-time directory, but for what the guest needs."""
    return [
        each.name for each in runtime.iterdir() if not each.name.startswith("guest")
    ]


def test_it_is_the_same_guest(start: Start, runtime: Path) -> None:
    restoring = start().wait_running()
    document = restoring.finish()
    check(restoring.console)
    assert document["complete"]
    assert document["pages"]["left"] == 0
    assert document["time-to-running"] < document["time-from-start"]
    assert left(runtime) == []
    with restoring.qmp() as qmp:
        states = qmp.command("query-migrate-capabilities")
        on = {item["capability"] for item in states if item["state"]}
        assert not on & {"postcopy-ram", "events", "postcopy-preempt"}
        qmp.command("quit")
    wait_gone(restoring.pid)


@pytest.mark.parametrize(
    "options",
    [
        ("--background", "off", "--prefetch", "none"),
        ("--background", "off", "--prefetch", "physical", "--prefetch-window", "63"),
        ("--background", "off", "--prefetch", "virtual"),
        ("--background", "4M", "--place", "off"),
        ("--preempt", "on"),
        ("--background", "off", "--preempt", "on"),
    ],
    ids=" ".join,
)
def test_on_demand(start: Start, runtime: Path, options: tuple[str, ...]) -> None:
    restoring = start(*options).wait_running()
    check(restoring.console)
    if options[:2] == ("--background", "off"):
        listed = cli("--json", "status", runtime=runtime)
        (guest,) = json.loads(listed.stdout)["guests"]
        assert (guest["pid"], guest["guest"]) == (restoring.pid, "pattern")
        assert cli("finish", str(restoring.pid), runtime=runtime).returncode == 0
    document = restoring.finish()
    assert document["complete"]
    assert document["faults"] > 50
    if "none" in options:
        assert document["pages-sent"]["prefetched"] == 0
    check(restoring.console)
    assert left(runtime) == []


def test_trace(start: Start, runtime: Path, disk_path: Path) -> None:
    trace = disk_path / "trace"
    restoring = start("--background", "off", "--trace", str(trace)).wait_running()
    check(restoring.console)
    assert cli("finish", str(restoring.pid), runtime=runtime).returncode == 0
    document = restoring.finish()
    data = trace.read_bytes()
    assert data[:8] == b"PSTRACE\n"
    assert struct.unpack_from("<II", data, 8) == (1, 32)
    assert data[16:32].hex() == document["uuid"].replace("-", "")
    assert trace.stat().st_mode & 0o777 == 0o600
    records = list(struct.iter_unpack("<QQIIhHBBH", data[64:]))
    assert len(records) == document["faults"]
    times = [record[0] for record in records]
    assert times == sorted(times)
    assert all(record[8] == 0 for record in records)
    # A 32-bit guest: no address spaces are known.
    assert {record[6] for record in records} <= {1, 2, 255}
    assert {record[3] for record in records} == {0xFFFF_FFFF}
    late = sum(record[7] & 1 for record in records)
    assert late == document["faults-late"]
    # It is never overwritten, and that is known before anything starts.
    code, error, _ = start("--trace", str(trace)).end()
    assert code == errors.TargetExists.exit_code
    assert str(trace) in error["message"]
    assert trace.read_bytes() == data


def test_a_guest_without_address_spaces(saved: Saved, runtime: Path) -> None:
    """Still in its firmware, 32 bits, or paging is off: said once, no error."""
    done = cli("--json", "info", str(saved.running), runtime=runtime)
    document = json.loads(done.stdout)
    assert document["neighbours"].startswith("physical: ")
    assert document["locality"]["note"]
    done = cli("--json", "map", "--spaces", str(saved.running), runtime=runtime)
    assert json.loads(done.stdout)["spaces"] == []


def test_zero_pages_are_not_sent(start: Start) -> None:
    document = start().wait_running().finish()
    sent = sum(document["pages-sent"].values())
    assert sent < document["pages"]["total"] + 100
    assert document["pages-avoided"] > 10000


def test_a_paused_guest_stays_paused(start: Start, saved: Saved) -> None:
    restoring = start(file=saved.paused).wait_running()
    assert restoring.running is not None
    assert restoring.running["paused"]
    restoring.finish()
    with restoring.qmp() as qmp:
        assert qmp.command("query-status")["status"] == "paused"
        qmp.command("cont")
    check(restoring.console)


def test_paused_on_request(start: Start) -> None:
    restoring = start("--paused").wait_running()
    with restoring.qmp() as qmp:
        assert qmp.command("query-status")["status"] == "paused"
        restoring.finish()
        qmp.command("cont")
    check(restoring.console)


def test_attach(saved: Saved, runtime: Path, vms: Vms) -> None:
    vm = vms.start(Vm(saved.qemu, "pattern", incoming=True))
    arguments = ("--attach", vm.qmp_path, "--background", "off")
    with Restoring("restore", saved.running, *arguments, runtime=runtime) as restoring:
        restoring.wait_running()
        check(vm.pattern)
        # The user's QMP socket is free while it loads.
        with Qmp(vm.qmp_path) as qmp:
            assert qmp.command("query-status")["status"] == "running"
        # A second pager is refused, by all ways.
        again = cli("restore", saved.running, *arguments, runtime=runtime)
        assert (again.returncode, "pager" in again.stderr) == (50, True), again.stderr
        recover = ("recover", saved.running, "--attach", vm.qmp_path)
        again = cli(*recover, runtime=runtime)
        assert again.returncode == 50, again.stderr
        assert cli("finish", "pattern", runtime=runtime).returncode == 0
        restoring.finish()
        restoring.running = None
    states = vm.qmp.command("query-migrate-capabilities")
    assert not any(x["state"] for x in states if x["capability"] == "postcopy-ram")
    check(vm.pattern)


def test_attach_paused(saved: Saved, runtime: Path, vms: Vms) -> None:
    vm = vms.start(Vm(saved.qemu, "pattern", incoming=True))
    found = cli("restore", saved.paused, "--attach", vm.qmp_path, runtime=runtime)
    assert found.returncode == 0, found.stderr
    assert vm.qmp.command("query-status")["status"] == "paused"
    vm.qmp.command("cont")
    check(vm.pattern)


def test_attach_to_a_guest_that_runs(saved: Saved, runtime: Path, vms: Vms) -> None:
    vm = vms.start(Vm(saved.qemu, "pattern"))
    found = cli("restore", saved.running, "--attach", vm.qmp_path, runtime=runtime)
    assert found.returncode == 50
    assert "-incoming defer" in found.stderr
    assert vm.qmp.command("query-status")["status"] == "running"


def test_wrong_memory_size(saved: Saved, runtime: Path, vms: Vms) -> None:
    vm = vms.start(Vm(saved.qemu, "pattern", incoming=True, memory=256))
    attach = ("restore", saved.running, "--attach", vm.qmp_path)
    found = cli(*attach, runtime=runtime)
    assert found.returncode == 40
    assert "pc.ram" in found.stderr
    assert "268435456" in found.stderr
    # It was told before anything began: the same QEMU still waits.
    assert vm.qmp.command("query-status")["status"] == "inmigrate"
    assert left(runtime) == []


def test_wrong_machine(saved: Saved, runtime: Path, vms: Vms) -> None:
    vm = vms.start(Vm(saved.qemu, "pattern", incoming=True, machine="q35"))
    found = cli("restore", saved.running, "--attach", vm.qmp_path, runtime=runtime)
    assert found.returncode == 40
    assert "i440fx" in found.stderr
    assert vm.alive


def test_unknown_machine(start: Start, saved: Saved) -> None:
    command = [str(saved.qemu.system), "-machine", "pc-i440fx-99.9", "-display", "none"]
    code, document, err = start(command=command).end()
    assert code == 40, err
    assert "unsupported machine type" in document["message"].lower()


def test_qemu_that_does_not_start(start: Start, saved: Saved, runtime: Path) -> None:
    command = [str(saved.qemu.system), "-no-such-option"]
    code, document, err = start(command=command).end()
    assert (code, document["error"]) == (22, "qemu-died"), err
    assert "-no-such-option" in document["message"]
    assert list(runtime.iterdir()) == []


def test_command_line_of_ones_own(start: Start, saved: Saved, disk_path: Path) -> None:
    serial = disk_path / "serial"
    command = [
        *(str(saved.qemu.system), "-machine", "pc", "-accel", "tcg", "-nodefaults"),
        *("-display", "none", "-m", "128M"),
        *("-chardev", f"socket,id=s,server=on,wait=off,path={serial}"),
        *("-serial", "chardev:s", "-kernel", str(qemus.guest_files("pattern").kernel)),
    ]
    restoring = start(command=command).wait_running()
    assert restoring.running is not None
    restoring.running["sockets"] = {"serial": str(serial)}
    restoring.finish()
    check(restoring.console)


def test_detach(saved: Saved, runtime: Path, disk_path: Path) -> None:
    status_file = disk_path / "status.json"
    found = cli(
        *("--json", "restore", saved.running, "--qmp", disk_path / "q"),
        *("--qemu", saved.qemu.system, "--background", "off", "--detach"),
        *("--status-file", status_file),
        *("--trace", os.path.relpath(disk_path / "trace")),
        runtime=runtime,
    )
    assert found.returncode == 0, found.stderr
    document = json.loads(found.stdout)
    try:
        assert (disk_path / "trace").exists()
        assert is_alive(document["pager-pid"])
        (guest,) = json.loads(cli("--json", "status", runtime=runtime).stdout)["guests"]
        assert guest["pager-pid"] == document["pager-pid"]
        finished = cli("--json", "finish", saved.running, runtime=runtime)
        assert finished.returncode == 0, finished.stderr
        assert json.loads(finished.stdout)["complete"]
        wait_gone(document["pager-pid"])
        assert json.loads(status_file.read_text())["complete"]
        assert is_alive(document["pid"])
        assert left(runtime) == []
    finally:
        kill(document["pid"])


def test_detached_failure_is_told(saved: Saved, runtime: Path, disk_path: Path) -> None:
    broken = disk_path / "broken.psnap"
    broken.write_bytes(saved.running.read_bytes()[:-1])
    found = cli("--json", "restore", broken, "--detach", runtime=runtime)
    assert found.returncode == 12, found.stderr
    assert json.loads(found.stderr)["error"] == "truncated"


def test_qemu_ends_before_all_is_loaded(start: Start, runtime: Path) -> None:
    restoring = start("--background", "off").wait_running()
    with restoring.qmp() as qmp:
        qmp.command("quit")
    code, document, err = restoring.end()
    assert code == 0, err
    assert (document["complete"], document["ended"]) == (False, "qemu-ended")
    assert list(runtime.iterdir()) == []


def test_qemu_is_killed(start: Start, runtime: Path) -> None:
    restoring = start("--background", "off").wait_running()
    kill(restoring.pid)
    code, document, err = restoring.end()
    assert (code, document["complete"]) == (22, False), err
    assert "killed by signal 9" in err
    assert list(runtime.iterdir()) == []


def test_interrupt_loads_the_rest(start: Start) -> None:
    restoring = start("--background", "off").wait_running()
    restoring.event("progress")
    restoring.signal(signal.SIGINT)
    code, document, err = restoring.end()
    assert (code, document["complete"], document["interrupted"]) == (130, True, True), (
        err
    )
    check(restoring.console)


def test_interrupt_before_it_runs(start: Start, runtime: Path, disk_path: Path) -> None:
    # A QEMU that never answers: it is ended, and nothing stays.
    script = disk_path / "qemu-system-slow"
    script.write_text("#!/bin/sh\nexec sleep 600\n")
    script.chmod(0o755)
    restoring = start(command=[str(script)])
    restoring.event("started")
    end = time.monotonic() + 20
    while not list(runtime.glob("guest-*/lifeline.in")):
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.1)
    restoring.signal(signal.SIGINT)
    code, _, err = restoring.end()
    assert code == 130, err
    assert list(runtime.iterdir()) == []
    found = subprocess.run(
        ["pgrep", "-f", f"lifeline,path={runtime}"], capture_output=True, check=False
    )
    assert found.stdout == b""


def test_qmp_socket_in_use(saved: Saved, runtime: Path, vms: Vms) -> None:
    vm = vms.start(Vm(saved.qemu, "pattern"))
    found = cli("restore", saved.running, "--qmp", vm.qmp_path, runtime=runtime)
    assert found.returncode == 32
    assert vm.alive


def test_no_userfaultfd(runtime: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        pytest.skip("everybody may use userfaultfd here")
    shutil.chown(runtime, 65534)
    code = (
        # Imported first: nobody need not be able to read the checkout.
        "import os, sys; from qemu_pagesaver.guest import userfaultfd_allowed;"
        "os.setgid(65534); os.setuid(65534); sys.exit(userfaultfd_allowed())"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_save_finishes_first(start: Start, runtime: Path, disk_path: Path) -> None:
    restoring = start("--background", "off").wait_running()
    again = disk_path / "again.psnap"
    found = cli(
        "--json", "save", "--qmp", restoring.qmp_path, "-o", again, runtime=runtime
    )
    assert found.returncode == 0, found.stderr
    assert restoring.finish()["complete"]
    first = restoring.console.nonce
    assert first == NONCE
    document = json.loads(found.stdout)
    assert document["pages"]["data"] > 6000


def test_library(saved: Saved, runtime: Path, disk_path: Path) -> None:
    before = os.environ.get("QEMU_PAGESAVER_RUNTIME_DIR")
    os.environ["QEMU_PAGESAVER_RUNTIME_DIR"] = str(runtime)
    try:
        result = qemu_pagesaver.restore(
            saved.running, qemu=str(saved.qemu.system), qmp=str(disk_path / "q")
        )
        try:
            assert result.complete
            assert result.faults >= 0
        finally:
            kill(result.pid)
    finally:
        del os.environ["QEMU_PAGESAVER_RUNTIME_DIR"]
        if before is not None:
            os.environ["QEMU_PAGESAVER_RUNTIME_DIR"] = before


def test_killed_before_the_guest_runs(start: Start, runtime: Path) -> None:
    """Whenever that is, the same command works again, and nothing is left."""
    for wait in (0.0, 0.02, 0.05, 0.1, 0.15, 0.2):
        restoring = start("--background", "off")
        restoring.event("started")
        time.sleep(wait)
        restoring.process.kill()
        restoring.process.wait()
        for record in runtime.glob("*.json"):
            # It was too late: this guest may have run.
            kill(int(record.stem.partition("-")[0]))
    restoring = start().wait_running()
    restoring.finish()
    check(restoring.console)
    restoring.kill_guest()
    assert cli("status", runtime=runtime).returncode == 0
    assert list(runtime.iterdir()) == []
    assert qemus_in(runtime) == []


def qemus_in(runtime: Path) -> list[int]:
    """QEMUs whose sockets are in this run-time directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if f"path={runtime}/".encode() in line and is_alive(int(process.name)):
            found.append(int(process.name))
    return found


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """Some 2 MiB pages for a while."""
    pool = Path("/proc/sys/vm/nr_hugepages")
    before = pool.read_text()
    try:
        pool.write_text("160")
    except OSError as error:
        qemus.lacking(f"no huge pages can be had here: {error}")
    try:
        if int(pool.read_text()) < 160:
            qemus.lacking("not enough huge pages can be had here")
        yield
    finally:
        pool.write_text(before)


@pytest.mark.usefixtures("huge_pages")
@pytest.mark.parametrize("preempt", ["off", "on"])
def test_memory_of_huge_pages(
    saved: Saved, runtime: Path, vms: Vms, preempt: str
) -> None:
    """Whole host pages at once, on demand, and after the pager was killed."""
    backend = "memory-backend-memfd,id=pc.ram,size=128M,hugetlb=on,share=off"
    vm = vms.start(
        Vm(
            saved.qemu,
            "pattern",
            incoming=True,
            machine="pc,memory-backend=pc.ram",
            extra=("-object", backend),
        )
    )
    attach = (saved.running, "--attach", vm.qmp_path)
    options = ("--background", "off", "--preempt", preempt)
    with Restoring("restore", *attach, *options, runtime=runtime) as restoring:
        restoring.wait_running()
        restoring.running = None
        vm.pattern.check(7, 0, 1000)
        restoring.process.kill()
        restoring.process.wait()
    found = cli("--json", "recover", *attach, runtime=runtime)
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["complete"]
    check(vm.pattern)


@pytest.fixture
def always_huge() -> Iterator[None]:
    """Transparent huge pages for all memory, anonymous and shared."""
    place = Path("/sys/kernel/mm/transparent_hugepage")
    before = {}
    try:
        for name in ("enabled", "shmem_enabled"):
            text = (place / name).read_text()
            before[name] = text[text.index("[") + 1 : text.index("]")]
            (place / name).write_text("always")
        yield
    except OSError as error:
        qemus.lacking(f"huge pages cannot be switched here: {error}")
    finally:
        for name, value in before.items():
            (place / name).write_text(value)


@pytest.mark.usefixtures("always_huge")
@pytest.mark.parametrize(
    "backend",
    ["memory-backend-ram,prealloc=off", "memory-backend-memfd,share=off"],
    ids=["anonymous", "shmem"],
)
def test_transparent_huge_pages(
    saved: Saved, runtime: Path, vms: Vms, backend: str
) -> None:
    """No huge page may appear around a page that was asked for."""
    vm = vms.start(
        Vm(
            saved.qemu,
            "pattern",
            incoming=True,
            machine="pc,memory-backend=pc.ram",
            extra=("-object", f"{backend},id=pc.ram,size=128M"),
        )
    )
    attach = (saved.running, "--attach", vm.qmp_path, "--prefetch", "none")
    with Restoring("restore", *attach, "--background", "2M", runtime=runtime) as made:
        made.wait_running()
        made.running = None
        check(vm.pattern)
        assert made.finish()["complete"]
    check(vm.pattern)
