# SPDX-License-Identifier: LGPL-2.1-or-later
"""Save: a running QEMU guest becomes a snapshot file, and the guest goes on.

Everything that can be known is checked before anything changes. The guest waits for
the capture only; ordering, compressing and writing come when it runs again.
Whatever fails or is interrupted, the guest is left as it was found, and no file.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import shutil
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qemu_pagesaver import (
    __version__,
    command_line,
    control,
    devices,
    errors,
    process,
)
from qemu_pagesaver import (
    disks as disk_state,
)
from qemu_pagesaver.capture import MissedWrites, Pause, capture
from qemu_pagesaver.files import AtomicFile, is_memory, spool_directory, spool_file
from qemu_pagesaver.locality import locate
from qemu_pagesaver.migration import query_capabilities, query_migrate, to_the_end
from qemu_pagesaver.native import Saver, SaverStats, Section
from qemu_pagesaver.option_string import OptionString
from qemu_pagesaver.qmp import Qmp
from qemu_pagesaver.report import Report, Silent
from qemu_pagesaver.snapshot import DEFAULT_COMPRESSION, Meta, zstd_level
from qemu_pagesaver.work import in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
    from contextlib import AbstractContextManager

DEFAULT_PAGES_PER_BLOCK = 16

_NO_PARENT = bytes(16)
_MAX_PAGES_PER_BLOCK = 512
# A disk place for a spool whose snapshot goes to a file system in memory.
_DISK_PLACE = Path("/var/tmp")  # noqa: S108 - files there have no name
# Of the memory in use, the share that is surely not zero, nor equal to another.
_SURELY_DISTINCT = 32
_QUIT_DEADLINE = 30.0
_SETTLE_DEADLINE = 5.0
# States in which a guest is not running and can be saved as "paused".
_STANDING = frozenset(
    ("paused", "prelaunch", "io-error", "watchdog", "guest-panicked", "shutdown")
)
_CHOICES_HINT = (
    "Give --disks overlay (the guest goes on writing to overlays, the snapshot keeps "
    "the disks as they are now), check (a restore refuses disks that have changed) or "
    "none (you take care of them)."
)


@dataclass(frozen=True, kw_only=True)
class PageCounts:
    """Pages of 4096 bytes by what they are in the file."""

    zero: int
    fill: int
    data: int
    shared: int


@dataclass(frozen=True, kw_only=True)
class SaveResult:
    """What a save did; bytes, and seconds.

    Attributes:
        snapshot: The file.
        bytes: Its size.
        pages: ``data`` pages have bytes in it, ``shared`` ones refer to those.
        downtime: How long the guest did not run; 0 if it was paused.
        pause: The parts of that.
        duration: Of the whole save.
        uuid: Of the snapshot.
        run_state: ``running`` or ``paused``: what the guest was.
        disks: As META records them.
        notes: Sentences about what a restore will not have.
    """

    snapshot: str
    bytes: int
    pages: PageCounts
    downtime: float
    pause: Pause
    duration: float
    uuid: str
    run_state: str
    disks: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """Return the document of ``--json``."""
        return {
            "snapshot": self.snapshot,
            "bytes": self.bytes,
            "pages": vars(self.pages),
            "downtime": self.downtime,
            "duration": self.duration,
            "pause": {
                "stop": self.pause.stop,
                "overlay": self.pause.overlay,
                "drain": self.pause.drain,
                "resume": self.pause.resume,
            },
            "uuid": self.uuid,
            "run-state": self.run_state,
            "disks": list(self.disks),
            "notes": list(self.notes),
        }


def save(
    qmp_socket: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    quit: bool = False,  # noqa: A002 - QMP's own word
    disks: str | None = None,
    compression: str = DEFAULT_COMPRESSION,
    spool_dir: str | os.PathLike[str] | None = None,
    pid: int | None = None,
    pages_per_block: int = DEFAULT_PAGES_PER_BLOCK,
    live: bool = True,
    report: Report | None = None,
) -> SaveResult:
    """Synchronous :func:`save_async`."""
    return asyncio.run(
        save_async(
            qmp_socket,
            output,
            quit=quit,
            disks=disks,
            compression=compression,
            spool_dir=spool_dir,
            pid=pid,
            pages_per_block=pages_per_block,
            live=live,
            report=report,
        )
    )


async def save_async(
    qmp_socket: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    quit: bool = False,  # noqa: A002 - QMP's own word
    disks: str | None = None,
    compression: str = DEFAULT_COMPRESSION,
    spool_dir: str | os.PathLike[str] | None = None,
    pid: int | None = None,
    pages_per_block: int = DEFAULT_PAGES_PER_BLOCK,
    live: bool = True,
    report: Report | None = None,
) -> SaveResult:
    """Save the guest behind a QMP socket into a new snapshot file.

    Args:
        qmp_socket: Unix socket of QEMU's QMP server.
        output: The file to make; it must not exist.
        quit: End QEMU when the file is whole.
        disks: What becomes of writable disks: ``overlay``, ``check`` or ``none``.
            None: ``check`` with ``quit`` or where there are none, else an error.
        compression: ``none``, ``zstd`` or ``zstd:LEVEL``.
        spool_dir: Where distinct pages wait for the second pass; None: beside
            ``output``, or in /var/tmp where that is in memory.
        pid: QEMU's process, where a manager owns the socket.
        pages_per_block: Pages in a locality block, a power of two up to 512.
        live: Whether memory may be sent while the guest still runs: the pause is
            shorter, and the snapshot not of the instant of the call.
        report: Follows the work.

    Raises:
        PagesaverError: See :mod:`qemu_pagesaver.errors`; the guest is as it was.
    """
    if pages_per_block not in (
        1 << n for n in range(_MAX_PAGES_PER_BLOCK.bit_length())
    ):
        raise errors.UsageError(
            f"pages per block: {pages_per_block} is no power of two from 1 to "
            f"{_MAX_PAGES_PER_BLOCK}"
        )
    if disks is not None and disks not in disk_state.MODES:
        raise errors.UsageError(
            f"disks {disks!r} is not known",
            hint=f"One of {', '.join(disk_state.MODES)}.",
        )
    level = zstd_level(compression)
    started = time.monotonic()
    path = Path(output)
    with AtomicFile(path) as target:
        async with await Qmp.connect(qmp_socket) as qmp:
            guest = await _examine(
                qmp, pid=pid, quitting=quit, disks=disks, report=report or Silent()
            )
            place = guest.spool(spool_dir, path)

            @contextlib.contextmanager
            def open_saver() -> Iterator[Saver]:
                with spool_file(place) as spool, spool_file(place) as units:
                    yield Saver(
                        spool_fd=spool,
                        units_fd=units,
                        pages_per_block=pages_per_block,
                        zstd_level=level,
                        threads=max(1, min(len(os.sched_getaffinity(0)), 16)),
                        name=f"state of QEMU (QMP socket {qmp.path})",
                    )

            return await _save(
                guest,
                open_saver,
                target,
                quitting=quit,
                live=live,
                compression=compression,
                started=started,
            )


# ------------------------------------------------------- before anything changes


@dataclass(frozen=True, kw_only=True)
class _Guest:
    """What was found out about the guest before anything changed."""

    qmp: Qmp
    report: Report
    pid: int | None
    running: bool
    ram_bytes: int
    disk_mode: str
    disks: tuple[disk_state.Disk, ...]
    version: str
    architecture: str | None
    binary: str | None
    arguments: tuple[str, ...] | None
    directory: str | None
    capabilities: tuple[str, ...]
    hotplugged: tuple[dict[str, str], ...]
    notes: tuple[str, ...]

    def spool(self, wanted: str | os.PathLike[str] | None, output: Path) -> Path:
        """Return the directory of the spool, checked."""
        used = process.resident_bytes(self.pid) if self.pid is not None else None
        bound = min(self.ram_bytes, used or self.ram_bytes)
        beside = output
        if wanted is None and is_memory(output.parent):
            # What waits for the second pass must not take the host's memory
            # unless somebody wants that.
            if not _DISK_PLACE.is_dir() or is_memory(_DISK_PLACE):
                raise errors.UsageError(
                    f"spool into {output.parent}: it is in memory",
                    hint="Name a directory with --spool-dir, if need be that one.",
                )
            beside = _DISK_PLACE / output.name
        place = spool_directory(wanted, beside=beside, need=bound // _SURELY_DISTINCT)
        free = shutil.disk_usage(place).free
        if free < bound:
            self.report.detail(
                f"{place} has {free} bytes free; the guest has up to {bound} in use"
            )
        return place


async def _examine(
    qmp: Qmp, *, pid: int | None, quitting: bool, disks: str | None, report: Report
) -> _Guest:
    """Find out all about a guest, and refuse one that cannot be saved."""
    notes: list[str] = []
    found = process.find_qemu(qmp.path, peer=qmp.peer_pid, pid=pid)
    served = found is not None and await control.finish_guest(found, report)
    await _require_idle(qmp, settle=served)
    state = (await qmp.execute("query-status"))["status"]
    _require_saveable(qmp, state)
    arguments: tuple[str, ...] | None = None
    directory: str | None = None
    raw: Sequence[str] = ()
    if found is None:
        notes.append(
            "QEMU's process cannot be seen from here, so that its command line is not "
            "recorded; a restore will need one after `--`"
        )
    else:
        raw = command_line.read(found)
        # Of another user's process it cannot be seen; then relative names in the
        # command line are refused at the restore.
        with contextlib.suppress(errors.IoError):
            directory = command_line.working_directory(found)
        recorded = command_line.record(raw)
        arguments = tuple(recorded.argv)
        notes.extend(recorded.notes)
    summary = await qmp.execute("query-memory-size-summary")
    inspected = await disk_state.inspect(qmp, pid=found)
    mode = _disk_mode(inspected, disks, quitting=quitting)
    hotplugged, unplugged = await _plugged(qmp, raw)
    notes.extend(
        f"device {device['id']} ({device['driver']}) was hot-plugged"
        for device in hotplugged
    )
    notes.extend(
        f"device {name} of the command line has been unplugged" for name in unplugged
    )
    for note in notes:
        report.note(note)
    capabilities = await query_capabilities(qmp)
    return _Guest(
        qmp=qmp,
        report=report,
        pid=found,
        running=state == "running",
        ram_bytes=summary["base-memory"] + summary.get("plugged-memory", 0),
        disk_mode=mode,
        disks=tuple(inspected),
        version=await qmp.version(),
        architecture=(await qmp.execute("query-target")).get("arch"),
        binary=process.binary_name(found) if found is not None else None,
        arguments=arguments,
        directory=directory,
        capabilities=tuple(sorted(name for name, on in capabilities.items() if on)),
        hotplugged=tuple(hotplugged),
        notes=tuple(notes),
    )


async def _require_idle(qmp: Qmp, *, settle: bool) -> None:
    """Raise unless no migration is active and one may begin."""
    deadline = time.monotonic() + (_SETTLE_DEADLINE if settle else 0.0)
    while True:
        migration = await query_migrate(qmp)
        if not migration.active or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.01)
    if migration.lost_source:
        raise errors.GuestBusy(
            f"the guest of QMP socket {qmp.path} waits for memory that is missing: its "
            f"pager is gone ({migration.status})",
            hint=f"Bring it on with `recover SNAPSHOT --attach {qmp.path}`.",
        )
    if migration.active:
        raise errors.GuestBusy(
            f"the guest of QMP socket {qmp.path} has a migration under way "
            f"({migration.status})",
            hint="Wait for its end, or cancel it with migrate_cancel.",
        )
    if migration.blocked_reasons:
        raise errors.QemuRefused(
            f"the guest of QMP socket {qmp.path} cannot be saved: "
            + "; ".join(reason.rstrip(".") for reason in migration.blocked_reasons),
            hint="Unplug what QEMU cannot migrate.",
        )


def _require_saveable(qmp: Qmp, state: str) -> None:
    if state == "running" or state in _STANDING:
        return
    hints = {
        "postmigrate": "QEMU migrates it again only after it has run: `cont` it.",
        "suspended": "Wake it up with system_wakeup.",
        "inmigrate": "Wait until it is restored.",
    }
    raise errors.GuestBusy(
        f"the guest of QMP socket {qmp.path} cannot be saved while it is {state!r}",
        hint=hints.get(state, ""),
    )


def _disk_mode(
    found: Sequence[disk_state.Disk], wanted: str | None, *, quitting: bool
) -> str:
    writable = disk_state.needs_choice(found)
    if wanted is None:
        if writable and not quitting:
            names = ", ".join(disk.name for disk in writable)
            raise errors.DisksChoiceNeeded(
                f"the guest goes on and would write to {names}: overlay, check or none "
                "must be chosen for its disks",
                hint=_CHOICES_HINT,
            )
        wanted = "check"
    disk_state.require_mode(found, wanted)
    return wanted


async def _plugged(
    qmp: Qmp, arguments: Sequence[str]
) -> tuple[list[dict[str, str]], list[str]]:
    """Compare devices that have an id with those of the command line."""
    named: dict[str, str] = {}
    known: set[str] = set()
    for option, value in itertools.pairwise(arguments):
        with contextlib.suppress(ValueError):
            parsed = OptionString.parse(value, implied="driver")
            if name := parsed.get("id"):
                known.add(name)
                if option in ("-device", "--device"):
                    named[name] = parsed.get("driver")
    if not arguments:
        return [], []
    present = {
        entry["name"]: entry["type"].removeprefix("child<").removesuffix(">")
        for entry in await qmp.execute("qom-list", {"path": "/machine/peripheral"})
        if entry["type"].startswith("child<")
    }
    hotplugged = [
        {"id": name, "driver": driver}
        for name, driver in sorted(present.items())
        if name not in known
    ]
    return hotplugged, sorted(set(named) - set(present))


# ------------------------------------------------------------------ the save


async def _save(
    guest: _Guest,
    open_saver: Callable[[], AbstractContextManager[Saver]],
    target: AtomicFile,
    *,
    quitting: bool,
    live: bool,
    compression: str,
    started: float,
) -> SaveResult:
    report = guest.report
    report.event("started", verb="save", snapshot=str(target.path), pid=guest.pid)
    async with contextlib.AsyncExitStack() as stack:
        disks = await stack.enter_async_context(_Disks(guest))
        opened = stack.enter_context(contextlib.ExitStack())

        async def capture_into_new(*, live: bool) -> tuple[Saver, Pause]:
            saver = opened.enter_context(open_saver())
            pause = await capture(
                guest.qmp,
                saver,
                running=guest.running,
                go_on=not quitting,
                live=live,
                at_standstill=disks.at_standstill if disks.concerned else None,
                report=report,
            )
            return saver, pause

        try:
            saver, pause = await capture_into_new(live=live)
        except MissedWrites:
            opened.close()
            saver, pause = await capture_into_new(live=False)
        async with _running_on_failure(guest, stopped=guest.running and quitting):
            if guest.running and not quitting:
                report.event("running", downtime=pause.total)
            else:
                disks.stamp()
            meta = _meta(
                guest,
                saver,
                disks,
                pause=pause,
                compression=compression,
                started=started,
            )
            meta = await in_thread(
                functools.partial(locate, saver, meta), cancel=saver.cancel
            )
            saver.set_section(Section.META, meta.to_bytes())
            if guest.running:
                await asyncio.to_thread(_record_running, saver)
            identity = uuid.uuid4()
            size = await _write(saver, target, identity, report)
        stats = saver.stats()
    if quitting:
        await _whatever_comes(_quit(guest, target.path))
    result = SaveResult(
        snapshot=str(target.path),
        bytes=size,
        pages=PageCounts(
            zero=stats.pages_zero,
            fill=stats.pages_fill,
            data=stats.pages_data,
            shared=stats.pages_shared,
        ),
        downtime=pause.total,
        pause=pause,
        duration=time.monotonic() - started,
        uuid=str(identity),
        run_state=meta.run_state or "",
        disks=tuple(dict(disk) for disk in meta.disks),
        notes=guest.notes,
    )
    report.event("complete", snapshot=str(target.path), bytes=size)
    return result


class _Disks:
    """A guest's disks during a save; what was done to them is undone on failure."""

    def __init__(self, guest: _Guest) -> None:
        self._guest = guest
        self._overlays: disk_state.Overlays | None = None
        self._recorded = disk_state.with_mode(guest.disks, guest.disk_mode)
        writable = disk_state.needs_choice(guest.disks)
        # A stamp of a disk that is written to is one of an instant.
        self.concerned = bool(writable) and guest.disk_mode != "none"

    @property
    def documents(self) -> tuple[dict[str, Any], ...]:
        """The disks as META records them."""
        return tuple(disk.document() for disk in self._recorded)

    async def __aenter__(self) -> _Disks:
        """Make overlays, to which nothing is written yet."""
        if self.concerned and self._guest.disk_mode == "overlay":
            self._overlays = await disk_state.prepare_overlays(
                self._guest.qmp, self._guest.disks
            )
        return self

    async def at_standstill(self) -> None:
        """Freeze the disks at the instant of the snapshot."""
        if self._overlays is not None:
            await self._overlays.switch()
        self.stamp()

    def stamp(self) -> None:
        """Take stamps of the disks; the guest does not run."""
        self._recorded = disk_state.restamp(self._recorded)

    async def __aexit__(self, kind: object, *_: object) -> None:
        """Undo on failure."""
        if kind is not None and self._overlays is not None:
            try:
                await to_the_end(self._overlays.undo())
            except errors.PagesaverError as error:
                names = ", ".join(made.filename for made in self._overlays.made)
                self._guest.report.note(
                    f"the guest stays on its overlays ({names}): {error}"
                )


