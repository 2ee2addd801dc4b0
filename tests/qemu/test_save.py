# SPDX-License-Identifier: LGPL-2.1-or-later
"""`save` of real guests: what the file holds, and that the guest is left as found."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import qemu_pagesaver
from qemu_pagesaver import capture, disks, errors
from qemu_pagesaver.save import SaveResult, save_async
from qemu_pagesaver.snapshot import Snapshot
from tests.conftest import Vms
from tests.support import pattern
from tests.support.pattern import ARENA, CONTROL, PAGE, Control, content
from tests.support.qemus import Qemu
from tests.support.vm import Vm

save_module = sys.modules[save_async.__module__]

FILLED = (
    ("data", 0, 3000),
    ("dup", 3000, 400),
    ("unit:8:0123456789abcdef", 3400, 100),
    ("unit:1:5a", 3500, 50),
    ("text", 3550, 200),
)
SPIN = (4000, 2000)


class Watch:
    """A Report that keeps all it is told; DO is called at the first of STAGE."""

    def __init__(self, stage: str = "", do: Callable[[], None] | None = None) -> None:
        self.events: list[str] = []
        self.notes: list[str] = []
        self.stages: list[str] = []
        self._stage = stage
        self._do = do

    def event(self, name: str, **_: object) -> None:
        self.events.append(name)

    def progress(self, stage: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        self.stages.append(stage)
        if stage == self._stage and self._do is not None:
            do, self._do = self._do, None
            do()

    def note(self, text: str) -> None:
        self.notes.append(text)

    def detail(self, text: str) -> None:
        pass


def fill(vm: Vm, seed: int = 7) -> None:
    for kind, first, count in FILLED:
        vm.pattern.fill(seed, first, count, kind)


def settings(vm: Vm) -> object:
    return (
        vm.qmp.command("query-migrate-capabilities"),
        vm.qmp.command("query-migrate-parameters"),
    )


def status(vm: Vm) -> str:
    answer = vm.qmp.command("query-status")
    return str(answer["status"])


def runs_on(vm: Vm) -> None:
    """The guest counts, and its counters are consistent."""
    before = vm.pattern.count()
    deadline = time.monotonic() + 20
    while vm.pattern.count() == before:
        assert time.monotonic() < deadline, "the guest does not run"
    vm.pattern.spin_check()


@contextmanager
def untouched(vm: Vm, directory: Path) -> Iterator[None]:
    """Whatever happens inside, the guest and the directory are as before."""
    state, found, files = status(vm), settings(vm), sorted(directory.iterdir())
    yield
    wait_for(lambda: status(vm) == state)
    assert settings(vm) == found
    assert sorted(directory.iterdir()) == files
    if state == "running":
        runs_on(vm)


def wait_for(condition: Callable[[], bool], deadline: float = 30) -> None:
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.01)


def has_memory_by_formula(
    snapshot: Snapshot, seed: int = 7, spin: tuple[int, int] | None = SPIN
) -> Control:
    """Check every page of the arena, the spinning ones for their very instant."""
    image = snapshot.image
    ram = next(block.index for block in image.ram_blocks if block.name == "pc.ram")
    pages = image.ram_blocks[ram].length // PAGE

    def page(number: int) -> bytes:
        return image.read_pages(ram, ARENA // PAGE + number, 1)

    for kind, first, count in FILLED:
        for number in range(first, first + count):
            assert page(number) == content(kind, seed, number), (kind, number)
    control = Control.parse(image.read_pages(ram, CONTROL // PAGE, 1))
    end = FILLED[-1][1] + FILLED[-1][2]
    if spin is not None:
        for number in range(spin[0], spin[0] + spin[1]):
            assert control.counter_is_right(number, page(number)), number
        end = sum(spin)
    # The firmware's tables are at the top.
    for number in range(end, min(end + 2000, pages - ARENA // PAGE - 256)):
        assert not any(page(number)), number
    return control


def saved(vm: Vm, path: Path, **options: Any) -> SaveResult:
    result = qemu_pagesaver.save(vm.qmp_path, path, **options)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_size == result.bytes
    return result


@pytest.fixture(params=[True, False], ids=["live", "stopped"])
def live(request: pytest.FixtureRequest) -> bool:
    """Whether it may be live; where QEMU misses writes it will not be."""
    return bool(request.param)


@pytest.fixture
def spinning_vm(pattern_vm: Vm) -> Vm:
    fill(pattern_vm)
    pattern_vm.pattern.nonce = "c0ffee"
    pattern_vm.pattern.spin_on(*SPIN)
    return pattern_vm


# ------------------------------------------------------- the guest goes on


def test_running_guest(spinning_vm: Vm, disk_path: Path, live: bool) -> None:
    vm = spinning_vm
    found = settings(vm)
    watch = Watch()
    result = saved(vm, disk_path / "a.psnap", live=live, report=watch)
    assert watch.events == ["started", "running", "complete"]
    assert {"capture", "write"} <= set(watch.stages)
    assert status(vm) == "running"
    assert settings(vm) == found
    runs_on(vm)
    for kind, first, count in FILLED:
        vm.pattern.check(7, first, count, kind)
    assert 0 < result.downtime < 30
    assert result.downtime < result.duration
    with qemu_pagesaver.open(disk_path / "a.psnap") as snapshot:
        control = has_memory_by_formula(snapshot)
        assert (control.nonce, control.spinning) == ("c0ffee", True)
        assert control.total <= vm.pattern.count()
        meta = snapshot.meta
        assert meta.run_state == "running"
        assert meta.pause == result.downtime
        assert meta.qemu_version is not None
        assert meta.qemu_version.startswith(vm.qemu.version)
        assert meta.machine == snapshot.machine == f"pc-i440fx-{vm.qemu.version}"
        assert meta.architecture == "x86_64"
        assert meta.qemu_binary == "qemu-system-x86_64"
        assert list(meta.command_line or ()) == vm.arguments()
        assert meta.capabilities == ()
        assert meta.hotplugged == ()
        assert snapshot.uuid == result.uuid
        state = next(d for d in snapshot.devices if d.name == "globalstate")
        assert b"running" in state.data
        info = snapshot.info
        assert info.pages_zero == result.pages.zero
        assert info.pages_fill == result.pages.fill
        assert info.canonical_pages == result.pages.data
        assert info.pages_data == result.pages.data + result.pages.shared
        assert info.pages_absent == 0
        assert result.pages.fill >= 150
        assert result.pages.shared >= 400 - pattern.DUP_PERIOD


def test_again_and_again(spinning_vm: Vm, disk_path: Path) -> None:
    totals = []
    for number in range(4):
        path = disk_path / f"{number}.psnap"
        saved(spinning_vm, path, compression="none" if number % 2 else "zstd:1")
        with qemu_pagesaver.open(path) as snapshot:
            totals.append(has_memory_by_formula(snapshot).total)
        runs_on(spinning_vm)
    assert totals == sorted(set(totals))


def test_guest_that_writes_as_fast_as_it_can(
    qemu: Qemu, vms: Vms, disk_path: Path, live: bool
) -> None:
    """A live capture ends, whatever the guest does meanwhile."""
    vm = vms.start(Vm(qemu, "pattern", memory=512))
    fill(vm)
    spin = (4000, vm.pattern.pages() - 4000)
    vm.pattern.spin_on(*spin)
    result = saved(vm, disk_path / "a.psnap", compression="none", live=live)
    runs_on(vm)
    with qemu_pagesaver.open(disk_path / "a.psnap") as snapshot:
        has_memory_by_formula(snapshot, spin=spin)
    assert result.downtime < 10


def test_qemu_that_looks_for_writes_too_early(
    newest_qemu: Qemu, vms: Vms, disk_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What TCG may have missed is not relied on: the guest is captured stopped."""
    vm = vms.start(Vm(newest_qemu, "pattern", memory=768))
    fill(vm)
    vm.pattern.fill(1, 10_000, 120_000)
    vm.pattern.spin_on(*SPIN)
    found = settings(vm)
    set_up = capture._parameters
    monkeypatch.setattr(capture, "_parameters", lambda p, **_: set_up(p, once=False))
    attempts = []
    real = save_module.capture

    async def counted(*args: object, live: bool, **more: object) -> object:
        attempts.append(live)
        return await real(*args, live=live, **more)

    monkeypatch.setattr(save_module, "capture", counted)
    saved(vm, disk_path / "a.psnap")
    assert attempts == [True, False]
    assert settings(vm) == found
    runs_on(vm)
    with qemu_pagesaver.open(disk_path / "a.psnap") as snapshot:
        has_memory_by_formula(snapshot)


