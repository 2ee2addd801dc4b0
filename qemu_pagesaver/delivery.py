# SPDX-License-Identifier: LGPL-2.1-or-later
"""Delivery: a pager at work for one guest, from its first message to its end.

`restore` and `recover` differ in how the connection comes to be; what follows is
the same and is here: the C pager in a thread, QEMU watched, progress told, the
control socket served, interrupts obeyed, and everything put back at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from qemu_pagesaver import control, errors, placement, postcopy
from qemu_pagesaver.native import (
    PAGE_SIZE,
    UNBOUNDED,
    Pager,
    PagerOptions,
    PagerState,
    PagerStats,
    Prefetch,
)

if TYPE_CHECKING:
    from qemu_pagesaver.guest import Guest, HostBlock
    from qemu_pagesaver.native import RamBlock
    from qemu_pagesaver.qmp import Events
    from qemu_pagesaver.report import Report
    from qemu_pagesaver.snapshot import Snapshot

# QEMU answers in milliseconds; under load, in seconds.
ANSWER_TIMEOUT = 30.0
_RECEIVE_BYTES = 1 << 16
_TICK = 0.1
_PLACED_TICK = 0.02
_STATUS_POLL = 0.005
_STALL_TIMEOUT = 60.0
_SETTLE_TIMEOUT = 2.0
_RECONNECT_TIMEOUT = 1.0
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30}
# A window is a neighbourhood, not a second background (PS_MAX_WINDOW).
MAX_WINDOW = 256
_TRACE_HEADER = 64

# A capability that changes what the destination reads, or how it reads it. Those
# that it does not have are as good as off.
_MUST_BE_OFF = (
    "background-snapshot",
    "compress",
    "mapped-ram",
    "multifd",
    "switchover-ack",
    "x-colo",
    "x-ignore-shared",
    "xbzrle",
)


# ----------------------------------------------------------------- options


class DeliveryOptions(TypedDict, total=False):
    """The fields of :class:`Delivery`, as keywords of what delivers."""

    prefetch: str
    prefetch_window: int
    background: str
    preempt: str
    place: str
    trace: str | None


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """How pages are brought to the guest.

    Attributes:
        prefetch: What comes with a requested page: its neighbours in guest-``virtual``
            memory (in the file, where no address space maps it), its ``physical``
            ones, or ``none``.
        prefetch_window: Neighbours, at most; how many is told from earlier faults.
        background: ``off``, ``max``, or bytes/s with K, M or G: loading of what
            nobody has asked for.
        preempt: A second connection for requested pages: ``on``, ``off``, or
            ``auto``: where it measured better, which is nowhere yet.
        place: Threads on one CPU while only faults are served: ``auto`` (where
            that is measured to be cheaper) or ``off``.
        trace: A file for a record of every fault (TRACE.md); None: none.
    """

    prefetch: str = "virtual"
    prefetch_window: int = 64
    background: str = "max"
    preempt: str = "auto"
    place: str = "auto"
    trace: str | None = None

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            UsageError: One is none of those above.
        """
        for name, known in (
            ("prefetch", ("none", "physical", "virtual")),
            ("preempt", ("auto", "on", "off")),
            ("place", ("auto", "off")),
        ):
            if getattr(self, name) not in known:
                raise errors.UsageError(
                    f"{name} {getattr(self, name)!r} is none of {', '.join(known)}"
                )
        if not 0 <= self.prefetch_window <= MAX_WINDOW:
            raise errors.UsageError(
                f"a prefetch window of {self.prefetch_window} pages is out of range",
                hint=f"0 to {MAX_WINDOW}.",
            )
        parse_rate(self.background)

    @property
    def wants_preempt(self) -> bool:
        """Whether the second connection is used.

        ``auto`` is off: without background traffic it gains nothing, and
        with it the bound on bytes in flight already keeps faults from queueing.
        """
        return self.preempt == "on"

    def pager_options(self, trace_fd: int = -1) -> PagerOptions:
        """Return them as the C core takes them."""
        return PagerOptions(
            trace_fd=trace_fd,
            prefetch=Prefetch[self.prefetch.upper()],
            prefetch_window=self.prefetch_window,
            background_rate=parse_rate(self.background),
        )


