# SPDX-License-Identifier: LGPL-2.1-or-later
"""The only gateway to QMP: the one importer of ``qemu.qmp``.

Every wait has a deadline, and every failure becomes an exception of
:mod:`qemu_pagesaver.errors`: a socket that nobody answers is QmpUnreachable, an
error reply QemuRefused, a connection that ends QemuDied, silence QemuTimeout.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import struct
from collections.abc import AsyncIterator, Iterable, Mapping
from os import fspath
from typing import TYPE_CHECKING, Any, Self

from qemu.qmp import (
    EventListener,
    ExecInterruptedError,
    ExecuteError,
    QMPClient,
    QMPError,
    Runstate,
    StateError,
)

from qemu_pagesaver import errors

if TYPE_CHECKING:
    from os import PathLike
    from types import TracebackType

# The library logs what we raise as well; without a handler of its own it would
# go to stderr.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())

_IN_USE_HINT = (
    "QEMU serves one client at a time: close the other one, or give QEMU a "
    "second QMP socket (-qmp unix:PATH,server=on,wait=off)."
)
_RETRY_CONNECT = 0.05


class Events:
    """Events of one QMP connection, in the order in which they came.

    Attributes:
        time: When QEMU sent the event that was returned last, in seconds of its
            wall clock; finer than what a client can measure.
    """

    def __init__(self, qmp: Qmp, listener: EventListener) -> None:
        self._qmp = qmp
        self._listener = listener
        self.time = 0.0

    async def next(self, *, timeout: float | None = None) -> tuple[str, Any]:  # noqa: ASYNC109 - a deadline of our own exception class
        """Return (name, data) of the next event.

        Raises:
            QemuDied: The connection ended.
            QemuTimeout: No event came within ``timeout`` seconds.
        """
        event = await self._qmp._or_died(
            self._listener.get(), "waiting for an event", timeout
        )
        stamp = event.get("timestamp", {})
        self.time = stamp.get("seconds", 0) + stamp.get("microseconds", 0) / 1e6
        return str(event["event"]), event.get("data", {})

    def __aiter__(self) -> AsyncIterator[tuple[str, Any]]:
        return self

    async def __anext__(self) -> tuple[str, Any]:
        return await self.next()


class Qmp:
    """One connection to a QMP server; made by :meth:`connect`.

    Attributes:
        path: The socket.
        peer_pid: Process at the other end: the one that called ``listen()``,
            which is QEMU unless a manager opened the socket for it.
    """

    def __init__(self, client: QMPClient, *, path: str, peer_pid: int) -> None:
        self._client = client
        self.path = path
        self.peer_pid = peer_pid
        self._commands: frozenset[str] | None = None
        self._closed = asyncio.get_running_loop().create_future()
        self._watch = asyncio.create_task(self._watch_connection())

    @classmethod
    async def connect(
        cls,
        path: str | PathLike[str],
        *,
        timeout: float = 10.0,  # noqa: ASYNC109 - a deadline of our own exception class
    ) -> Self:
        """Connect, wait for the greeting and negotiate.

        Raises:
            QmpUnreachable: Nothing listens there, it is no QMP server, or it
                does not greet within ``timeout`` seconds (another client).
        """
        name = fspath(path)
        client = QMPClient()
        # Nobody reads the library's own queue of all events; it would grow.
        client.events.event_filter = lambda _: False
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            async with asyncio.timeout(timeout):
                await _connect_socket(sock, name)
                pid = _peer_pid(sock)
                await client.connect(sock)
        except TimeoutError:
            sock.close()
            raise errors.QmpUnreachable(
                f"QMP socket {name}: no greeting within {timeout:g} s; another "
                "client is connected, or QEMU hangs",
                hint=_IN_USE_HINT,
            ) from None
        except OSError as error:
            sock.close()
            raise _unreachable(name, error) from error
        except QMPError as error:
            sock.close()
            raise errors.QmpUnreachable(
                f"QMP socket {name}: who answers there speaks no QMP ({error})",
                hint="Give the socket of QEMU's -qmp option.",
            ) from error
        except BaseException:
            sock.close()
            raise
        return cls(client, path=name, peer_pid=pid)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Disconnect; harmless when QEMU has gone."""
        self._watch.cancel()
        with contextlib.suppress(QMPError, OSError, EOFError):
            await self._client.disconnect()
        with contextlib.suppress(asyncio.CancelledError):
            await self._watch
        if not self._closed.done():
            self._closed.set_result(None)

    @property
    def closed(self) -> bool:
        """Whether the connection has ended."""
        return self._closed.done()

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        timeout: float = 30.0,  # noqa: ASYNC109 - a deadline of our own exception class
    ) -> Any:
        """Execute a command and return its value.

        A command that is cancelled or times out may still take effect.

        Raises:
            QemuRefused: QEMU answered with an error.
            QemuDied: The connection ended first.
            QemuTimeout: No answer within ``timeout`` seconds.
            PeerNonsense: The answer is not QMP.
        """
        doing = f"executing {command}"
        try:
            return await self._or_died(
                self._client.execute(command, arguments), doing, timeout
            )
        except ExecuteError as error:
            raise errors.QemuRefused(f"QEMU refused {command}: {error}") from error
        except (ExecInterruptedError, StateError, OSError, EOFError) as error:
            raise self._died(doing) from error
        except QMPError as error:
            raise errors.PeerNonsense(
                f"QMP socket {self.path}: nonsense in answer to {command}: {error}"
            ) from error

    async def hmp(self, line: str) -> str:
        """Run a line of the human monitor and return what it prints."""
        return str(await self.execute("human-monitor-command", {"command-line": line}))

    async def pass_fd(self, name: str, fd: int) -> None:
        """Give QEMU a duplicate of a descriptor, as ``fd:NAME`` in addresses.

        So nothing needs a path that both sides can reach. What is not used is
        forgotten with ``closefd``.

        Raises:
            QemuRefused: Something between us and QEMU lost the descriptor.
        """
        try:
            self._client.send_fd_scm(fd)
        except (StateError, OSError) as error:
            raise self._died("passing a descriptor") from error
        await self.execute("getfd", {"fdname": name})

    async def version(self) -> str:
        """Return QEMU's version, like ``10.0.2``."""
        qemu = (await self.execute("query-version"))["qemu"]
        return f"{qemu['major']}.{qemu['minor']}.{qemu['micro']}"

    async def has_command(self, name: str) -> bool:
        """Tell whether this QEMU knows a command."""
        if self._commands is None:
            known = await self.execute("query-commands")
            self._commands = frozenset(entry["name"] for entry in known)
        return name in self._commands

    @contextlib.asynccontextmanager
    async def listen(self, names: str | Iterable[str]) -> AsyncIterator[Events]:
        """Collect the named events from here on, for the time of the context."""
        listener = EventListener(names)
        with self._client.listen(listener):
            yield Events(self, listener)

    async def wait_closed(self) -> None:
        """Wait until the connection ends (QEMU has gone)."""
        await asyncio.shield(self._closed)

    async def _watch_connection(self) -> None:
        """Notice the end of the connection, which no event announces."""
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        if not self._closed.done():
            self._closed.set_result(None)

    async def _or_died(
        self,
        work: Any,
        doing: str,
        timeout: float | None,  # noqa: ASYNC109 - a deadline of our own exception class
    ) -> Any:
        """Await ``work`` until it is done, the connection ends or time is up."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait(
                {task, self._closed},
                timeout=timeout,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not task.done() and self._closed.done():
                # What came before the end is still handed out.
                await asyncio.wait({task}, timeout=0.1)
            if task.done():
                return task.result()
            if self._closed.done():
                raise self._died(doing)
            raise errors.QemuTimeout(
                f"QEMU (QMP socket {self.path}) did not answer within {timeout:g} s "
                f"when {doing}"
            )
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})

    def _died(self, doing: str) -> errors.QemuDied:
        return errors.QemuDied(
            f"QEMU (pid {self.peer_pid}) closed its QMP socket {self.path} when {doing}"
        )


async def _connect_socket(sock: socket.socket, path: str) -> None:
    """Connect a unix socket, waiting while the queue of the listener is full.

    asyncio would take the EAGAIN of a full queue for a connection under way.
    """
    sock.setblocking(False)
    while True:
        try:
            sock.connect(path)
        except BlockingIOError:
            await asyncio.sleep(_RETRY_CONNECT)
        else:
            return


def _peer_pid(sock: socket.socket) -> int:
    size = struct.calcsize("3i")
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    return int(struct.unpack("3i", raw)[0])


def _unreachable(path: str, error: OSError) -> errors.QmpUnreachable:
    if error.errno == errno.ENOENT:
        return errors.QmpUnreachable(
            f"QMP socket {path} does not exist",
            hint="Give the socket of QEMU's -qmp option; is QEMU running?",
        )
    if error.errno == errno.ECONNREFUSED:
        return errors.QmpUnreachable(
            f"QMP socket {path} is stale: no process listens on it",
            hint="QEMU has ended, or was started with another socket.",
        )
    return errors.QmpUnreachable(f"QMP socket {path}: {error.strerror or error}")