def test_paused_guest_stays_paused(spinning_vm: Vm, disk_path: Path) -> None:
    vm = spinning_vm
    vm.qmp.command("stop")
    found = settings(vm)
    memory = vm.physical_memory(1 << 20, 127 << 20)
    result = saved(vm, disk_path / "1.psnap")
    assert result.downtime == 0
    assert result.run_state == "paused"
    assert settings(vm) == found
    if vm.qemu.version == "7.2":
        # It can run, but it cannot be saved again before: this QEMU's own limit.
        assert status(vm) == "postmigrate"
        with pytest.raises(errors.GuestBusy, match="postmigrate") as caught:
            saved(vm, disk_path / "2.psnap")
        assert "cont" in caught.value.hint
        assert not (disk_path / "2.psnap").exists()
    else:
        assert status(vm) == "paused"
        saved(vm, disk_path / "2.psnap")
        assert status(vm) == "paused"
        assert settings(vm) == found
    assert vm.physical_memory(1 << 20, 127 << 20) == memory
    for path in disk_path.iterdir():
        with qemu_pagesaver.open(path) as snapshot:
            ram = next(b for b in snapshot.image.ram_blocks if b.name == "pc.ram")
            assert snapshot.image.read_pages(ram.index, 256, 127 * 256) == memory
            assert snapshot.meta.run_state == "paused"
    vm.qmp.command("cont")
    runs_on(vm)
    saved(vm, disk_path / "3.psnap")
    runs_on(vm)