@contextlib.asynccontextmanager
async def _running_on_failure(guest: _Guest, *, stopped: bool) -> AsyncIterator[None]:
    """Let a guest that was stopped for good go on after all."""
    try:
        yield
    except BaseException:
        if stopped:
            with contextlib.suppress(errors.QemuError):
                await to_the_end(guest.qmp.execute("cont"))
        raise


def _record_running(saver: Saver) -> None:
    """Record a guest as running that QEMU saw paused, as we had stopped it."""
    recorded = saver.section(Section.DEVICES)
    changed = devices.with_run_state(
        recorded,
        saver.section(Section.DESCRIPTION),
        footers=saver.stream_info().footers,
        state="running",
    )
    if changed != recorded:
        saver.set_section(Section.DEVICES, changed)


def _meta(
    guest: _Guest,
    saver: Saver,
    disks: _Disks,
    *,
    pause: Pause,
    compression: str,
    started: float,
) -> Meta:
    configuration = saver.section(Section.CONFIGURATION)
    return Meta(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        creator=f"qemu-pagesaver {__version__}",
        machine=devices.machine_name(configuration) if configuration else None,
        qemu_version=guest.version,
        architecture=guest.architecture,
        run_state="running" if guest.running else "paused",
        command_line=guest.arguments,
        working_directory=guest.directory,
        qemu_binary=guest.binary,
        capabilities=guest.capabilities,
        disks=disks.documents,
        hotplugged=guest.hotplugged,
        compression=compression,
        pause=pause.total,
        duration=time.monotonic() - started,
    )


