# SPDX-License-Identifier: LGPL-2.1-or-later
"""Capture: an outgoing migration of QEMU, read into the C core.

A guest that is to go on is captured *live*: QEMU sends its memory while it runs,
then stops it and sends what was written meanwhile, and the devices. So the guest
waits for a part of its memory instead of all of it, and it is QEMU that stops it
and lets it go on: if we are killed in the middle, our end of the socket closes, the
migration fails and the guest runs on by itself.

That is right only if QEMU notices every write. KVM has it from the processor. TCG
did not before QEMU 9.0 ("physmem: Fix migration dirty bitmap coherency with TCG
memory access"; with 7.2 every second save of a busy guest was wrong). Since then one
window is left, by reading the source: notdirty_write() in accel/tcg/cputlb.c looks at
a dirty bit and then lets all further writes pass unseen; if QEMU collects the bits
in between, they are lost. So under TCG the bits are collected only while the guest
stands still: it is stopped for the moment in which the migration is set up, memory is
gone over once, and QEMU stops it before it looks again. A QEMU that looks earlier
(10.1 and later) is noticed: MissedWrites.

Otherwise the guest is stopped first, and if we are killed then, it stays paused and
`cont` brings it on.

A capture ends in one of two ways:

*Refused* (QEMU 8.2 and later). On the return path we say early that the destination
failed. QEMU sends its stream to the end, sees then that it is not wanted, takes its
disks back and returns to the run state it had: running or paused, and a paused guest
can be saved again. It costs that ``query-migrate`` says ``failed`` afterwards, which
is true: the guest has not gone anywhere.

*Completed* (before 8.2, where the first word of refusal closes the whole connection).
The migration completes, the guest is ``postmigrate``, and ``cont`` lets it go on. One
that was found paused stays in that state: it can run, but QEMU refuses to
migrate it again until it has.

See migration_completion() and migration_iteration_finish() in QEMU's
migration/migration.c.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qemu_pagesaver import errors
from qemu_pagesaver.migration import (
    ENDED,
    LONGEST_DOWNTIME_MS,
    UNLIMITED_BANDWIDTH,
    migration_settings,
    query_capabilities,
    query_migrate,
    to_the_end,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from qemu_pagesaver.native import Saver, SaverStats
    from qemu_pagesaver.qmp import Events, Qmp
    from qemu_pagesaver.report import Report

# Under KVM a live guest is stopped as soon as the rest takes this long to send, ...
_TARGET_DOWNTIME_MS = 50
# ... and in any case when its memory has been gone over this often: who writes
# as fast as we read would never be saved. QEMU counts passes from 1.
_LAST_LIVE_PASS = 3
PAGE_SIZE = 4096
# Without a byte or an event for so long (seconds) QEMU is taken to hang.
_STALL = 30.0
_TICK = 0.2
_COMMAND_DEADLINE = 5.0
_SETTLE_DEADLINE = 30.0
# QEMU's MIG_RP_MSG_SHUT with the value 1: the destination has failed.
_REFUSAL = struct.pack(">HHI", 1, 4, 1)
_SWITCHOVER = "pause-before-switchover"


@dataclass(frozen=True, kw_only=True)
class Pause:
    """How long a guest did not run, in seconds.

    Attributes:
        total: From its stop until it ran again; where it does not go on, until
            all of its state was read; 0 for one that was paused already.
        stop: Setting up, and from the stop until its disks were taken care of, ..
        overlay: .. and how long that took.
        drain: Sending what was left, and the devices.
        resume: Going on.
    """

    total: float = 0.0
    stop: float = 0.0
    overlay: float = 0.0
    drain: float = 0.0
    resume: float = 0.0


class MissedWrites(Exception):
    """QEMU may have missed writes of a live guest: capture it stopped."""


async def capture(
    qmp: Qmp,
    saver: Saver,
    *,
    running: bool,
    go_on: bool = True,
    live: bool = True,
    at_standstill: Callable[[], Awaitable[None]] | None = None,
    report: Report,
) -> Pause:
    """Read a guest's whole state into ``saver`` and leave the guest as found.

    Args:
        qmp: The guest; no migration may be active.
        saver: Takes the stream; its ``end()`` has succeeded on return.
        running: Whether the guest runs now.
        go_on: Whether it is to run on. If not, it is stopped first and stays
            stopped; `cont` would let it go on.
        live: Whether memory may be sent while the guest still runs.
        at_standstill: Called once, while the guest does not run; for its disks.
        report: Gets progress.

    Raises:
        MigrationFailed: QEMU gave up.
        QemuTimeout: QEMU sent nothing for a long time.
        QemuDied: QEMU ended.
        PagesaverError: The stream cannot be used, or the spool not be written.
        MissedWrites: It is to be done again, not live and with another saver.
    """
    known = await query_capabilities(qmp)
    found = await qmp.execute("query-migrate-parameters")
    # No command tells how a return path is closed; this parameter came with the
    # same release as "migration: Consolidate return path closing code".
    refuse = "avail-switchover-bandwidth" in found
    kvm = bool((await qmp.execute("query-kvm"))["enabled"])
    # mapped-ram came with 9.0, like that repair of TCG.
    live = live and running and go_on and (kvm or (refuse and "mapped-ram" in known))
    at_switchover = live and at_standstill is not None
    # Whatever changes the stream is off; what changes only when and how fast it
    # comes is off as well.
    capabilities = dict.fromkeys(known, False) | {
        "events": True,
        "return-path": refuse,
        # Only where it is needed: if we are killed at this point, QEMU waits.
        _SWITCHOVER: at_switchover,
    }
    session = _Session(
        qmp,
        saver,
        running=running,
        go_on=go_on,
        live=live,
        once=live and not kvm,
        refuse=refuse,
        at_standstill=at_standstill,
        at_switchover=at_switchover,
        report=report,
    )
    async with migration_settings(
        qmp,
        capabilities=capabilities,
        parameters=_parameters(found, once=live and not kvm),
    ):
        try:
            return await session.run()
        except BaseException:
            await to_the_end(session.undo())
            raise
        finally:
            session.close()


def _parameters(found: dict[str, Any], *, once: bool) -> dict[str, object]:
    """Return the parameters to set, of those that this QEMU has."""
    wanted: dict[str, object] = {
        "max-bandwidth": UNLIMITED_BANDWIDTH,
        # Small for a paused guest too: with much left QEMU would send it while
        # it holds the lock that QMP needs.
        # With 0 it goes over memory once, and looks for writes after its stop.
        "downtime-limit": 0 if once else _TARGET_DOWNTIME_MS,
        "tls-creds": "",
        "mode": "normal",
    }
    if found.get("zero-page-detection") == "none":
        wanted["zero-page-detection"] = "legacy"
    return {name: value for name, value in wanted.items() if name in found}


class _Session:
    """One capture: what was done so far, so that it can be undone."""

    def __init__(
        self,
        qmp: Qmp,
        saver: Saver,
        *,
        running: bool,
        go_on: bool,
        live: bool,
        once: bool,
        refuse: bool,
        at_standstill: Callable[[], Awaitable[None]] | None,
        at_switchover: bool,
        report: Report,
    ) -> None:
        self._qmp = qmp
        self._saver = saver
        self._running = running
        self._go_on = go_on
        self._live = live
        self._once = once
        self._refuse = refuse
        self._at_standstill = at_standstill
        self._at_switchover = at_switchover
        self._report = report
        self._ours, self._theirs = socket.socketpair()
        self._name = f"pagesaver-{secrets.token_hex(8)}"
        self._drain: asyncio.Future[None] | None = None
        self._stopped_by_us = False
        self._switching = False
        self._setup = 0.0  # seconds of standing still to set the migration up
        # Wall-clock seconds, as QEMU's events have them.
        self._stopped_at = 0.0
        self._still_begin = 0.0
        self._still_end = 0.0
        self._sent_at = 0.0
        self._resumed_at = 0.0

    async def run(self) -> Pause:
        names = ("STOP", "RESUME", "MIGRATION", "MIGRATION_PASS")
        async with self._qmp.listen(names) as events:
            await self._qmp.pass_fd(self._name, self._theirs.fileno())
            # The only other end is QEMU's now, so that we see its end of file.
            self._theirs.close()
            if self._once or (self._running and not self._live):
                await self._stop(events)
            if self._at_standstill is not None and not self._at_switchover:
                await self._stand_still()
            await self._qmp.execute("migrate", {"uri": f"fd:{self._name}"})
            loop = asyncio.get_running_loop()
            self._drain = loop.run_in_executor(
                None, self._saver.drain, self._ours.fileno()
            )
            if self._once:
                await self._set_up(events)
            if self._refuse and not self._live:
                self._say_refused()
            status = await self._watch(events)
            if self._running and self._go_on:
                await self._resume(events, status)
            await self._finish(status)
        return self._pause()

    async def _stop(self, events: Events) -> None:
        self._stopped_by_us = True
        await self._qmp.execute("stop")
        try:
            await self._until("STOP", events)
        except errors.QemuTimeout:
            # QEMU tells it before it answers the command.
            self._stopped_by_us = False
            raise errors.GuestBusy(
                "the guest was stopped by somebody else meanwhile"
            ) from None
        self._stopped_at = events.time

    async def _until(self, wanted: str, events: Events) -> Any:
        """Return the data of the next event of that name; drop the others."""
        while True:
            name, data = await events.next(timeout=_COMMAND_DEADLINE)
            if name == wanted:
                return data

    async def _set_up(self, events: Events) -> None:
        """Let the guest run again when QEMU has begun to track its writes."""
        while (
            status := (await self._until("MIGRATION", events))["status"]
        ) != "active":
            if status in ENDED:
                reason = (await query_migrate(self._qmp)).error
                raise errors.MigrationFailed(
                    f"QEMU gave the capture up ({status}): {reason}"
                )
        try:
            await self._qmp.execute("cont")
        except errors.QemuRefused:
            # A small guest: all of it is sent already. Then it was captured stopped.
            self._live = self._once = False
            return
        self._stopped_by_us = False
        await self._until("RESUME", events)
        self._setup = events.time - self._stopped_at
        self._stopped_at = 0.0

    async def _watch(self, events: Events) -> str:
        """Follow the migration to its end; return the status it ended with."""
        assert self._drain is not None  # noqa: S101 - for the type checker
        follow = asyncio.ensure_future(self._follow(events))
        try:
            seen = -1
            seen_at = time.monotonic()
            while not follow.done():
                waiting: set[asyncio.Future[Any]] = {follow}
                if not self._drain.done():
                    waiting.add(self._drain)
                await asyncio.wait(
                    waiting, timeout=_TICK, return_when=asyncio.FIRST_COMPLETED
                )
                if self._drain.done() and not follow.done():
                    self._drain.result()
                stats = self._saver.stats()
                self._progress(stats)
                if stats.bytes_in != seen or self._switching:
                    seen = stats.bytes_in
                    seen_at = time.monotonic()
                elif time.monotonic() - seen_at > _STALL:
                    raise errors.QemuTimeout(
                        f"QEMU (pid {self._qmp.peer_pid}) sent nothing of its state "
                        f"for {_STALL:g} s"
                    )
            return follow.result()
        finally:
            if not follow.done():
                follow.cancel()
                await asyncio.wait({follow})

    def _progress(self, stats: SaverStats) -> None:
        # Short of the whole: a report may take its time with the last word, and
        # the guest would wait.
        done = (stats.pages_seen - stats.pages_resent) * PAGE_SIZE
        self._report.progress(
            "capture", min(done, stats.ram_bytes - 1), stats.ram_bytes
        )

    async def _follow(self, events: Events) -> str:
        async for name, data in events:
            if name == "STOP":
                self._stopped_at = events.time
                if self._refuse and self._live:
                    self._say_refused()
            elif name == "MIGRATION_PASS":
                if self._once and not self._stopped_at and data.get("pass", 0) > 1:
                    raise MissedWrites
                if self._live and data.get("pass", 0) >= _LAST_LIVE_PASS:
                    await self._qmp.execute(
                        "migrate-set-parameters",
                        {"downtime-limit": LONGEST_DOWNTIME_MS},
                    )
            elif name == "MIGRATION":
                status = str(data.get("status"))
                if status == "pre-switchover":
                    await self._stand_still()
                    await self._qmp.execute(
                        "migrate-continue", {"state": "pre-switchover"}
                    )
                elif status in ENDED:
                    self._sent_at = events.time
                    return status
        raise AssertionError("events end with an exception")

    def _say_refused(self) -> None:
        """Tell QEMU that nobody takes this guest over; nothing else answers it."""
        with contextlib.suppress(OSError):  # then its migration fails anyway
            self._ours.send(_REFUSAL, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    async def _stand_still(self) -> None:
        if self._at_standstill is None:
            return
        self._switching = True
        self._still_begin = time.time()
        await self._at_standstill()
        self._still_end = time.time()
        self._switching = False

    async def _resume(self, events: Events, status: str) -> None:
        """Let the guest go on, or see that QEMU did.

        All that QEMU has sent is in the socket by now, so that nothing of it can
        change, even if the last of it is not read yet.
        """
        # Of a live guest whose migration failed QEMU takes care itself.
        if self._stopped_by_us or status == "completed":
            await self._settled()
            await self._qmp.execute("cont")
            self._stopped_by_us = False
        if not self._stopped_at:
            return
        try:
            async with asyncio.timeout(_COMMAND_DEADLINE):
                async for name, _ in events:
                    if name == "RESUME":
                        self._resumed_at = events.time
                        return
        except TimeoutError:
            state = await self._qmp.execute("query-status")
            if not state["running"]:
                # It may be another client's will: it is not for us to run it.
                self._report.note(
                    f"the guest did not go on after the capture: it is "
                    f"{state['status']}; `cont` lets it run"
                )

    async def _finish(self, status: str) -> None:
        """Wait for the end of the stream and check that it is whole."""
        assert self._drain is not None  # noqa: S101 - for the type checker
        try:
            async with asyncio.timeout(_SETTLE_DEADLINE):
                await asyncio.shield(self._drain)
            await asyncio.to_thread(self._saver.end)
        except TimeoutError:
            raise errors.QemuTimeout(
                f"QEMU (pid {self._qmp.peer_pid}) did not close the migration"
            ) from None
        except (errors.Truncated, errors.NotASnapshot) as error:
            if status == "completed":
                raise
            reason = (await query_migrate(self._qmp)).error or str(error)
            raise errors.MigrationFailed(
                f"QEMU gave the capture up ({status}): {reason}"
            ) from error
        stats = self._saver.stats()
        self._report.progress("capture", stats.ram_bytes, stats.ram_bytes)

    def _pause(self) -> Pause:
        if not self._running or not self._stopped_at:
            return Pause()
        overlaid = bool(self._still_end)
        sending = self._still_end if overlaid else self._stopped_at
        end = self._resumed_at or self._sent_at
        waiting = self._still_begin - self._stopped_at if overlaid else 0.0
        return Pause(
            total=self._setup + max(0.0, end - self._stopped_at),
            stop=self._setup + max(0.0, waiting),
            overlay=max(0.0, self._still_end - self._still_begin),
            drain=max(0.0, self._sent_at - sending),
            resume=max(0.0, end - self._sent_at),
        )

    async def undo(self) -> None:
        """Bring the guest back to how it was found, whatever was done so far."""
        self._saver.cancel()
        # QEMU notices a closed connection even while it answers no command.
        with contextlib.suppress(OSError):
            self._ours.shutdown(socket.SHUT_RDWR)
        try:
            await self._let_go()
        except errors.QemuError as error:
            if not self._qmp.closed:
                self._report.note(
                    "the guest could not be brought back to how it was found "
                    f"({error}); when QEMU answers again, `cont` lets it run"
                )
        if self._drain is not None:
            await asyncio.wait({self._drain})
            with contextlib.suppress(Exception):
                self._drain.result()

    async def _let_go(self) -> None:
        if self._qmp.closed:
            return
        await self._qmp.execute("migrate_cancel", timeout=_COMMAND_DEADLINE)
        completed = await self._settled() == "postmigrate"
        if self._stopped_by_us or (self._running and completed):
            await self._qmp.execute("cont", timeout=_COMMAND_DEADLINE)
        with contextlib.suppress(errors.QemuRefused):  # `migrate` took it
            await self._qmp.execute(
                "closefd", {"fdname": self._name}, timeout=_COMMAND_DEADLINE
            )

    async def _settled(self) -> str:
        """Wait until QEMU has done with its migration; return the run state.

        It calls a migration ended a moment before it leaves the run state that
        refuses `cont`.
        """
        deadline = time.monotonic() + _SETTLE_DEADLINE
        while True:
            migration = await query_migrate(self._qmp)
            state = await self._qmp.execute("query-status", timeout=_COMMAND_DEADLINE)
            if not migration.active and state["status"] != "finish-migrate":
                return str(state["status"])
            if time.monotonic() > deadline:
                raise errors.QemuTimeout("QEMU does not end its migration")
            await asyncio.sleep(0.001)

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()