def test_quit(spinning_vm: Vm, disk_path: Path) -> None:
    vm = spinning_vm
    result = saved(vm, disk_path / "a.psnap", quit=True)
    assert vm.wait() == 0
    assert result.run_state == "running"
    with qemu_pagesaver.open(disk_path / "a.psnap") as snapshot:
        has_memory_by_formula(snapshot)
        assert snapshot.meta.run_state == "running"
        state = next(d for d in snapshot.devices if d.name == "globalstate")
        assert b"running" in state.data


def test_stock_qemu_runs_it(
    spinning_vm: Vm, vms: Vms, disk_path: Path, live: bool
) -> None:
    """What was captured is a whole migration: QEMU itself takes it."""
    saved(spinning_vm, disk_path / "a.psnap", live=live)
    from qemu_pagesaver.convert import convert

    convert(disk_path / "a.psnap", disk_path / "stream", to="stream")
    other = vms.start(Vm(spinning_vm.qemu, "pattern", incoming=True))
    other.load_stream(disk_path / "stream")
    assert status(other) == "running"
    for kind, first, count in FILLED:
        other.pattern.check(7, first, count, kind)
    assert other.pattern.nonce == "c0ffee"
    runs_on(other)


# ------------------------------------------------------------------- disks


def drive(qemu: Qemu, directory: Path) -> tuple[Path, list[str]]:
    path = directory / "disk.qcow2"
    create = [str(qemu.img), "create", "-q", "-f", "qcow2", str(path), "16M"]
    subprocess.run(create, check=True)
    options = f"file={path},format=qcow2,if=none,id=disk0"
    return path, ["-drive", options, "-device", "virtio-blk-pci,drive=disk0,id=blk0"]


def disk_of(vm: Vm) -> str:
    found = vm.qmp.command("query-block")
    return str(next(d["inserted"]["file"] for d in found if d["device"] == "disk0"))


@pytest.fixture
def disk_vm(qemu: Qemu, vms: Vms, disk_path: Path) -> Vm:
    (disk_path / "disks").mkdir()
    (disk_path / "out").mkdir()
    _, arguments = drive(qemu, disk_path / "disks")
    vm = vms.start(Vm(qemu, "pattern", extra=arguments))
    fill(vm)
    vm.pattern.spin_on(*SPIN)
    return vm


def recorded_disks(path: Path) -> list[disks.Disk]:
    with qemu_pagesaver.open(path) as snapshot:
        return disks.from_documents(list(snapshot.meta.disks))