def parse_rate(text: str) -> int:
    """Return bytes/s of ``off``, ``max``, or a number with K, M or G (binary).

    Raises:
        UsageError: It is none of these.
    """
    if text == "off":
        return 0
    if text == "max":
        return UNBOUNDED
    number, unit = (text[:-1], text[-1]) if text[-1:].isalpha() else (text, "")
    if number.isdecimal() and unit.upper() in _UNITS:
        rate = int(number) << _UNITS[unit.upper()]
        if 0 < rate < UNBOUNDED:
            return rate
    raise errors.UsageError(
        f"background rate {text!r} is not known",
        hint="off, max, or bytes per second with K, M or G: 64M.",
    )


# ------------------------------------------------------------------- blocks


def match_blocks(
    wanted: Sequence[RamBlock], found: Sequence[HostBlock], *, where: str
) -> list[postcopy.Block]:
    """Return the snapshot's RAM blocks as the destination has them.

    Raises:
        MachineMismatch: They are not the same; names the first that differs.
    """
    there = {block.name: block for block in found}
    matched = []
    for block in wanted:
        host = there.pop(block.name, None)
        if host is None:
            raise errors.MachineMismatch(
                f"{where} has no RAM block {block.name} ({block.length} bytes)",
                hint="Start it with the machine, RAM and devices of the save.",
            )
        # QEMU resizes some ROM blocks (ACPI tables) to what the stream says.
        resizable = host.length != host.length_max or "rom@" in host.name
        fits = block.length == host.length or (
            resizable and block.length <= host.length_max
        )
        if not fits:
            raise errors.MachineMismatch(
                f"RAM block {block.name} has {block.length} bytes in the snapshot and "
                f"{host.length} in {where}",
                hint="Start it with the same amount of memory (-m).",
            )
        if block.length % host.page_size:
            raise errors.MachineMismatch(
                f"RAM block {block.name} ({block.length} bytes) is no multiple of the "
                f"page size of its memory in {where} ({host.page_size} bytes)",
                hint="Use a memory backend with smaller pages.",
            )
        matched.append(
            postcopy.Block(
                name=block.name, length=block.length, page_size=host.page_size
            )
        )
    if there:
        raise errors.MachineMismatch(
            f"{where} has RAM block {min(there)}, which the snapshot does not have",
            hint="Start it with the machine, RAM and devices of the save.",
        )
    return matched


# --------------------------------------------------------------------- link


class Link:
    """The connection to QEMU's incoming migration, until the pager has it.

    Attributes:
        main, urgent: The sockets; ``urgent`` is None without preempt.
        requests: Bytes of requests that came before the pager was there.
    """

    def __init__(
        self, main: socket.socket, urgent: socket.socket | None, guest: Guest
    ) -> None:
        self.main = main
        self.urgent = urgent
        self._guest = guest
        self._path: postcopy.ReturnPath | None = None
        self._ready: list[postcopy.Message] = []
        self.requests = b""

    def expect_blocks(self, lengths: dict[str, int]) -> None:
        """Take the RAM blocks, whose bitmaps QEMU may send."""
        self._path = postcopy.ReturnPath(lengths)

    async def send(self, data: bytes, doing: str) -> None:
        """Send; while QEMU does not read, it is watched."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                await loop.sock_sendall(self.main, data)
        except TimeoutError:
            raise self._silent(doing) from None
        except OSError:
            raise await self._gone(doing) from None

    async def receive(
        self, kind: postcopy.Reply, value: int | None, doing: str
    ) -> postcopy.Message:
        """Return the next message of a kind; requests are kept for the pager."""
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                while True:
                    message = await self._next(doing)
                    if message.type is kind and value in (None, message.value):
                        return message
                    if message.type in (
                        postcopy.Reply.REQ_PAGES,
                        postcopy.Reply.REQ_PAGES_ID,
                    ):
                        self.requests += message.raw
                    elif message.type is postcopy.Reply.SHUT:
                        raise await self._gone(doing)
        except TimeoutError:
            raise self._silent(doing) from None

    async def _next(self, doing: str) -> postcopy.Message:
        assert self._path is not None, "expect_blocks() comes first"  # noqa: S101
        loop = asyncio.get_running_loop()
        while not self._ready:
            try:
                data = await loop.sock_recv(self.main, _RECEIVE_BYTES)
            except OSError:
                data = b""
            if not data:
                raise await self._gone(doing)
            self._ready = list(self._path.push(data))
        return self._ready.pop(0)

    def take_received(self) -> bytes:
        """Return all bytes read that are the pager's to answer."""
        assert self._path is not None, "expect_blocks() comes first"  # noqa: S101
        late = b"".join(
            message.raw
            for message in self._ready
            if message.type in (postcopy.Reply.REQ_PAGES, postcopy.Reply.REQ_PAGES_ID)
        )
        return self.requests + late + self._path.rest

    def _silent(self, doing: str) -> errors.QemuTimeout:
        return errors.QemuTimeout(
            f"QEMU (pid {self._guest.pid}) did not answer within {ANSWER_TIMEOUT:g} s "
            f"{doing}"
        )

    async def _gone(self, doing: str) -> errors.PagesaverError:
        """QEMU has closed the connection: find out why."""
        return await why_closed(self._guest, doing)

    def close(self) -> None:
        """Close both sockets, so that QEMU notices."""
        for sock in (self.main, self.urgent):
            if sock is not None:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()


