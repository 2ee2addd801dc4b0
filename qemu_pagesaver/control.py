# SPDX-License-Identifier: LGPL-2.1-or-later
"""Running pagers: who serves which guest, and how to speak with them.

A private run-time directory holds for each guest (``PID-STARTTIME``, so that a
pid that is used again is another guest)

- ``.lock``: held with flock() by the one pager of the guest. It is the truth:
  the kernel lets go of it however the pager ends;
- ``.json``: the record: what a later pager or ``status`` needs to know;
- ``.sock``: the control socket, JSON lines: one request, answers until
  ``return`` or ``error``;

and for each QEMU that we started a directory ``guest-STARTER-TOKEN`` (the key of the
process that started it) with the sockets that were put there. Its file ``owner`` has
QEMU's key, and appears when the guest may run from then on: without it, and without
the starter, QEMU waits for a guest that nobody brings, and is ended.

A record whose guest has ended is stale; whoever finds it removes it. A record
whose guest lives but whose lock is free belongs to a lost pager: ``recover``
needs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self, cast

from qemu_pagesaver import errors
from qemu_pagesaver.report import Report

RUNTIME_VARIABLE = "QEMU_PAGESAVER_RUNTIME_DIR"
_SUFFIXES = (".json", ".sock", ".lock")
_GUEST_PREFIX = "guest-"
_OWNER = "owner"
_KILL_TIMEOUT = 5.0
_LOCK_RETRY = 0.02
_MAX_REQUEST = 4096
_MAX_ANSWER = 1 << 20
_MAX_RECORD = 1 << 20
_SOCKET_PATH_MAX = 107
_ANSWER_TIMEOUT = 10.0
_PROGRESS_INTERVAL = 0.2


def runtime_directory() -> Path:
    """Return the private directory of running pagers, made if need be.

    ``$QEMU_PAGESAVER_RUNTIME_DIR``, ``$XDG_RUNTIME_DIR/qemu-pagesaver``,
    ``/run/qemu-pagesaver`` for root, ``/tmp/qemu-pagesaver-UID``: the first that
    applies.

    Raises:
        IoError: It is not ours alone, or cannot be made.
    """
    named = os.environ.get(RUNTIME_VARIABLE)
    session = os.environ.get("XDG_RUNTIME_DIR")
    if named:
        path = Path(named)
    elif session:
        path = Path(session) / "qemu-pagesaver"
    elif os.geteuid() == 0:
        path = Path("/run/qemu-pagesaver")
    else:
        path = Path(tempfile.gettempdir()) / f"qemu-pagesaver-{os.geteuid()}"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise errors.from_os_error(error, "make run-time directory") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise errors.IoError(
            f"run-time directory {path} is not a directory of this user",
            hint=f"Remove it, or name another one in ${RUNTIME_VARIABLE}.",
        )
    if found.st_mode & 0o077:
        raise errors.IoError(
            f"run-time directory {path} can be entered by other users "
            f"(mode {stat.S_IMODE(found.st_mode):o})",
            hint=f"chmod 0700 it, or name another one in ${RUNTIME_VARIABLE}.",
        )
    return path


def start_time(pid: int) -> int | None:
    """Return when a process started (clock ticks since boot); None: no such."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name, in parentheses, may hold anything; field 22 counts from there.
    state, *rest = text.rpartition(")")[2].split()
    return None if state in "ZX" else int(rest[18])