def test_disks_need_a_choice(disk_vm: Vm, disk_path: Path) -> None:
    out = disk_path / "out"
    with untouched(disk_vm, out), pytest.raises(errors.DisksChoiceNeeded) as caught:
        saved(disk_vm, out / "a.psnap")
    assert "disk.qcow2" in caught.value.message
    for word in ("overlay", "check", "none"):
        assert word in caught.value.hint


def test_disks_overlay(disk_vm: Vm, disk_path: Path, live: bool) -> None:
    out = disk_path / "out"
    base = disk_of(disk_vm)
    result = saved(disk_vm, out / "a.psnap", disks="overlay", live=live)
    assert result.pause.overlay > 0
    overlay = disk_of(disk_vm)
    assert overlay != base
    assert Path(overlay).exists()
    runs_on(disk_vm)
    # What the guest writes from now on goes elsewhere.
    command = 'qemu-io disk0 "write -P 7 0 1M"'
    if disk_vm.qmp.hmp(command):
        node = disk_vm.qmp.command("query-block")[0]["inserted"]["node-name"]
        disk_vm.qmp.hmp(f'qemu-io {node} "write -P 7 0 1M"')
    found = recorded_disks(out / "a.psnap")
    assert [disk.mode for disk in found] == ["overlay"]
    assert found[0].filename == base
    disks.check_unchanged(found)
    with qemu_pagesaver.open(out / "a.psnap") as snapshot:
        has_memory_by_formula(snapshot)
    # Again, over the overlay.
    saved(disk_vm, out / "b.psnap", disks="overlay", live=live)
    assert recorded_disks(out / "b.psnap")[0].filename == overlay


def test_disks_check_of_a_paused_guest(disk_vm: Vm, disk_path: Path) -> None:
    out = disk_path / "out"
    disk_vm.qmp.command("stop")
    saved(disk_vm, out / "a.psnap", disks="check")
    disks.check_unchanged(recorded_disks(out / "a.psnap"))
    disk_vm.qmp.command("cont")
    runs_on(disk_vm)


def test_disks_check_with_quit_is_the_default(disk_vm: Vm, disk_path: Path) -> None:
    out = disk_path / "out"
    saved(disk_vm, out / "a.psnap", quit=True)
    disk_vm.wait()
    found = recorded_disks(out / "a.psnap")
    assert [disk.mode for disk in found] == ["check"]
    disks.check_unchanged(found)
    with Path(found[0].filename).open("r+b") as file:
        file.seek(100)
        file.write(b"changed")
    with pytest.raises(errors.DisksChanged, match=r"disk\.qcow2"):
        disks.check_unchanged(found)


@pytest.mark.parametrize("stage", ["capture", "write"])
def test_overlays_are_undone(disk_vm: Vm, disk_path: Path, stage: str) -> None:
    base, out = disk_of(disk_vm), disk_path / "out"
    files = sorted((disk_path / "disks").iterdir())
    with untouched(disk_vm, out):
        cancelled_at(disk_vm, out / "a.psnap", stage, disks="overlay")
    assert disk_of(disk_vm) == base
    assert sorted((disk_path / "disks").iterdir()) == files


# --------------------------------------------------------- what is refused


def test_target_exists(spinning_vm: Vm, disk_path: Path) -> None:
    path = disk_path / "a.psnap"
    path.write_text("older")
    with untouched(spinning_vm, disk_path), pytest.raises(errors.TargetExists):
        saved(spinning_vm, path)
    assert path.read_text() == "older"


def test_target_made_meanwhile(spinning_vm: Vm, disk_path: Path) -> None:
    path = disk_path / "a.psnap"
    watch = Watch("write", lambda: void(path.write_text("another's")))
    with pytest.raises(errors.TargetExists):
        saved(spinning_vm, path, report=watch)
    assert path.read_text() == "another's"
    assert list(disk_path.iterdir()) == [path]
    runs_on(spinning_vm)


def void(_: object) -> None:
    pass


def test_no_directory(spinning_vm: Vm, disk_path: Path) -> None:
    with untouched(spinning_vm, disk_path), pytest.raises(errors.IoError):
        saved(spinning_vm, disk_path / "no" / "a.psnap")
    with untouched(spinning_vm, disk_path), pytest.raises(errors.IoError):
        saved(spinning_vm, disk_path / "a.psnap", spool_dir=disk_path / "no")