async def why_closed(guest: Guest, doing: str) -> errors.PagesaverError:
    """Return the error for a connection that QEMU has closed too early."""
    if await asyncio.to_thread(guest.watch.ended, _SETTLE_TIMEOUT):
        return guest.died(doing)
    reason = ""
    with contextlib.suppress(errors.PagesaverError):
        answer = await guest.qmp.execute("query-migrate", timeout=_SETTLE_TIMEOUT)
        reason = answer.get("error-desc") or answer.get("status", "")
    reason = reason or guest.last_words
    return errors.MigrationFailed(
        f"QEMU (pid {guest.pid}) gave the migration up {doing}"
        + (f": {reason}" if reason else "")
    )


@contextlib.asynccontextmanager
async def connect(guest: Guest, path: Path, *, preempt: bool) -> AsyncIterator[Link]:
    """Connect to the socket on which QEMU waits for its migration.

    With preempt the second connection is made at once: 7.2 waits for both before
    it begins, 8.0 and later take the first as the main one.
    """
    sockets: list[socket.socket] = []
    loop = asyncio.get_running_loop()
    try:
        for _ in range(2 if preempt else 1):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sockets.append(sock)
            sock.setblocking(False)
            await loop.sock_connect(sock, str(path))
    except OSError as error:
        for sock in sockets:
            sock.close()
        raise errors.from_os_error(error, f"connect to QEMU's {path}") from error
    link = Link(sockets[0], sockets[1] if preempt else None, guest)
    try:
        yield link
    finally:
        link.close()


# ------------------------------------------------------------- capabilities


async def set_capabilities(
    guest: Guest, found: dict[str, bool], *, preempt: bool
) -> dict[str, bool]:
    """Set what on-demand delivery needs; returns what has to be put back.

    Args:
        guest: QEMU.
        found: Its capabilities as they are.
        preempt: Whether the second connection is used.

    Raises:
        UserfaultfdForbidden: QEMU may not use userfaultfd.
        QemuRefused: It refuses for another reason.
    """
    wanted = {"events": True, "postcopy-ram": True, "postcopy-preempt": preempt}
    wanted |= dict.fromkeys(_MUST_BE_OFF, False)
    if preempt and "postcopy-preempt" not in found:
        raise errors.QemuRefused(
            "this QEMU has no postcopy-preempt (7.1 and later have it)",
            hint="Leave --preempt away.",
        )
    if "postcopy-ram" not in found:
        raise errors.QemuRefused("this QEMU has no postcopy-ram")
    change = {
        name: state for name, state in wanted.items() if found.get(name, state) != state
    }
    try:
        await write_capabilities(guest, change)
    except errors.QemuRefused as error:
        words = " ".join([error.message, *guest.said])
        if "userfault" in words.lower():
            raise errors.UserfaultfdForbidden(
                f"QEMU (pid {guest.pid}) may not use userfaultfd: {error.message}"
            ) from error
        if guest.last_words:
            raise errors.QemuRefused(f"{error.message}: {guest.last_words}") from error
        raise
    return {name: not state for name, state in change.items()}