async def _write(
    saver: Saver, target: AtomicFile, identity: uuid.UUID, report: Report
) -> int:
    """Write the snapshot and give it its name; return its size."""
    await in_thread(
        lambda: saver.write(
            target.fd, uuid=identity.bytes, parent=_NO_PARENT, name=str(target.path)
        ),
        cancel=saver.cancel,
        watch=lambda: _progress(report, saver.stats()),
    )
    try:
        # The long part of commit(), which cannot be interrupted.
        await asyncio.to_thread(os.fsync, target.fd)
        size = os.fstat(target.fd).st_size
    except OSError as error:
        kind = errors.class_for_errno(error.errno or 0)
        raise kind(f"write {target.path}: {error.strerror}") from error
    # No await between here and the end of a save that goes on: it has happened.
    target.commit()
    return size


def _progress(report: Report, stats: SaverStats) -> None:
    if stats.blocks_total:
        done = stats.spool_bytes * stats.blocks_written // stats.blocks_total
        report.progress("write", done, stats.spool_bytes)


async def _quit(guest: _Guest, path: Path) -> None:
    """End QEMU, and wait until it has ended."""
    started = control.start_time(guest.pid) if guest.pid is not None else None
    with contextlib.suppress(errors.QemuDied):
        await guest.qmp.execute("quit")
    try:
        async with asyncio.timeout(_QUIT_DEADLINE):
            await guest.qmp.wait_closed()
            while (  # noqa: ASYNC110 - the end of a process is no event
                started is not None and control.start_time(guest.pid or 0) == started
            ):
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise errors.QemuTimeout(
            f"QEMU (QMP socket {guest.qmp.path}) does not end within "
            f"{_QUIT_DEADLINE:g} s of `quit`",
            hint=f"{path} is whole: the guest can be ended by force.",
        ) from None


async def _whatever_comes(work: Coroutine[Any, Any, None]) -> None:
    """Await ``work``; an interruption comes too late to change anything."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({task})
    task.result()