@pytest.mark.parametrize(
    "options",
    [{"compression": "lz4"}, {"pages_per_block": 3}, {"disks": "all"}, {"pid": 1}],
    ids=str,
)
def test_used_wrongly(
    spinning_vm: Vm, disk_path: Path, options: dict[str, Any]
) -> None:
    with untouched(spinning_vm, disk_path), pytest.raises(errors.UsageError):
        saved(spinning_vm, disk_path / "a.psnap", **options)


def test_pid_of_another_qemu(spinning_vm: Vm, vms: Vms, disk_path: Path) -> None:
    other = vms.start(Vm(spinning_vm.qemu, "pattern", memory=32))
    no_such = pytest.raises(errors.UsageError, match="does not have the QMP socket")
    with untouched(spinning_vm, disk_path), no_such:
        saved(spinning_vm, disk_path / "a.psnap", pid=other.pid)
    saved(spinning_vm, disk_path / "a.psnap", pid=spinning_vm.pid)


def test_device_that_cannot_migrate(qemu: Qemu, vms: Vms, disk_path: Path) -> None:
    extra = [
        *("-blockdev", "driver=null-co,node-name=null,size=1048576"),
        *("-device", "nvme,drive=null,serial=1"),
    ]
    vm = vms.start(Vm(qemu, "pattern", extra=extra))
    vm.pattern.spin_on(*SPIN)
    with untouched(vm, disk_path), pytest.raises(errors.QemuRefused, match="nvme"):
        saved(vm, disk_path / "a.psnap", disks="none")


def test_migration_under_way(spinning_vm: Vm, disk_path: Path) -> None:
    vm = spinning_vm
    vm.qmp.command("migrate-set-parameters", max_bandwidth=1 << 20)
    vm.qmp.command("migrate", uri="exec:cat > /dev/null")
    with pytest.raises(errors.GuestBusy, match="under way"):
        saved(vm, disk_path / "a.psnap")
    vm.qmp.command("migrate_cancel")
    vm.qmp.wait_migration("cancelled")
    saved(vm, disk_path / "a.psnap")
    runs_on(vm)


def test_incoming_guest(qemu: Qemu, vms: Vms, disk_path: Path) -> None:
    vm = vms.start(Vm(qemu, "pattern", incoming=True))
    with pytest.raises(errors.GuestBusy, match="inmigrate"):
        saved(vm, disk_path / "a.psnap")


def test_another_qmp_client(qemu: Qemu, vms: Vms, disk_path: Path) -> None:
    vm = vms.start(Vm(qemu, "pattern", own_monitor=False))
    vm.pattern.spin_on(*SPIN)
    with untouched(vm, disk_path), pytest.raises(errors.QmpUnreachable) as caught:
        saved(vm, disk_path / "a.psnap")
    assert "another client" in caught.value.message


def test_two_saves_at_once(qemu: Qemu, vms: Vms, disk_path: Path) -> None:
    """One of them is refused, and does not disturb the other."""
    vm = vms.start(Vm(qemu, "pattern", memory=768))
    fill(vm)
    vm.pattern.fill(1, 10_000, 120_000)
    vm.pattern.spin_on(*SPIN)
    found = settings(vm)
    refused: list[BaseException] = []

    def second() -> None:
        vm._disconnect()
        try:
            qemu_pagesaver.save(vm.own_qmp_path, disk_path / "b.psnap")
        except errors.PagesaverError as error:
            refused.append(error)

    thread = threading.Thread(target=second)
    saved(vm, disk_path / "a.psnap", report=Watch("capture", thread.start))
    thread.join()
    assert [type(error) for error in refused] == [errors.GuestBusy]
    assert list(disk_path.iterdir()) == [disk_path / "a.psnap"]
    assert settings(vm) == found
    with qemu_pagesaver.open(disk_path / "a.psnap") as snapshot:
        has_memory_by_formula(snapshot)