async def write_capabilities(guest: Guest, states: dict[str, bool]) -> None:
    """Set capabilities to what they are given as."""
    if states:
        await guest.qmp.execute(
            "migrate-set-capabilities",
            {
                "capabilities": [
                    {"capability": name, "state": state}
                    for name, state in states.items()
                ]
            },
        )


# ------------------------------------------------------------------- result


@dataclass(frozen=True, kw_only=True)
class RestoreResult:
    """What a restore, or a recovery, did; bytes, seconds, pages of 4096 bytes.

    Attributes:
        snapshot, uuid: The file.
        pid: QEMU's process.
        qmp: A QMP socket of it.
        time_to_running: From QMP answering to the guest running (or standing
            as it was saved); None for a recovery.
        time_from_start: The same from the call on.
        duration: Of all of it.
        stats: The pager's counters.
        complete: Everything was loaded.
        ended: ``complete``, ``qemu-ended`` or ``let-go``.
        interrupted: The user interrupted.
        cpu: CPU on which threads were put together; None: nowhere.
        sockets: What listened elsewhere at the save, and where it listens now.
        qemu_status: Exit status of a QEMU of ours that ended.
    """

    snapshot: str
    uuid: str
    pid: int
    qmp: str
    time_to_running: float | None
    time_from_start: float | None
    duration: float
    stats: PagerStats
    complete: bool
    ended: str
    interrupted: bool
    cpu: int | None
    sockets: dict[str, str]
    qemu_status: int | None

    @property
    def faults(self) -> int:
        """Every request of QEMU."""
        return self.stats.faults

    def document(self) -> dict[str, Any]:
        """Return the document of ``--json``."""
        stats = self.stats
        return {
            "snapshot": self.snapshot,
            "uuid": self.uuid,
            "pid": self.pid,
            "qmp": self.qmp,
            "time-to-running": self.time_to_running,
            "time-from-start": self.time_from_start,
            "duration": self.duration,
            **count_document(stats),
            "complete": self.complete,
            "ended": self.ended,
            "interrupted": self.interrupted,
            "placed-on-cpu": self.cpu,
            "sockets": self.sockets,
            "qemu-status": self.qemu_status,
        }


def count_document(stats: PagerStats) -> dict[str, Any]:
    """Return the counters as documents have them."""
    known = stats.faults > 0
    return {
        "faults": stats.faults,
        "faults-late": stats.faults_late,
        "pages-sent": {
            "requested": stats.pages_requested,
            "prefetched": stats.pages_prefetched,
            "working-set": 0,
            "background": stats.pages_background,
        },
        "pages-avoided": stats.pages_avoided,
        "pages": {"total": stats.pages_total, "left": stats.pages_left},
        "latency": {
            "p50": stats.latency_p50 / 1e9 if known else None,
            "p99": stats.latency_p99 / 1e9 if known else None,
            "max": stats.latency_max / 1e9 if known else None,
        },
        "prefetch": {
            kind.name.lower(): {
                "windows": each.windows,
                "windows-right": each.windows_right,
                "pages": each.pages,
                "pages-right": each.pages_right,
            }
            for kind, each in stats.prefetch.items()
        },
        "faults-saved": sum(each.pages_right for each in stats.prefetch.values()),
        "pages-unused": sum(
            each.pages - each.pages_right for each in stats.prefetch.values()
        ),
        "bytes-sent": stats.bytes_sent,
        "storage": {
            "reads": stats.storage_reads,
            "bytes": stats.storage_bytes,
            "blocks-decoded": stats.blocks_decoded,
        },
        "pager-cpu": stats.cpu_ns / 1e9,
    }


# ------------------------------------------------------------------ serving


