# SPDX-License-Identifier: LGPL-2.1-or-later
"""The run-time directory, locks and the control socket, with a fake guest."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qemu_pagesaver import control, errors
from qemu_pagesaver.report import Silent


@pytest.fixture(autouse=True)
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("r")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(control.RUNTIME_VARIABLE, str(path))
        yield path


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as made:
        yield made
        made.kill()


def make_record(pid: int, **more: Any) -> control.Record:
    key = control.guest_key(pid)
    values: dict[str, Any] = {
        "pid": pid,
        "started": int(key.partition("-")[2]),
        "name": "guest",
        "snapshot": "/nowhere/guest.psnap",
        "uuid": "00000000-0000-4000-8000-000000000000",
        "pager": os.getpid(),
        "since": time.time(),
        "qmp": "/nowhere/qmp",
        "control": "/nowhere/control",
        "preempt": False,
        "page_sizes": [4096],
        "capabilities": {"postcopy-ram": False},
        "directory": "",
        **more,
    }
    return control.Record(**values)


def test_directory_must_be_private(runtime: Path) -> None:
    assert control.runtime_directory() == runtime
    runtime.chmod(0o755)
    with pytest.raises(errors.IoError, match="other users"):
        control.runtime_directory()
    runtime.chmod(0o700)
    runtime.rmdir()
    runtime.symlink_to("/tmp")
    with pytest.raises(errors.IoError, match="not a directory"):
        control.runtime_directory()
    runtime.unlink()
    assert control.runtime_directory().stat().st_mode & 0o777 == 0o700


def test_directory_by_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(control.RUNTIME_VARIABLE)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert control.runtime_directory() == tmp_path / "qemu-pagesaver"


def test_one_pager_for_a_guest(process: subprocess.Popen[bytes], runtime: Path) -> None:
    with control.guest_lock(process.pid) as key:
        control.write_record(make_record(process.pid, pager=4711))
        with (
            pytest.raises(errors.GuestBusy, match="4711"),
            control.guest_lock(process.pid),
        ):
            pass
        assert [item.served for item in control.list_guests()] == [True]
    assert not (runtime / f"{key}.lock").exists()
    assert [item.served for item in control.list_guests()] == [False]
    with control.guest_lock(process.pid):
        pass


def test_the_lock_ends_with_its_process(process: subprocess.Popen[bytes]) -> None:
    code = (
        "from qemu_pagesaver import control; import sys, time\n"
        "with control.guest_lock(int(sys.argv[1])):\n"
        "    print(flush=True); time.sleep(600)"
    )
    line = [sys.executable, "-c", code, str(process.pid)]
    with subprocess.Popen(line, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(errors.GuestBusy), control.guest_lock(process.pid):
            pass
        holder.kill()
        holder.wait()
    with control.guest_lock(process.pid):
        pass


def test_nothing_stays_of_a_guest_that_ended(runtime: Path) -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        control.write_record(make_record(process.pid))
        key = control.guest_key(process.pid)
        directory = control.make_guest_directory()
        control.own_guest_directory(directory, key)
        for name in (f"{key}.lock", f"{key}.sock", "99999999-1.lock"):
            (runtime / name).touch()
        (runtime / "something-else").touch()
        assert len(control.list_guests()) == 1
        assert directory.exists()
        process.kill()
    assert control.list_guests() == []
    assert [each.name for each in runtime.iterdir()] == ["something-else"]


def test_an_abandoned_qemu_is_ended(
    runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only one that nobody will bring a guest any more, and that never ran."""
    with subprocess.Popen(["sleep", "600"]) as starter:
        starter_key = control.guest_key(starter.pid)
        with monkeypatch.context() as patch:
            patch.setattr(control, "guest_key", lambda _: starter_key)
            directories = [control.make_guest_directory() for _ in range(2)]
        line = [sys.executable, "-c", "import time; time.sleep(600)"]
        made = [
            subprocess.Popen([*line, f"path={directory}/control"])
            for directory in directories
        ]
        assert control.list_guests() == []
        assert all(each.poll() is None for each in made)
        ran = control.guest_key(made[1].pid)
        control.own_guest_directory(directories[1], ran)
        starter.kill()
    control.list_guests()
    assert made[0].wait(10) == -9
    assert made[1].poll() is None
    made[1].kill()
    made[1].wait()
    control.list_guests()
    assert list(runtime.iterdir()) == []


def test_a_record_that_nobody_wrote(
    process: subprocess.Popen[bytes], runtime: Path
) -> None:
    key = control.guest_key(process.pid)
    for text in ("", "[]", "{}", '{"pid": 1}', "\0"):
        (runtime / f"{key}.json").write_text(text)
        assert control.list_guests() == []