def test_hotplugged_device_is_named(spinning_vm: Vm, disk_path: Path) -> None:
    spinning_vm.qmp.command("device_add", driver="virtio-rng-pci", id="late")
    watch = Watch()
    saved(spinning_vm, disk_path / "a.psnap", report=watch)
    assert any("late" in note for note in watch.notes)
    with qemu_pagesaver.open(disk_path / "a.psnap") as snapshot:
        assert snapshot.meta.hotplugged == ({"id": "late", "driver": "virtio-rng-pci"},)


# ------------------------------------------------------------- interrupted


def cancelled_at(vm: Vm, path: Path, stage: str, **options: Any) -> None:
    """Cancel a save as Ctrl-C does, when it comes to STAGE."""

    async def main() -> None:
        task: asyncio.Task[SaveResult]

        def twice() -> None:
            task.cancel()
            asyncio.get_running_loop().call_later(0.001, task.cancel)

        watch = Watch(stage, twice)
        task = asyncio.create_task(
            qemu_pagesaver.save_async(vm.qmp_path, path, report=watch, **options)
        )
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())


@pytest.fixture
def big_vm(qemu: Qemu, vms: Vms) -> Vm:
    """Enough to be caught at work on it."""
    vm = vms.start(Vm(qemu, "pattern", memory=768))
    fill(vm)
    vm.pattern.fill(1, 10_000, 120_000)
    vm.pattern.spin_on(*SPIN)
    return vm


@pytest.mark.parametrize("quitting", [False, True], ids=["", "quit"])
@pytest.mark.parametrize("stage", ["capture", "write"])
def test_cancelled(big_vm: Vm, disk_path: Path, stage: str, quitting: bool) -> None:
    with untouched(big_vm, disk_path):
        cancelled_at(big_vm, disk_path / "a.psnap", stage, quit=quitting)
    saved(big_vm, disk_path / "b.psnap")


def test_cancelled_while_paused(big_vm: Vm, disk_path: Path) -> None:
    big_vm.qmp.command("stop")
    with untouched(big_vm, disk_path):
        cancelled_at(big_vm, disk_path / "a.psnap", "capture")
    saved(big_vm, disk_path / "b.psnap")
    big_vm.qmp.command("cont")
    runs_on(big_vm)


def command(vm: Vm, path: Path, *more: str) -> list[str]:
    program = Path(sys.executable).with_name("qemu-pagesaver")
    return [str(program), "save", "--qmp", str(vm.qmp_path), "-o", str(path), *more]


def started(vm: Vm, path: Path, stage: str, *more: str) -> subprocess.Popen[bytes]:
    """Start the program; it is at STAGE when this returns."""
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [*command(vm, path, *more), "--status-fd", str(writer)],
        pass_fds=[writer],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    os.close(writer)
    with os.fdopen(reader) as events:
        for line in events:
            event = json.loads(line)
            if event.get("stage") == stage:
                return process
    raise AssertionError(process.communicate())


