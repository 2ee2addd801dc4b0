# SPDX-License-Identifier: LGPL-2.1-or-later
"""The QEMU that receives a guest: started by us, or found waiting.

We end only a QEMU that we started, and only before its guest ran: from then on
it is the user's.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemu_pagesaver import errors
from qemu_pagesaver.control import (
    ProcessWatch,
    absolute,
    check_socket_path,
    tidy_guest_directory,
)
from qemu_pagesaver.migration import to_the_end
from qemu_pagesaver.qmp import Qmp
from qemu_pagesaver.report import Report

LIFELINE_ID = "qemu-pagesaver-lifeline"
CONTROL_ID = "qemu-pagesaver-control"

_START_TIMEOUT = 60.0
_POLL = 0.002
_LAST_INSTANT = 0.5
_OOB_TIMEOUT = 10.0
_TAIL_LINES = 20
_END_TIMEOUT = 5.0
_SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
_USERFAULTFD_IOC_NEW = 0xAA00


# ------------------------------------------------------------- RAM blocks


@dataclass(frozen=True, kw_only=True)
class HostBlock:
    """A RAM block of a running QEMU; sizes in bytes.

    ``length`` may change up to ``length_max`` where QEMU can resize the block.
    """

    name: str
    page_size: int
    length: int
    length_max: int


_UNITS = {"B": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}
_BLOCK_LINE = re.compile(
    r"^\s*(?P<name>\S.*?)\s+(?P<size>\d+) (?P<unit>B|[KMGT]iB)"
    r"\s+0x[0-9a-f]+\s+0x(?P<used>[0-9a-f]+)\s+0x(?P<total>[0-9a-f]+)(?:\s|$)"
)


def parse_ram_blocks(text: str) -> list[HostBlock]:
    """Parse ``info ramblock``, of QEMU 7.2 (no address) as of 10.0.

    Blocks without a name cannot migrate (``qemu_ram_set_idstr`` and
    ``qemu_ram_set_migratable`` are called side by side) and are left out.
    """
    return [
        HostBlock(
            name=found["name"],
            page_size=int(found["size"]) << _UNITS[found["unit"]],
            length=int(found["used"], 16),
            length_max=int(found["total"], 16),
        )
        for line in text.splitlines()
        if (found := _BLOCK_LINE.match(line))
    ]


async def ram_blocks(qmp: Qmp) -> list[HostBlock]:
    """Ask a QEMU for its RAM blocks.

    Raises:
        PeerNonsense: It lists none.
    """
    found = parse_ram_blocks(await qmp.hmp("info ramblock"))
    if not found:
        raise errors.PeerNonsense("QEMU's `info ramblock` lists no RAM block")
    return found


# ------------------------------------------------------------- userfaultfd


def userfaultfd_allowed() -> bool:
    """Say whether this process may use userfaultfd as QEMU does.

    QEMU 8.0 and later try /dev/userfaultfd first, all of them the system call.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    number = _SYS_USERFAULTFD.get(os.uname().machine)
    if number is not None:
        fd = libc.syscall(number, os.O_CLOEXEC)
        if fd >= 0:
            os.close(fd)
            return True
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.close(fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, os.O_CLOEXEC))
    except OSError:
        return False
    finally:
        os.close(device)
    return True


# ---------------------------------------------------------------- lifeline