@dataclass
class Job:
    """All that serving needs; filled by `restore` and `recover`.

    Attributes:
        guest: QEMU.
        snapshot: Where pages come from.
        link: The connection; the pager's from now on.
        record: As it is written down for a later pager.
        pager: Ready to run.
        options: How to serve.
        report: Who is told.
        started: When the call began (monotonic seconds).
        answered: When QMP answered, likewise; None: a recovery.
        paused: The guest is to stand still.
        place: Whether sharing a CPU is measured to pay; None: not wanted.
        sockets: What listens elsewhere now.
    """

    guest: Guest
    snapshot: Snapshot
    link: Link
    record: control.Record
    pager: Pager
    options: Delivery
    report: Report
    started: float
    answered: float | None
    paused: bool
    place: asyncio.Future[bool] | None
    sockets: dict[str, str] = field(default_factory=dict)
    running: float | None = None
    interrupts: int = 0


async def serve(job: Job) -> RestoreResult:
    """Serve until all is loaded, QEMU ends, or the user lets go.

    Raises:
        PagesaverError: Why the pager ended too early. The guest waits then,
            and its record stays for `recover`.
    """
    placed = placement.Placement(job.record.pid)
    async with contextlib.AsyncExitStack() as stack:
        resumed: Events | None = None
        if job.answered is not None:
            # Before the pager runs: QEMU may be faster than we are.
            resumed = await stack.enter_async_context(job.guest.qmp.listen("RESUME"))
        task = asyncio.ensure_future(asyncio.to_thread(job.pager.run))
        return await _serve_with(job, task, placed, resumed)


async def _serve_with(
    job: Job,
    task: asyncio.Future[None],
    placed: placement.Placement,
    resumed: Events | None,
) -> RestoreResult:
    try:
        async with control.ControlServer(
            job.record.key,
            status=lambda: _status(job),
            finish=job.pager.finish,
            set_background=job.pager.set_background,
        ) as server:
            try:
                result = await _serve(job, task, placed, resumed)
            except errors.PagesaverError as error:
                server.end(error.document())
                raise
            server.end(result.document())
            return result
    finally:
        placed.undo()
        job.pager.cancel()
        await _wait_quietly(task)
        job.link.close()


async def _wait_quietly(task: asyncio.Future[None]) -> None:
    """Wait for the thread, which uses what is closed next."""
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({task})
    task.exception()


async def _serve(
    job: Job,
    task: asyncio.Future[None],
    placed: placement.Placement,
    resumed: Events | None,
) -> RestoreResult:
    ended = asyncio.ensure_future(job.guest.watch.wait())
    try:
        if resumed is not None:
            await _wait_running(job, task, ended, resumed)
        with _interrupts(job):
            await _load(job, task, ended, placed)
        return await _finish(job, task, placed.cpu)
    finally:
        ended.cancel()


async def _wait_running(
    job: Job,
    task: asyncio.Future[None],
    ended: asyncio.Future[None],
    events: Events,
) -> None:
    """Wait until the guest runs, or stands as it was saved."""
    doing = "when it loaded the device state"
    resumed = asyncio.ensure_future(events.next())
    asked = asyncio.ensure_future(_has_state(job))
    sent, since = 0, time.monotonic()
    try:
        while not (resumed.done() or asked.done()):
            waits: set[asyncio.Future[Any]] = {task, ended, resumed, asked}
            await asyncio.wait(
                waits, timeout=_TICK, return_when=asyncio.FIRST_COMPLETED
            )
            if ended.done():
                raise job.guest.died(doing)
            if task.done():
                error = task.exception()
                if isinstance(error, errors.QemuDied):
                    raise await why_closed(job.guest, doing) from error
                if error is not None:
                    raise error
            now = job.pager.stats().bytes_sent
            if now != sent:
                sent, since = now, time.monotonic()
            elif time.monotonic() - since > _STALL_TIMEOUT:
                raise errors.QemuTimeout(
                    f"QEMU (pid {job.guest.pid}) hangs {doing}: nothing happened "
                    f"for {_STALL_TIMEOUT:g} s"
                )
        if resumed.done():
            resumed.result()
        else:
            asked.result()
    except errors.QemuDied as error:
        # QMP closes an instant before the process ends, which can say more.
        raise await why_closed(job.guest, doing) from error
    finally:
        for waiting in (resumed, asked):
            waiting.cancel()
        await asyncio.gather(resumed, asked, return_exceptions=True)
    job.running = time.monotonic()
    job.guest.ran = True
    assert job.answered is not None  # noqa: S101 - the caller has looked
    job.report.event(
        "running",
        pid=job.record.pid,
        qmp=job.record.qmp,
        paused=job.paused,
        sockets=job.sockets,
        time_to_running=job.running - job.answered,
        time_from_start=job.running - job.started,
    )