def test_records_of_other_versions(
    process: subprocess.Popen[bytes], runtime: Path
) -> None:
    record = make_record(process.pid)
    control.write_record(record)
    path = runtime / f"{record.key}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"news": 1}))
    assert [item.record for item in control.list_guests()] == [record]


def test_find(process: subprocess.Popen[bytes]) -> None:
    with pytest.raises(errors.NoPager):
        control.find_guest(None)
    record = make_record(process.pid)
    control.write_record(record)
    for name in (None, "guest", str(process.pid), record.snapshot, record.uuid):
        assert control.find_guest(name).record == record
    with pytest.raises(errors.NoPager, match="other"):
        control.find_guest("other")
    with subprocess.Popen(["sleep", "600"]) as another:
        control.write_record(make_record(another.pid))
        with pytest.raises(errors.UsageError, match=str(another.pid)):
            control.find_guest("guest")
        another.kill()


class FakePager:
    """A pager that loads everything when it is told to."""

    def __init__(self) -> None:
        self.left = 10
        self.rate = 0
        self.finished = asyncio.Event()

    def status(self) -> dict[str, Any]:
        return {
            "state": "serving",
            "rate": self.rate,
            "pages": {"total": 10, "left": self.left},
        }

    def server(self, key: str) -> control.ControlServer:
        def set_background(rate: int) -> None:
            self.rate = rate

        return control.ControlServer(
            key,
            status=self.status,
            finish=self.finished.set,
            set_background=set_background,
        )


class Progress(Silent):
    """Keeps the progress that was told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int]] = []

    def progress(self, stage: str, done: int, total: int) -> None:
        assert stage == "load"
        self.told.append((done, total))


async def raw(key: str, request: bytes) -> dict[str, Any]:
    path = control.runtime_directory() / f"{key}.sock"
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(request)
    document: dict[str, Any] = json.loads(await reader.readline())
    writer.close()
    await writer.wait_closed()
    return document


def test_control_socket(process: subprocess.Popen[bytes], runtime: Path) -> None:
    async def run() -> None:
        pager = FakePager()
        with control.guest_lock(process.pid) as key:
            control.write_record(make_record(process.pid))
            async with pager.server(key) as server:
                (guest,) = await control.status_async()
                assert guest["state"] == "serving"
                assert guest["pager-pid"] == os.getpid()
                await control.set_background_async("guest", 4096)
                assert pager.rate == 4096
                for nonsense in (b"\n", b"{\n", b"[]\n", b'{"command":"x"}\n'):
                    assert "error" in await raw(key, nonsense)
                assert "error" in await raw(
                    key, b'{"command":"set-background","rate":-1}\n'
                )
                report = Progress()
                finishing = asyncio.create_task(
                    control.finish_guest(process.pid, report)
                )
                await pager.finished.wait()
                assert not finishing.done()
                server.end({"complete": True})
                assert await finishing
                assert report.told[0] == (0, 40960)
        assert not (runtime / f"{key}.sock").exists()

    asyncio.run(run())


def test_pager_fails_while_it_finishes(process: subprocess.Popen[bytes]) -> None:
    async def run() -> None:
        pager = FakePager()
        with control.guest_lock(process.pid) as key:
            control.write_record(make_record(process.pid))
            async with pager.server(key):
                finishing = asyncio.create_task(control.finish_async(None, Silent()))
                await pager.finished.wait()
            with pytest.raises(errors.NoPager, match="before all was loaded"):
                await finishing

    asyncio.run(run())


def test_nobody_serves(process: subprocess.Popen[bytes]) -> None:
    async def run() -> None:
        assert not await control.finish_guest(process.pid, Silent())
        control.write_record(make_record(process.pid))
        assert not await control.finish_guest(process.pid, Silent())
        (guest,) = await control.status_async()
        assert (guest["state"], guest["pager-pid"]) == ("lost", None)
        with pytest.raises(errors.NoPager, match="is gone"):
            await control.finish_async("guest", Silent())

    asyncio.run(run())


def test_process_watch(process: subprocess.Popen[bytes]) -> None:
    async def run() -> None:
        with control.ProcessWatch(process.pid) as watch:
            assert not watch.ended()
            waiting = asyncio.create_task(watch.wait())
            await asyncio.sleep(0)
            process.kill()
            await waiting
            assert watch.ended()

    asyncio.run(run())
    process.wait()
    with pytest.raises(errors.QemuDied):
        control.ProcessWatch(process.pid)


def test_a_path_too_long() -> None:
    control.check_socket_path("/" + "x" * 106)
    with pytest.raises(errors.UsageError):
        control.check_socket_path("/" + "x" * 107)