@pytest.mark.parametrize("stage", ["capture", "write"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_signals(
    big_vm: Vm, disk_path: Path, stage: str, number: signal.Signals
) -> None:
    with untouched(big_vm, disk_path):
        process = started(big_vm, disk_path / "a.psnap", stage)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == (130 if number == signal.SIGINT else 143)
        assert b"Traceback" not in said
        assert said.count(b"\n") <= 2


@pytest.mark.parametrize("stage", ["capture", "write"])
def test_killed(big_vm: Vm, disk_path: Path, stage: str) -> None:
    """Nobody is there to clean up: no file is left, and no harm done."""
    files = sorted(disk_path.iterdir())
    process = started(big_vm, disk_path / "a.psnap", stage)
    process.kill()
    process.communicate()
    if stage == "capture" and big_vm.qemu.version == "7.2":
        wait_for(lambda: status(big_vm) in {"paused", "postmigrate"})
        big_vm.qmp.command("cont")
    wait_for(lambda: status(big_vm) == "running")
    runs_on(big_vm)
    assert sorted(disk_path.iterdir()) == files
    saved(big_vm, disk_path / "b.psnap")


def test_json_document(spinning_vm: Vm, disk_path: Path) -> None:
    path = disk_path / "a.psnap"
    arguments = command(spinning_vm, path, "--json", "-q")
    done = subprocess.run(arguments, capture_output=True, check=True)
    document = json.loads(done.stdout)
    assert done.stderr == b""
    assert document["snapshot"] == str(path)
    assert document["bytes"] == path.stat().st_size
    assert set(document["pages"]) == {"zero", "fill", "data", "shared"}
    assert 0 < document["downtime"] < document["duration"]
    again = subprocess.run(arguments, capture_output=True, check=False)
    assert again.returncode == errors.TargetExists.exit_code
    assert json.loads(again.stderr)["error"] == "target-exists"


# -------------------------------------------------- QEMU dies, QEMU hangs


@pytest.mark.parametrize("stage", ["capture", "write"])
def test_qemu_is_killed(big_vm: Vm, disk_path: Path, stage: str) -> None:
    watch = Watch(stage, lambda: os.kill(big_vm.pid, signal.SIGKILL))
    begin = time.monotonic()
    if stage == "capture":
        with pytest.raises(errors.QemuDied):
            saved(big_vm, disk_path / "a.psnap", report=watch)
        assert not list(disk_path.iterdir())
    else:
        # All of it was captured: the file is worth all the more.
        saved(big_vm, disk_path / "a.psnap", report=watch)
        with qemu_pagesaver.open(disk_path / "a.psnap") as snapshot:
            has_memory_by_formula(snapshot)
    assert time.monotonic() - begin < 60


def test_qemu_hangs(
    big_vm: Vm, disk_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "_STALL", 1.0)
    monkeypatch.setattr(capture, "_COMMAND_DEADLINE", 0.5)
    watch = Watch("capture", lambda: os.kill(big_vm.pid, signal.SIGSTOP))
    with pytest.raises(errors.QemuTimeout):
        saved(big_vm, disk_path / "a.psnap", report=watch)
    assert not list(disk_path.iterdir())
    # Nobody can ask it to go on while it hangs; the user is told how to.
    assert any("`cont`" in note for note in watch.notes)
    os.kill(big_vm.pid, signal.SIGCONT)
    wait_for(lambda: status(big_vm) in {"running", "paused", "postmigrate"})
    if status(big_vm) != "running":
        big_vm.qmp.command("cont")
    runs_on(big_vm)
    saved(big_vm, disk_path / "b.psnap")


def test_guest_powers_off_meanwhile(big_vm: Vm, disk_path: Path) -> None:
    watch = Watch("capture", lambda: void(big_vm.qmp.command("quit")))
    with pytest.raises((errors.QemuDied, errors.MigrationFailed)):
        saved(big_vm, disk_path / "a.psnap", report=watch)
    assert not list(disk_path.iterdir())


def test_somebody_cancels_the_migration(big_vm: Vm, disk_path: Path) -> None:
    def cancel() -> None:
        big_vm.qmp.command("migrate_cancel")

    with untouched(big_vm, disk_path), pytest.raises(errors.MigrationFailed):
        saved(big_vm, disk_path / "a.psnap", report=Watch("capture", cancel))


# ---------------------------------------------------------------- disk full


@pytest.fixture
def small_disk(disk_path: Path) -> Iterator[Path]:
    """A file system of 32 MiB."""
    place = disk_path / "small"
    place.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m,huge=never", "tmpfs", str(place)],
        check=False,
        capture_output=True,
    )
    if done.returncode != 0:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_spool_is_full(
    big_vm: Vm, disk_path: Path, small_disk: Path, live: bool
) -> None:
    with untouched(big_vm, disk_path), pytest.raises(errors.DiskFull):
        saved(big_vm, disk_path / "a.psnap", spool_dir=small_disk, live=live)


@pytest.mark.parametrize("quitting", [False, True], ids=["", "quit"])
def test_target_is_full(
    big_vm: Vm, disk_path: Path, small_disk: Path, quitting: bool
) -> None:
    with untouched(big_vm, small_disk), pytest.raises(errors.DiskFull, match="small"):
        saved(big_vm, small_disk / "a.psnap", spool_dir=disk_path, quit=quitting)


def test_spool_in_memory_only_if_named(spinning_vm: Vm, small_disk: Path) -> None:
    # Without a name the spool goes to a disk, and so this fits.
    spinning_vm.pattern.spin_off()
    spinning_vm.pattern.spin_on(4000, 10)
    saved(spinning_vm, small_disk / "a.psnap")