class Lifeline:
    """A QMP monitor on two FIFOs, which outlives who speaks on it.

    While a guest waits for a page, QEMU's main loop may wait with it (a device
    reads guest memory there). Then a new QMP connection cannot be negotiated, and
    `migrate-recover` only gets through out of band, on a connection that was.
    A connection dies with its client; a pair of FIFOs that QEMU itself holds open
    does not: negotiated once, any later pager can go on with it.

    Args:
        path: Of the FIFOs, without ``.in`` and ``.out``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def in_directory(cls, directory: Path) -> Lifeline:
        """Return that of the guest whose directory this is."""
        return cls(directory / "lifeline")

    @classmethod
    def make(cls, directory: Path) -> Lifeline:
        """Make the FIFOs."""
        made = cls.in_directory(directory)
        try:
            for name in made.files:
                os.mkfifo(name, 0o600)
        except OSError as error:
            raise errors.from_os_error(error, "make FIFO") from error
        return made

    @property
    def files(self) -> list[str]:
        """The names of both FIFOs."""
        return [f"{self.path}.in", f"{self.path}.out"]

    def arguments(self) -> list[str]:
        """Return the options that make QEMU listen."""
        path = str(self.path).replace(",", ",,")
        return [
            "-chardev",
            f"pipe,id={LIFELINE_ID},path={path}",
            "-mon",
            f"chardev={LIFELINE_ID},mode=control",
        ]

    def negotiate(self) -> Callable[[], None]:
        """Negotiate, once and for ever; before QEMU is started.

        QEMU finds the request when it opens the FIFO; nobody waits for the answer.

        Returns:
            What to call when QEMU has opened it: until then we keep it open.
        """
        request = {"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}
        # With O_RDWR neither the open nor the write needs a reader.
        fd = os.open(self.files[0], os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        os.write(fd, json.dumps(request).encode() + b"\n")
        return lambda: os.close(fd)

    async def execute_oob(
        self, command: str, arguments: dict[str, object] | None = None
    ) -> Any:
        """Execute a command out of band.

        Raises:
            QemuRefused: QEMU answered with an error.
            QemuTimeout: It did not answer.
            QmpUnreachable: The FIFOs are gone.
        """
        identity = secrets.token_hex(8)
        message: dict[str, Any] = {"exec-oob": command, "id": identity}
        if arguments:
            message["arguments"] = arguments
        line = json.dumps(message).encode() + b"\n"
        flags = os.O_NONBLOCK | os.O_CLOEXEC
        with contextlib.ExitStack() as stack:
            try:
                # QEMU holds both ends of both, so neither open waits or fails.
                answers = os.open(self.files[1], os.O_RDONLY | flags)
                stack.callback(os.close, answers)
                requests = os.open(self.files[0], os.O_WRONLY | flags)
                stack.callback(os.close, requests)
                os.write(requests, line)
            except OSError as error:
                raise errors.QmpUnreachable(
                    f"QEMU's monitor {self.path}: {error.strerror}"
                ) from error
            try:
                async with asyncio.timeout(_OOB_TIMEOUT):
                    return await self._answer(answers, identity, command)
            except TimeoutError:
                raise errors.QemuTimeout(
                    f"QEMU (monitor {self.path}) did not answer {command} within "
                    f"{_OOB_TIMEOUT:g} s"
                ) from None

    @staticmethod
    async def _answer(fd: int, identity: str, name: str) -> Any:
        """Read until the answer; events and what others left unread come first."""
        buffer = b""
        while True:
            try:
                data = os.read(fd, 1 << 16)
            except BlockingIOError:
                await asyncio.sleep(_POLL)
                continue
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                try:
                    answer = json.loads(line)
                except ValueError:
                    continue  # the end of a line that somebody began to read
                if not isinstance(answer, dict) or answer.get("id") != identity:
                    continue
                if "error" in answer:
                    text = answer["error"].get("desc", "")
                    raise errors.QemuRefused(f"QEMU refused {name}: {text}")
                return answer.get("return")


# ------------------------------------------------------------------- guest


# QEMU begins a complaint with its own name; hints on how to do better follow it.
_COMPLAINT = re.compile(r"\S*qemu\S*: (?!warning: |info: )")


class _Talk:
    """What a QEMU says on stderr: the last lines kept, all passed on."""

    def __init__(self, fd: int, report: Report) -> None:
        self._fd = fd
        self._report = report
        self._rest = b""
        self.lines: deque[str] = deque(maxlen=_TAIL_LINES)
        os.set_blocking(fd, False)
        asyncio.get_running_loop().add_reader(fd, self.read)

    def read(self) -> None:
        """Take what is there."""
        while self._fd >= 0:
            try:
                data = os.read(self._fd, 1 << 16)
            except BlockingIOError:
                return
            if not data:
                self.close()
                return
            *lines, self._rest = (self._rest + data)[-(1 << 20) :].split(b"\n")
            for line in lines:
                text = line.decode(errors="replace").strip()
                if text:
                    self.lines.append(text)
                    self._report.detail(text)

    def close(self) -> None:
        """Stop listening; QEMU ignores SIGPIPE and goes on without."""
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1


class Guest:
    """A QEMU with a QMP connection.

    Attributes:
        pid: Its process.
        qmp: The connection; of its own where we started it.
        qmp_path: Its socket.
        watch: Notices its end.
        lifeline: See :class:`Lifeline`; None where the user started it.
        directory: Where its sockets are, if we started it.
        ran: The guest has run; from then on QEMU is the user's.
    """

    def __init__(
        self,
        *,
        pid: int,
        qmp: Qmp | None,
        qmp_path: str,
        process: subprocess.Popen[bytes] | None = None,
        talk: _Talk | None = None,
        lifeline: Lifeline | None = None,
        directory: Path | None = None,
    ) -> None:
        self.pid = pid
        self.qmp_path = qmp_path
        self.watch = ProcessWatch(pid)
        self.lifeline = lifeline
        self.directory = directory
        self._qmp = qmp
        self._process = process
        self._talk = talk
        self.ran = False

    @property
    def spawned(self) -> bool:
        """Whether we started it."""
        return self._process is not None

    @property
    def qmp(self) -> Qmp:
        """The connection."""
        if self._qmp is None:
            raise errors.QmpUnreachable(f"QMP socket {self.qmp_path} is closed")
        return self._qmp

    @property
    def last_words(self) -> str:
        """The last complaint that it made on stderr; empty if not known."""
        complaints = [line for line in self.said if _COMPLAINT.match(line)]
        return (complaints or self.said or [""])[-1]

    @property
    def said(self) -> list[str]:
        """The last lines that it said on stderr."""
        if self._talk is None:
            return []
        self._talk.read()
        return list(self._talk.lines)

    def died(self, doing: str) -> errors.PagesaverError:
        """Return the error that says that it has ended, and with which words."""
        how = ""
        if self._process is not None:
            code = self._process.poll()
            if code is not None and code < 0:
                how = f", killed by {signal.Signals(-code).name}"
            elif code is not None:
                how = f" with status {code}"
        words = f": {self.last_words}" if self.last_words else ""
        message = f"QEMU (pid {self.pid}) ended{how} {doing}{words}"
        if any("unsupported machine type" in line.lower() for line in self.said):
            return errors.MachineMismatch(
                message, hint="Use the QEMU version of the save, or a later one."
            )
        return errors.QemuDied(message)

    @property
    def exit_code(self) -> int | None:
        """Exit status (negative: signal) of a QEMU of ours that has ended."""
        return None if self._process is None else self._process.poll()

    def follow(self, pid: int) -> None:
        """Take another process for QEMU: a manager had opened the QMP socket."""
        if pid not in (0, self.pid):
            watch = ProcessWatch(pid)
            self.watch.close()
            self.watch, self.pid = watch, pid

    async def disconnect(self) -> None:
        """Close the QMP connection, so that others can use it."""
        if self._qmp is not None:
            qmp, self._qmp = self._qmp, None
            await qmp.close()

    async def reconnect(self, wait: float) -> Qmp:
        """Open the QMP connection again."""
        if self._qmp is None:
            self._qmp = await Qmp.connect(self.qmp_path, timeout=wait)
        return self._qmp

    async def close(self) -> None:
        """Let go of it; a QEMU of ours whose guest never ran is ended."""
        with contextlib.suppress(errors.PagesaverError):
            await self.disconnect()
        if self._process is not None and not self.ran:
            await _end(self._process, self.watch)
        if self._process is not None and self._process.poll() is None:
            _LEFT_RUNNING.append(self._process)
        if self.directory is not None and self.watch.ended():
            shutil.rmtree(self.directory, ignore_errors=True)
        if self._talk is not None:
            self._talk.close()
        self.watch.close()

    def remove_controls(self) -> None:
        """Remove our own ways to it, which only an incomplete guest needs."""
        if self.directory is not None:
            for name in _control_files(self.directory):
                Path(name).unlink(missing_ok=True)
            tidy_guest_directory(self.directory)


def _control_files(directory: Path) -> list[str]:
    return [str(directory / "control"), *Lifeline.in_directory(directory).files]


# QEMUs that go on without us: kept, so that they are reaped once they end.
_LEFT_RUNNING: list[subprocess.Popen[bytes]] = []


def _reap() -> None:
    _LEFT_RUNNING[:] = [each for each in _LEFT_RUNNING if each.poll() is None]


async def _end(process: subprocess.Popen[bytes], watch: ProcessWatch) -> None:
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_TIMEOUT):
                await watch.wait()
        if process.poll() is None and not watch.ended():
            process.kill()
            # It may be in an uninterruptible system call; then it is not waited for.
            watch.ended(_END_TIMEOUT)
    process.poll()


@contextlib.asynccontextmanager
async def start(
    argv: Sequence[str], *, directory: Path, report: Report
) -> AsyncIterator[Guest]:
    """Start a QEMU that waits for its guest, and connect to it.

    ``-incoming defer`` is the caller's; a QMP socket and a :class:`Lifeline` of our
    own are added here. QEMU gets a session of its own, and nothing of our terminal.

    Args:
        argv: Binary and arguments.
        directory: For sockets (``control.make_guest_directory``); it is removed
            if the guest never runs.
        report: Is told what QEMU says on stderr, as details.

    Raises:
        IoError: The binary cannot be started.
        QemuDied: It ended before it answered; its last words are quoted.
        QemuTimeout: It does not answer.
    """
    _reap()
    socket_path = directory / "control"
    opened = contextlib.ExitStack()
    try:
        check_socket_path(socket_path)
        lifeline = Lifeline.make(directory)
        opened.callback(lifeline.negotiate())
        argument = str(socket_path).replace(",", ",,")
        full = [
            *argv,
            "-chardev",
            f"socket,id={CONTROL_ID},path={argument},server=on,wait=off",
            "-mon",
            f"chardev={CONTROL_ID},mode=control",
            *lifeline.arguments(),
        ]
        process, output = _spawn(full)
    except BaseException:
        opened.close()
        shutil.rmtree(directory, ignore_errors=True)
        raise
    report.detail("started: " + " ".join(full))
    guest = Guest(
        pid=process.pid,
        qmp=None,
        qmp_path=str(socket_path),
        process=process,
        talk=_Talk(output, report),
        lifeline=lifeline,
        directory=directory,
    )
    try:
        with opened:
            await _wait_for_qmp(guest)
        yield guest
    finally:
        await to_the_end(guest.close())


def _spawn(argv: Sequence[str]) -> tuple[subprocess.Popen[bytes], int]:
    """Start a program; returns it and the reading end of its stderr."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=writing,
            stderr=writing,
            start_new_session=True,
        )
    except OSError as error:
        os.close(reading)
        where = error.filename or argv[0]
        raise errors.class_for_errno(error.errno or 0)(
            f"start {where}: {error.strerror}",
            hint="Name the QEMU binary with --qemu.",
        ) from error
    finally:
        os.close(writing)
    return process, reading