async def _has_state(job: Job) -> None:
    """Return when the guest has its state; no event says that it stands."""
    while True:
        if not job.paused:
            await asyncio.sleep(_TICK)
        state = await job.guest.qmp.execute("query-status", timeout=_STALL_TIMEOUT)
        if state["status"] != "inmigrate":
            return
        await asyncio.sleep(_STATUS_POLL)


async def _load(
    job: Job,
    task: asyncio.Future[None],
    ended: asyncio.Future[None],
    placed: placement.Placement,
) -> None:
    """Follow the pager until it is done, or QEMU is."""
    if not job.guest.spawned:
        # The user's own socket: others want to use it.
        await job.guest.disconnect()
    if job.paused and parse_rate(job.options.background) == UNBOUNDED:
        # It touches nothing, so no fault can be kept waiting.
        job.pager.finish()
    placing = asyncio.ensure_future(_place(job, placed))
    pages, last = job.pager.stats().pages_background, time.monotonic()
    while not task.done() and not ended.done():
        await asyncio.wait(
            {task, ended},
            timeout=_TICK if placed.over else _PLACED_TICK,
            return_when=asyncio.FIRST_COMPLETED,
        )
        stats = job.pager.stats()
        now = time.monotonic()
        rate = (stats.pages_background - pages) / max(now - last, 1e-3)
        if rate > placement.BUSY_PAGES_PER_SECOND:
            placed.undo()
        pages, last = stats.pages_background, now
        total = stats.pages_total * PAGE_SIZE
        job.report.progress("load", total - stats.pages_left * PAGE_SIZE, total)
    placing.cancel()
    await asyncio.gather(placing, return_exceptions=True)


async def _place(job: Job, placed: placement.Placement) -> None:
    """Put the threads of a fault together, once it is measured that it pays."""
    if job.place is not None and await job.place:
        placed.apply(job.pager.thread())
    else:
        placed.undo()


async def _finish(
    job: Job, task: asyncio.Future[None], cpu: int | None
) -> RestoreResult:
    """Put everything back and say what happened."""
    job.pager.cancel()
    await asyncio.wait({task})
    error = task.exception()
    gone = False
    if error is not None:
        # When QEMU ends, its socket may close before its process has.
        wait = _SETTLE_TIMEOUT if isinstance(error, errors.QemuDied) else 0
        gone = await asyncio.to_thread(job.guest.watch.ended, wait)
    let_go = isinstance(error, errors.Interrupted) and job.interrupts > 1
    if error is not None and not gone and not let_go:
        job.link.close()
        raise _paused(job, error)
    if error is None:
        await _put_back(job)
        job.guest.remove_controls()
    if error is None or gone:
        control.remove_record(job.record)
    result = RestoreResult(
        snapshot=str(job.snapshot.path),
        uuid=job.snapshot.uuid,
        pid=job.record.pid,
        qmp=job.record.qmp,
        time_to_running=_between(job.answered, job.running),
        time_from_start=_between(job.started, job.running),
        duration=time.monotonic() - job.started,
        stats=job.pager.stats(),
        complete=error is None,
        ended="complete" if error is None else "qemu-ended" if gone else "let-go",
        interrupted=job.interrupts > 0,
        cpu=cpu,
        sockets=job.sockets,
        qemu_status=job.guest.exit_code if gone else None,
    )
    if result.complete:
        job.report.event("complete", **result.document())
    return result


