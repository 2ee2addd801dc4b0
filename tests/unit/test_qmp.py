# SPDX-License-Identifier: LGPL-2.1-or-later
"""The QMP gateway and migration settings, against servers that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from qemu_pagesaver import errors
from qemu_pagesaver.migration import migration_settings, query_migrate, to_the_end
from qemu_pagesaver.qmp import Qmp

GREETING = {
    "QMP": {
        "version": {"qemu": {"major": 9, "minor": 1, "micro": 2}, "package": ""},
        "capabilities": ["oob"],
    }
}
Handler = Callable[["FakeQemu", str, dict[str, Any]], Awaitable[Any]]


class RefusedError(Exception):
    """Answer with an error."""


class FakeQemu:
    """A QMP server for one client, whose answers a test scripts.

    HANDLE gets command and arguments; what it returns is sent. By default
    every command is answered with what ANSWERS has, or {}.
    """

    def __init__(self, path: Path, handle: Handler | None = None) -> None:
        self.path = path
        self.commands: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, Any] = {}
        self._handle = handle
        self._writer: asyncio.StreamWriter | None = None

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[FakeQemu]:
        server = await asyncio.start_unix_server(self._client, self.path)
        try:
            yield self
        finally:
            self.hang_up()
            server.close()

    def send(self, message: object) -> None:
        assert self._writer is not None
        data = message if isinstance(message, bytes) else json.dumps(message).encode()
        self._writer.write(data + b"\r\n")

    def event(self, name: str, **data: object) -> None:
        stamp = {"seconds": 1000, "microseconds": 250_000}
        self.send({"event": name, "data": data, "timestamp": stamp})

    def hang_up(self) -> None:
        if self._writer is not None:
            self._writer.close()

    async def _client(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._writer = writer
        self.send(GREETING)
        # As QEMU does it: a document ends where it ends, not with a line.
        text = ""
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                text += data.decode()
                while text:
                    try:
                        message, end = json.JSONDecoder().raw_decode(text)
                    except ValueError:
                        break
                    text = text[end:].lstrip()
                    await self._answer(message)

    async def _answer(self, message: dict[str, Any]) -> None:
        command, given = message["execute"], message.get("arguments", {})
        reply: dict[str, Any] = {"id": message.get("id")}
        if command == "qmp_capabilities":
            self.send({"return": {}})
            return
        self.commands.append((command, given))
        try:
            if self._handle is not None:
                reply["return"] = await self._handle(self, command, given)
            else:
                reply["return"] = self.answers.get(command, {})
        except RefusedError as error:
            reply["error"] = {"class": "GenericError", "desc": str(error)}
        self.send(reply)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "qmp"


def test_execute_and_version(path: Path) -> None:
    async def main() -> None:
        qemu = FakeQemu(path)
        qemu.answers = {
            "query-version": GREETING["QMP"]["version"],
            "query-status": {"status": "running"},
            "query-commands": [{"name": "stop"}],
            "human-monitor-command": "a line\r\n",
        }
        async with qemu.serve(), await Qmp.connect(path) as qmp:
            assert qmp.peer_pid == os.getpid()
            assert await qmp.version() == "9.1.2"
            assert await qmp.execute("query-status") == {"status": "running"}
            assert await qmp.has_command("stop")
            assert not await qmp.has_command("go")
            assert await qmp.hmp("info") == "a line\r\n"
            assert not qmp.closed

    asyncio.run(main())


def test_refusal_is_one_sentence(path: Path) -> None:
    async def refuse(_qemu: FakeQemu, _command: str, _given: object) -> object:
        raise RefusedError("State blocked by the moon")

    async def main() -> None:
        async with FakeQemu(path, refuse).serve(), await Qmp.connect(path) as qmp:
            with pytest.raises(
                errors.QemuRefused, match="refused migrate: State blocked by the moon"
            ):
                await qmp.execute("migrate", {"uri": "fd:x"})

    asyncio.run(main())


@pytest.mark.parametrize("partial", [b"", b'{"return"'])
def test_death_while_executing(path: Path, partial: bytes) -> None:
    async def die(qemu: FakeQemu, _command: str, _given: object) -> object:
        if partial:
            assert qemu._writer is not None
            qemu._writer.write(partial)
        qemu.hang_up()
        await asyncio.sleep(10)
        return None

    async def main() -> None:
        async with FakeQemu(path, die).serve(), await Qmp.connect(path) as qmp:
            with pytest.raises((errors.QemuDied, errors.PeerNonsense)):
                await qmp.execute("stop")
            with pytest.raises(errors.QemuDied):
                await qmp.execute("cont")

    asyncio.run(main())


def test_nonsense_is_named(path: Path) -> None:
    async def babble(qemu: FakeQemu, _command: str, _given: object) -> object:
        qemu.send(b"[1, 2")
        await asyncio.sleep(10)
        return None

    async def main() -> None:
        async with FakeQemu(path, babble).serve(), await Qmp.connect(path) as qmp:
            with pytest.raises(errors.QemuError, match="qmp"):
                await qmp.execute("stop")

    asyncio.run(main())


def test_silence_times_out_and_the_connection_goes_on(path: Path) -> None:
    async def slow(_qemu: FakeQemu, command: str, _given: object) -> object:
        if command == "slow":
            await asyncio.sleep(0.3)
        return command

    async def main() -> None:
        async with FakeQemu(path, slow).serve(), await Qmp.connect(path) as qmp:
            with pytest.raises(errors.QemuTimeout, match=r"0\.05 s"):
                await qmp.execute("slow", timeout=0.05)
            # The late answer belongs to nobody, and must not be taken for this one.
            assert await qmp.execute("quick") == "quick"

    asyncio.run(main())


def test_events_in_order_with_qemus_time(path: Path) -> None:
    async def main() -> None:
        qemu = FakeQemu(path)
        async with qemu.serve(), await Qmp.connect(path) as qmp:
            async with qmp.listen(("STOP", "RESUME")) as events:
                for name in ("STOP", "OTHER", "RESUME"):
                    qemu.event(name, number=1)
                assert await events.next(timeout=1) == ("STOP", {"number": 1})
                assert events.time == 1000.25
                assert await events.next(timeout=1) == ("RESUME", {"number": 1})
                with pytest.raises(errors.QemuTimeout):
                    await events.next(timeout=0.02)
                qemu.event("STOP")
                qemu.hang_up()
                # What came before the end is not lost.
                assert (await events.next(timeout=1))[0] == "STOP"
                with pytest.raises(errors.QemuDied):
                    await events.next(timeout=1)
            await qmp.wait_closed()
            assert qmp.closed

    asyncio.run(main())


def test_cancelled_execute_leaves_the_connection_usable(path: Path) -> None:
    async def slow(_qemu: FakeQemu, command: str, _given: object) -> object:
        await asyncio.sleep(0.2 if command == "slow" else 0)
        return command

    async def main() -> None:
        async with FakeQemu(path, slow).serve(), await Qmp.connect(path) as qmp:
            task = asyncio.create_task(qmp.execute("slow"))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await qmp.execute("quick") == "quick"

    asyncio.run(main())


# ------------------------------------------------------------- connecting


def connect_fails(path: Path, match: str, deadline: float = 0.2) -> None:
    async def main() -> None:
        with pytest.raises(errors.QmpUnreachable, match=match):
            await Qmp.connect(path, timeout=deadline)

    begin = time.monotonic()
    asyncio.run(main())
    assert time.monotonic() - begin < deadline + 2


def test_absent_socket(path: Path) -> None:
    connect_fails(path, "does not exist")


def test_stale_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    connect_fails(path, "stale")


def test_regular_file(path: Path) -> None:
    path.write_text("no socket")
    connect_fails(path, "stale|refused|not")


def test_path_too_long(tmp_path: Path) -> None:
    connect_fails(tmp_path / ("x" * 200), "too long")


def test_no_greeting(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        connect_fails(path, "another client")


def test_queue_of_the_listener_is_full(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(str(path))
        listener.listen(0)
        for _ in range(3):
            other = stack.enter_context(socket.socket(socket.AF_UNIX))
            other.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                other.connect(str(path))
        connect_fails(path, "another client")


@pytest.mark.parametrize("first", [b"SSH-2.0\r\n", b"{}\r\n", b""])
def test_no_qmp_server(path: Path, first: bytes) -> None:
    async def main() -> None:
        async def client(_: object, writer: asyncio.StreamWriter) -> None:
            writer.write(first)
            writer.close()

        server = await asyncio.start_unix_server(client, path)
        try:
            with pytest.raises(errors.QmpUnreachable):
                await Qmp.connect(path, timeout=2)
        finally:
            server.close()

    asyncio.run(main())


# ------------------------------------------------------- migration settings


def settings_of(capabilities: dict[str, bool], parameters: dict[str, Any]) -> Handler:
    """A QEMU that keeps migration settings."""

    async def handle(_qemu: FakeQemu, command: str, given: dict[str, Any]) -> object:
        match command:
            case "query-migrate-capabilities":
                return [{"capability": n, "state": s} for n, s in capabilities.items()]
            case "query-migrate-parameters":
                return dict(parameters)
            case "migrate-set-capabilities":
                for entry in given["capabilities"]:
                    capabilities[entry["capability"]] = entry["state"]
            case "migrate-set-parameters":
                if given.get("downtime-limit") == 13:
                    raise RefusedError("an unlucky number")
                parameters.update(given)
            case "query-migrate":
                return {"status": "postcopy-paused", "error-desc": "gone"}
        return {}

    return handle


FOUND = {"events": False, "xbzrle": True, "multifd": False}
LIMITS = {"max-bandwidth": 128, "downtime-limit": 300}


@pytest.mark.parametrize("how", ["returns", "raises", "is cancelled"])
def test_settings_are_put_back(path: Path, how: str) -> None:
    capabilities, parameters = dict(FOUND), dict(LIMITS)

    async def use(qmp: Qmp) -> None:
        async with migration_settings(
            qmp,
            capabilities={"events": True, "xbzrle": False, "unknown": False},
            parameters={"max-bandwidth": 1 << 40, "downtime-limit": 300},
        ):
            assert capabilities == {"events": True, "xbzrle": False, "multifd": False}
            assert parameters == {"max-bandwidth": 1 << 40, "downtime-limit": 300}
            if how == "raises":
                raise errors.MigrationFailed("so it goes")
            if how == "is cancelled":
                await asyncio.sleep(10)

    async def main() -> None:
        qemu = FakeQemu(path, settings_of(capabilities, parameters))
        async with qemu.serve(), await Qmp.connect(path) as qmp:
            task = asyncio.create_task(use(qmp))
            if how == "is cancelled":
                await asyncio.sleep(0.1)
                task.cancel()
            done = await asyncio.gather(task, return_exceptions=True)
            expected = {
                "returns": type(None),
                "raises": errors.MigrationFailed,
                "is cancelled": asyncio.CancelledError,
            }
            assert isinstance(done[0], expected[how])
            # Only what differed was touched.
            sets = [given for name, given in qemu.commands if "set-param" in name]
            assert sets == [{"max-bandwidth": 1 << 40}, {"max-bandwidth": 128}]

    asyncio.run(main())
    assert capabilities == FOUND
    assert parameters == LIMITS


def test_refused_settings_are_put_back(path: Path) -> None:
    capabilities, parameters = dict(FOUND), dict(LIMITS)

    async def main() -> None:
        qemu = FakeQemu(path, settings_of(capabilities, parameters))
        async with qemu.serve(), await Qmp.connect(path) as qmp:
            with pytest.raises(errors.QemuRefused, match="unlucky"):
                async with migration_settings(
                    qmp,
                    capabilities={"events": True},
                    parameters={"downtime-limit": 13},
                ):
                    raise AssertionError("not to be reached")
            with pytest.raises(errors.QemuRefused, match="no migration capability"):
                async with migration_settings(
                    qmp, capabilities={"teleport": True}, parameters={}
                ):
                    raise AssertionError("not to be reached")

    asyncio.run(main())
    assert capabilities == FOUND


def test_query_migrate(path: Path) -> None:
    async def main() -> None:
        qemu = FakeQemu(path, settings_of({}, {}))
        async with qemu.serve(), await Qmp.connect(path) as qmp:
            migration = await query_migrate(qmp)
            assert migration.active
            assert migration.lost_source
            assert migration.error == "gone"
            assert migration.blocked_reasons == ()

    asyncio.run(main())


def test_to_the_end_survives_repeated_cancellation() -> None:
    finished = []

    async def work() -> str:
        for _ in range(5):
            await asyncio.sleep(0.02)
        finished.append(True)
        return "done"

    async def main() -> None:
        assert await to_the_end(work()) == "done"
        task = asyncio.create_task(to_the_end(work()))
        for _ in range(3):
            await asyncio.sleep(0.01)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert finished == [True, True]