async def _wait_for_qmp(guest: Guest) -> None:
    """Connect as soon as QEMU listens; notice when it ends instead."""
    deadline = time.monotonic() + _START_TIMEOUT
    ended = asyncio.ensure_future(guest.watch.wait())
    connecting = asyncio.ensure_future(_connect(guest, deadline))
    try:
        await asyncio.wait({ended, connecting}, return_when=asyncio.FIRST_COMPLETED)
        if connecting.done() and connecting.exception() is None:
            return
        # It may have closed the socket an instant before it ended.
        if await asyncio.to_thread(guest.watch.ended, _LAST_INSTANT):
            raise guest.died("when it started")
        await connecting
    finally:
        for task in (ended, connecting):
            task.cancel()
        await asyncio.gather(ended, connecting, return_exceptions=True)


async def _connect(guest: Guest, deadline: float) -> None:
    while True:
        left = deadline - time.monotonic()
        try:
            # No greeting comes while QEMU builds its machine; that is in order.
            await guest.reconnect(max(left, _POLL))
        except errors.QmpUnreachable as error:
            if left <= 0:
                raise errors.QemuTimeout(
                    f"QEMU (pid {guest.pid}) does not answer on its QMP socket after "
                    f"{_START_TIMEOUT:g} s"
                ) from error
        else:
            return
        # Not there yet; or there, but nobody listens yet.
        await asyncio.sleep(_POLL)


@contextlib.asynccontextmanager
async def attach(path: str) -> AsyncIterator[Guest]:
    """Connect to a QEMU that the user started.

    Raises:
        QmpUnreachable: There is none, or somebody else uses its QMP socket.
    """
    qmp = await Qmp.connect(path)
    try:
        guest = Guest(pid=qmp.peer_pid, qmp=qmp, qmp_path=absolute(path))
    except BaseException:
        await qmp.close()
        raise
    try:
        yield guest
    finally:
        await to_the_end(guest.close())


def listens(path: str | os.PathLike[str]) -> bool:
    """Say whether a process listens on a unix socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            sock.connect(os.fspath(path))
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True