def guest_key(pid: int) -> str:
    """Return ``PID-STARTTIME``, which names a process for ever.

    Raises:
        QemuDied: There is no such process.
    """
    started = start_time(pid)
    if started is None:
        raise errors.QemuDied(f"QEMU (pid {pid}) has ended")
    return f"{pid}-{started}"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is written down about the guest of a pager.

    Attributes:
        pid, started: The QEMU process.
        name: What the user may call the guest.
        snapshot, uuid: The file it was restored from; uuid in hexadecimal.
        pager: Process id of the pager.
        since: When the guest was restored, seconds since the epoch.
        qmp: The user's QMP socket of the guest.
        control: QMP socket on which the pager reaches QEMU: a private one, or
            the one that the user gave to ``--attach``.
        preempt: Whether QEMU expects the second channel.
        page_sizes: Of each RAM block's memory, in the snapshot's order.
        capabilities: Migration capabilities to be put back at the end.
        directory: ``guest-..`` of a QEMU that we started, or "".
    """

    pid: int
    started: int
    name: str
    snapshot: str
    uuid: str
    pager: int
    since: float
    qmp: str
    control: str
    preempt: bool
    page_sizes: list[int]
    capabilities: dict[str, bool]
    directory: str

    @property
    def key(self) -> str:
        """``PID-STARTTIME`` of the guest."""
        return f"{self.pid}-{self.started}"

    def matches(self, guest: str) -> bool:
        """Say whether a user may mean this guest: pid, name or snapshot."""
        if guest in (str(self.pid), self.name, self.snapshot, self.uuid):
            return True
        return os.path.realpath(guest) == os.path.realpath(self.snapshot)


def _read_record(path: Path) -> Record | None:
    """Read a record; None if it is gone or not ours to understand."""
    try:
        with path.open("rb") as file:
            values = json.loads(file.read(_MAX_RECORD))
        known = {field.name for field in fields(Record)}
        return Record(**{key: values[key] for key in values if key in known})
    except (OSError, ValueError, TypeError, AttributeError):
        return None


@dataclass(frozen=True, kw_only=True)
class Running:
    """A guest with a record: ``served`` if its pager lives."""

    record: Record
    served: bool


def list_guests() -> list[Running]:
    """Return the guests that have a pager or have lost one; removes stale ones."""
    found = []
    for path in sorted(runtime_directory().glob("*.json")):
        record = _read_record(path)
        if record is None:
            continue
        if start_time(record.pid) != record.started:
            _remove_stale(record)
            continue
        found.append(Running(record=record, served=_is_locked(record.key)))
    _remove_orphans()
    return found


def find_record(pid: int, qmp: str = "") -> Running | None:
    """Return what is known about the guest of a QEMU process, or of a QMP socket."""
    every = list_guests()
    by_pid = (item for item in every if item.record.pid == pid)
    by_qmp = (item for item in every if item.record.qmp == qmp)
    return next(by_pid, None) or next(by_qmp, None)


def find_guest(guest: str | None) -> Running:
    """Return the guest that a user means; None: the only one.

    Raises:
        NoPager: There is none.
        UsageError: More than one fits.
    """
    every = list_guests()
    fitting = [item for item in every if guest is None or item.record.matches(guest)]
    if not fitting:
        known = ", ".join(
            f"{item.record.name} (pid {item.record.pid})" for item in every
        )
        if guest is None:
            raise errors.NoPager("no pager runs", hint="`restore` starts one.")
        raise errors.NoPager(
            f"no pager serves a guest called {guest}",
            hint=f"There are: {known}." if known else "No pager runs at all.",
        )
    if len(fitting) > 1:
        pids = ", ".join(str(item.record.pid) for item in fitting)
        raise errors.UsageError(
            f"{guest or 'GUEST'} may be any of the QEMU processes {pids}",
            hint="Name one by its pid.",
        )
    return fitting[0]


def _is_locked(key: str) -> bool:
    try:
        fd = os.open(runtime_directory() / f"{key}.lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _remove_stale(record: Record) -> None:
    """Remove what belongs to a guest that has ended, unless its pager lives."""
    if _is_locked(record.key):
        return
    for suffix in _SUFFIXES:
        (runtime_directory() / f"{record.key}{suffix}").unlink(missing_ok=True)


def _remove_orphans() -> None:
    """Remove locks, sockets and directories of processes that have ended."""
    for path in runtime_directory().iterdir():
        if path.name.startswith(_GUEST_PREFIX):
            _remove_orphaned_directory(path)
            continue
        key = path.name.partition(".")[0]
        ours = path.suffix in (".lock", ".sock", ".new")
        if ours and not _is_alive(key) and not _is_locked(key):
            path.unlink(missing_ok=True)


def _is_alive(key: str) -> bool:
    """Say whether the process of a key lives; what is no key counts as alive."""
    pid, _, started = key.partition("-")
    if not (pid.isdigit() and started.isdigit()):
        return True
    return start_time(int(pid)) == int(started)


def _remove_orphaned_directory(path: Path) -> None:
    try:
        owner = (path / _OWNER).read_text()
    except OSError:
        # Never owned: its guest did not run. Its starter is in its name.
        owner = path.name.removeprefix(_GUEST_PREFIX).rpartition("-")[0]
        if _is_alive(owner):
            return
        _end_abandoned(path)
    if not _is_alive(owner):
        shutil.rmtree(path, ignore_errors=True)


def _end_abandoned(directory: Path) -> None:
    """End the QEMU whose starter was killed before it could bring the guest.

    It would wait for ever. It is known by its sockets, whose names nobody else has.
    """
    argument = f"path={directory}/".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, errors.PagesaverError):
            if process.stat().st_uid != os.geteuid():
                continue
            with ProcessWatch(int(process.name)) as watch:
                # Now that it is held it cannot become another process.
                if argument in (process / "cmdline").read_bytes():
                    os.kill(watch.pid, signal.SIGKILL)
                    watch.ended(_KILL_TIMEOUT)


def make_guest_directory() -> Path:
    """Make a private directory for the sockets of a QEMU to be started.

    Until it is owned it lives as long as this process does.
    """
    prefix = f"{_GUEST_PREFIX}{guest_key(os.getpid())}-"
    return Path(tempfile.mkdtemp(prefix=prefix, dir=runtime_directory()))


def own_guest_directory(path: Path, key: str) -> None:
    """Let a directory live as long as a QEMU does, whose guest may run from now on."""
    temporary = path / f".{_OWNER}"
    temporary.write_text(key)
    temporary.rename(path / _OWNER)


def tidy_guest_directory(path: Path) -> None:
    """Remove a directory of a guest that needs us no more, unless it has sockets."""
    with contextlib.suppress(FileNotFoundError):
        if [each.name for each in path.iterdir()] == [_OWNER]:
            shutil.rmtree(path)


@contextlib.contextmanager
def guest_lock(pid: int) -> Iterator[str]:
    """Be the one pager of a QEMU process; yields its key.

    Raises:
        GuestBusy: Another pager is.
        QemuDied: There is no such process.
    """
    key = guest_key(pid)
    path = runtime_directory() / f"{key}.lock"
    patience = 3
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            # Who only looks holds it for an instant.
            patience -= 1
            if patience:
                time.sleep(_LOCK_RETRY)
                continue
            record = _read_record(path.with_suffix(".json"))
            who = f" (pid {record.pager})" if record else ""
            raise errors.GuestBusy(
                f"QEMU (pid {pid}) has a pager already{who}",
                hint=f"`status {pid}` shows it, `finish {pid}` lets it load the rest.",
            ) from None
        # Whoever held it before may have removed the file just now.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(fd).st_ino == path.stat().st_ino:
                break
        os.close(fd)
    try:
        yield key
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def write_record(record: Record) -> None:
    """Write a record down, replacing an older one of the same guest."""
    path = runtime_directory() / f"{record.key}.json"
    temporary = path.with_suffix(f".{os.getpid()}.new")
    try:
        with temporary.open("x") as file:
            json.dump(asdict(record), file)
        temporary.rename(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise errors.from_os_error(error, "write") from error


def remove_record(record: Record) -> None:
    """Forget a guest that has everything, or has ended."""
    path = runtime_directory() / f"{record.key}.json"
    path.unlink(missing_ok=True)


class ProcessWatch:
    """Notices the end of a process that need not be a child (a pidfd).

    Raises:
        QemuDied: There is no such process.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self._fd = os.pidfd_open(pid)
        except ProcessLookupError:
            raise errors.QemuDied(f"QEMU (pid {pid}) has ended") from None
        except OSError as error:
            raise errors.from_os_error(error, f"watch process {pid}") from error

    def ended(self, timeout: float = 0) -> bool:
        """Say whether it has ended, waiting at most ``timeout`` seconds."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(timeout * 1000))

    async def wait(self) -> None:
        """Return when it has ended."""
        loop = asyncio.get_running_loop()
        ended = loop.create_future()

        def readable() -> None:
            loop.remove_reader(self._fd)
            if not ended.done():
                ended.set_result(None)

        loop.add_reader(self._fd, readable)
        try:
            await ended
        finally:
            loop.remove_reader(self._fd)

    def close(self) -> None:
        """Let go of the descriptor."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ControlServer:
    """The control socket of a running pager.

    Args:
        key: ``PID-STARTTIME`` of the guest, whose lock we hold.
        status: Returns the document of ``status``.
        finish: Makes the pager load the rest at full speed.
        set_background: Takes a rate in bytes/s.
    """

    def __init__(
        self,
        key: str,
        *,
        status: Callable[[], dict[str, Any]],
        finish: Callable[[], None],
        set_background: Callable[[int], None],
    ) -> None:
        self._path = runtime_directory() / f"{key}.sock"
        self._status = status
        self._finish = finish
        self._set_background = set_background
        self._end: asyncio.Future[dict[str, Any]] = (
            asyncio.get_running_loop().create_future()
        )
        self._talks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._path.unlink(missing_ok=True)
        check_socket_path(self._path)
        try:
            self._server = await asyncio.start_unix_server(
                self._talk, path=self._path, limit=_MAX_REQUEST
            )
        except OSError as error:
            raise errors.from_os_error(error, f"listen on {self._path}") from error
        return self

    async def __aexit__(self, *_: object) -> None:
        self.end(errors.NoPager("the pager ended before all was loaded").document())
        if self._server is not None:
            self._server.close()
        if self._talks:
            await asyncio.wait(self._talks, timeout=1.0)
            for task in self._talks:
                task.cancel()
        self._path.unlink(missing_ok=True)

    def end(self, document: dict[str, Any]) -> None:
        """Answer whoever waits for the end: a result, or an error's document."""
        if not self._end.done():
            self._end.set_result(document)

    async def _talk(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = cast("asyncio.Task[None]", asyncio.current_task())
        self._talks.add(task)
        # A client that goes away, or talks nonsense, is no concern of ours.
        with contextlib.suppress(OSError, ValueError, asyncio.CancelledError):
            try:
                await self._answer(json.loads(await reader.readline()), writer)
            except (ValueError, AttributeError) as error:
                await _send(
                    writer, {"error": {"error": "usage", "message": str(error)}}
                )
            finally:
                writer.close()
        self._talks.discard(task)

    async def _answer(
        self, request: dict[str, Any], writer: asyncio.StreamWriter
    ) -> None:
        match request.get("command"):
            case "status":
                await _send(writer, {"return": self._status()})
            case "set-background":
                rate = request.get("rate")
                if not isinstance(rate, int) or not 0 <= rate < 1 << 64:
                    raise ValueError("rate is bytes per second")
                self._set_background(rate)
                await _send(writer, {"return": self._status()})
            case "finish":
                self._finish()
                await self._follow(writer)
            case command:
                raise ValueError(f"unknown command {command!r}")

    async def _follow(self, writer: asyncio.StreamWriter) -> None:
        """Send progress until everything is loaded, then the end."""
        while not self._end.done():
            await _send(writer, {"progress": self._status()})
            await asyncio.wait({self._end}, timeout=_PROGRESS_INTERVAL)
        document = self._end.result()
        await _send(writer, {"error" if "error" in document else "return": document})


async def _send(writer: asyncio.StreamWriter, message: dict[str, Any]) -> None:
    writer.write(json.dumps(message).encode() + b"\n")
    await writer.drain()


async def _ask(
    key: str, request: dict[str, Any], *, progress: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """Send a request to the pager of a guest and return its answer."""
    path = runtime_directory() / f"{key}.sock"
    gone = errors.NoPager(
        f"the pager of guest {key.partition('-')[0]} ended before it answered",
        hint="If the guest still misses pages, `recover` goes on.",
    )
    try:
        reader, writer = await asyncio.open_unix_connection(path, limit=_MAX_ANSWER)
    except OSError:
        raise gone from None
    try:
        await _send(writer, request)
        while True:
            async with asyncio.timeout(_ANSWER_TIMEOUT):
                line = await reader.readline()
            answer = json.loads(line) if line.endswith(b"\n") else None
            if not isinstance(answer, dict):
                raise gone
            if "return" in answer:
                return dict(answer["return"])
            if "error" in answer:
                raise errors.NoPager(
                    str(answer["error"].get("message", "the pager failed")),
                    hint=str(answer["error"].get("hint", "")),
                )
            progress(answer.get("progress", {}))
    except TimeoutError:
        raise errors.NoPager(
            f"the pager of guest {key.partition('-')[0]} does not answer"
        ) from None
    except (OSError, ValueError):
        raise gone from None
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def status_async(guest: str | None = None) -> list[dict[str, Any]]:
    """Return a document for each guest, or for the one that is meant.

    Raises:
        NoPager: A guest was named and there is none.
    """
    chosen = list_guests() if guest is None else [find_guest(guest)]
    documents = []
    for item in chosen:
        record = item.record
        document: dict[str, Any] = {
            "guest": record.name,
            "pid": record.pid,
            "snapshot": record.snapshot,
            "uuid": record.uuid,
            "qmp": record.qmp,
            "pager-pid": record.pager if item.served else None,
            "state": "lost",
            "since": record.since,
        }
        if item.served:
            try:
                answer = await _ask(
                    record.key, {"command": "status"}, progress=lambda _: None
                )
            except errors.NoPager:
                # It is just starting, or just ending.
                document["state"] = "busy"
            else:
                document.update(answer)
        documents.append(document)
    return documents


def status(guest: str | None = None) -> list[dict[str, Any]]:
    """Synchronous :func:`status_async`."""
    return asyncio.run(status_async(guest))


async def _finish(key: str, report: Report) -> dict[str, Any]:
    def progress(document: dict[str, Any]) -> None:
        pages = document.get("pages", {})
        total = int(pages.get("total", 0)) * 4096
        left = int(pages.get("left", 0)) * 4096
        report.progress("load", total - left, total)

    return await _ask(key, {"command": "finish"}, progress=progress)


async def finish_guest(pid: int, report: Report) -> bool:
    """Let the pager of a QEMU process load everything, and wait for it.

    Returns:
        False if no pager of ours serves that process.

    Raises:
        NoPager: It ended before all was loaded.
    """
    found = find_record(pid)
    if found is None or not found.served:
        return False
    await _finish(found.record.key, report)
    return True


async def finish_async(guest: str | None, report: Report) -> dict[str, Any]:
    """Let the pager of a guest load everything; returns restore's document.

    Raises:
        NoPager: No such guest has a pager, or it ended before all was loaded.
    """
    found = find_guest(guest)
    if not found.served:
        raise errors.NoPager(
            f"the pager of guest {found.record.name} (pid {found.record.pid}) is gone",
            hint=f"`recover {found.record.snapshot} --attach QMP-SOCKET` goes on.",
        )
    return await _finish(found.record.key, report)


def finish(guest: str | None, report: Report) -> dict[str, Any]:
    """Synchronous :func:`finish_async`."""
    return asyncio.run(finish_async(guest, report))


async def set_background_async(guest: str | None, rate: int) -> dict[str, Any]:
    """Set the rate of background loading in bytes/s; returns the status."""
    found = find_guest(guest)
    return await _ask(
        found.record.key,
        {"command": "set-background", "rate": rate},
        progress=lambda _: None,
    )


def set_background(guest: str | None, rate: int) -> dict[str, Any]:
    """Synchronous :func:`set_background_async`."""
    return asyncio.run(set_background_async(guest, rate))


def absolute(path: str | os.PathLike[str]) -> str:
    """Return a name that holds in any working directory; links stay as they are."""
    return os.path.abspath(path)  # noqa: PTH100 - pathlib would keep `..`


def real_path(path: str | os.PathLike[str]) -> str:
    """Return the name that a file has without links."""
    return os.path.realpath(path)


def check_socket_path(path: str | os.PathLike[str]) -> None:
    """Refuse a path that is too long for a unix socket.

    Raises:
        UsageError: It is.
    """
    if len(os.fsencode(path)) > _SOCKET_PATH_MAX:
        raise errors.UsageError(
            f"{os.fspath(path)} is too long for a unix socket "
            f"({_SOCKET_PATH_MAX} bytes)",
            hint=f"Name a shorter directory in ${RUNTIME_VARIABLE}.",
        )


def peer_pid(path: str | os.PathLike[str]) -> int | None:
    """Return the process that listens on a unix socket; None: nobody does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(1.0)
        try:
            sock.connect(os.fspath(path))
        except OSError:
            return None
        return socket_pid(sock)


def socket_pid(sock: socket.socket) -> int:
    """Return the process at the other end of a connected unix socket."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    return int.from_bytes(raw[:4], "little", signed=True)