def _between(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else second - first


def _paused(job: Job, error: BaseException) -> BaseException:
    """Add to an error that the guest waits, and how it goes on."""
    if not isinstance(error, errors.PagesaverError):
        return error
    message = error.message
    if isinstance(error, errors.QemuDied):
        # It has not: its process lives.
        error = errors.MigrationFailed(message)
    name = job.snapshot.path
    damaged = isinstance(error, errors.SnapshotError)
    how = f"recover {name} --attach {job.record.qmp}"
    if damaged:
        how += " --from COPY"
    return type(error)(
        f"{message}; the guest (pid {job.record.pid}) waits at the next page that it "
        "misses",
        hint=f"Bring it on with `{how}`"
        + (", where COPY is an undamaged copy of the file." if damaged else "."),
    )


async def _put_back(job: Job) -> None:
    """Put capabilities back; a socket that somebody else uses is no failure."""
    guest = job.guest
    try:
        await guest.reconnect(_RECONNECT_TIMEOUT)
        # QEMU confirms before it is quite through.
        deadline = time.monotonic() + _SETTLE_TIMEOUT
        while time.monotonic() < deadline:
            answer = await guest.qmp.execute("query-migrate")
            if answer.get("status") == "completed":
                break
            await asyncio.sleep(0.005)
        await write_capabilities(guest, job.record.capabilities)
    except errors.PagesaverError as error:
        names = ", ".join(sorted(job.record.capabilities))
        job.report.detail(
            f"migration capabilities ({names}) stay as they are: {error.message}"
        )


def _status(job: Job) -> dict[str, Any]:
    stats = job.pager.stats()
    state = stats.state
    if state is PagerState.NEW or (job.answered is not None and job.running is None):
        name = "starting"
    else:
        name = state.name.lower()
    return {
        "state": name,
        "time-to-running": _between(job.answered, job.running),
        **count_document(stats),
    }


@contextlib.contextmanager
def _interrupts(job: Job) -> Iterator[None]:
    """Obey interrupts: the first loads the rest and ends, the second lets go.

    A guest that runs must not lose its pager by one keystroke. Elsewhere than in
    the main thread signals are the caller's.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()

    def interrupted() -> None:
        job.interrupts += 1
        if job.interrupts == 1:
            job.report.note(
                "loading the rest of the guest's memory; interrupt again to let go of "
                "it at once"
            )
            job.pager.finish()
        else:
            job.pager.cancel()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    found: dict[signal.Signals, Callable[..., Any] | int | None] = {
        number: signal.getsignal(number) for number in numbers
    }
    for number in numbers:
        if found[number] is not signal.SIG_IGN:
            loop.add_signal_handler(number, interrupted)
    try:
        yield
    finally:
        for number, handler in found.items():
            if handler is not signal.SIG_IGN:
                loop.remove_signal_handler(number)
                signal.signal(number, handler or signal.SIG_DFL)


@contextlib.contextmanager
def trace_file(options: Delivery) -> Iterator[int]:
    """Open the file for the trace, which must be new; yields -1 where there is none.

    Raises:
        TargetExists: There is such a file.
        IoError: It cannot be made.
    """
    if options.trace is None:
        yield -1
        return
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        fd = os.open(options.trace, flags, 0o600)
    except OSError as error:
        raise errors.from_os_error(error, "write the trace") from error
    try:
        yield fd
    except BaseException:
        if os.fstat(fd).st_size <= _TRACE_HEADER:
            Path(options.trace).unlink(missing_ok=True)  # nothing came of it
        raise
    finally:
        os.close(fd)


def make_pager(
    snapshot: Snapshot,
    link: Link,
    blocks: Sequence[postcopy.Block],
    options: Delivery,
    guest: Guest,
    *,
    trace: int,
) -> Pager:
    """Return a pager that knows its connection and what was read from it."""
    pager = Pager(
        snapshot.image,
        fd=link.main.fileno(),
        preempt_fd=None if link.urgent is None else link.urgent.fileno(),
        blocks=[(block.page_size, block.length) for block in blocks],
        options=options.pager_options(trace),
        name=f"QEMU (pid {guest.pid})",
    )
    pager.received_first(link.take_received())
    return pager


def migration_socket(directory: str | os.PathLike[str] | None, guest: Guest) -> Path:
    """Return where QEMU is to listen for its migration.

    Raises:
        UsageError: The name is too long.
    """
    if directory is not None:
        place = Path(directory)
    elif guest.directory is not None:
        place = guest.directory
    else:
        place = control.runtime_directory()
    path = place / f"migration-{os.getpid()}-{guest.pid}"
    control.check_socket_path(path)
    return path
