# SPDX-License-Identifier: LGPL-2.1-or-later
"""Recover: a new pager for a guest that has lost its own.

QEMU has paused its incoming migration; the guest runs on until it touches a page
that is missing. A new connection is made (`migrate-recover`), QEMU says which pages
it has, and delivery goes on. See QEMU's docs/devel/migration/postcopy.rst.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from qemu_pagesaver import control, delivery, errors, postcopy
from qemu_pagesaver import guest as guest_state
from qemu_pagesaver.delivery import (
    Delivery,
    DeliveryOptions,
    Job,
    Link,
    RestoreResult,
)
from qemu_pagesaver.guest import Guest, Lifeline
from qemu_pagesaver.migration import LOST_SOURCE
from qemu_pagesaver.report import Silent
from qemu_pagesaver.snapshot import Snapshot

if TYPE_CHECKING:
    from qemu_pagesaver.report import Report

_PAUSE_TIMEOUT = 10.0
_CONNECT_TIMEOUT = 3.0
_POLL = 0.01
_NOT_PAUSED = "when postcopy is paused"


def recover(
    file: str | os.PathLike[str],
    *,
    attach: str,
    source: str | os.PathLike[str] | None = None,
    force: bool = False,
    socket_dir: str | None = None,
    report: Report | None = None,
    **options: Unpack[DeliveryOptions],
) -> RestoreResult:
    """Synchronous :func:`recover_async`."""
    return asyncio.run(
        recover_async(
            file,
            attach=attach,
            source=source,
            force=force,
            socket_dir=socket_dir,
            report=report,
            **options,
        )
    )


async def recover_async(
    file: str | os.PathLike[str],
    *,
    attach: str,
    source: str | os.PathLike[str] | None = None,
    force: bool = False,
    socket_dir: str | None = None,
    report: Report | None = None,
    **options: Unpack[DeliveryOptions],
) -> RestoreResult:
    """Take over a guest whose pager is gone, and stay until all is loaded.

    Args:
        file: The snapshot that it was restored from.
        attach: Its QMP socket.
        source: Another copy of the file, to be read instead.
        options: Fields of ``Delivery``; the second connection is there if it was.
        force: Where no record says what the guest was restored from, believe
            that it was ``file``.
        socket_dir: Where QEMU is to listen.
        report: Gets events, as in a restore.

    Raises:
        GuestBusy: It has a pager, or needs none.
        MachineMismatch: It was restored from another snapshot.
    """
    started = time.monotonic()
    report = report or Silent()
    how = Delivery(**options)
    with Snapshot.open(source or file) as snapshot, delivery.trace_file(how) as trace:
        report.event("started", snapshot=str(snapshot.path), uuid=snapshot.uuid)
        if source is not None:
            _check_copy(file, snapshot)
        pid = await asyncio.to_thread(control.peer_pid, attach)
        if pid is None:
            raise errors.QmpUnreachable(
                f"QMP socket {attach}: nobody listens there",
                hint="Give the QMP socket of the guest; has QEMU ended?",
            )
        # Where a manager has opened the QMP socket, pid is the manager's.
        known = control.find_record(pid, control.absolute(attach))
        pid = known.record.pid if known else pid
        with control.guest_lock(pid):
            record = _checked_record(known, pid, snapshot, force=force)
            async with _find(attach, pid, record) as guest:
                return await _recover(
                    snapshot,
                    guest,
                    record,
                    attach=attach,
                    socket_dir=socket_dir,
                    options=how,
                    trace=trace,
                    report=report,
                    started=started,
                )


def _check_copy(file: str | os.PathLike[str], copy: Snapshot) -> None:
    """Refuse a copy that is of another snapshot, if the original can tell."""
    try:
        with Snapshot.open(file) as original:
            uuid = original.uuid
    except errors.PagesaverError:
        return
    if uuid != copy.uuid:
        raise errors.MachineMismatch(
            f"{copy.path} (uuid {copy.uuid}) is no copy of {os.fspath(file)} "
            f"(uuid {uuid})",
            hint="Give a copy of the same snapshot to --from.",
        )


def _checked_record(
    known: control.Running | None, pid: int, snapshot: Snapshot, *, force: bool
) -> control.Record | None:
    """Return what the lost pager wrote down, if it fits.

    Raises:
        MachineMismatch: The guest was restored from another snapshot.
    """
    if known is None:
        if force:
            return None
        raise errors.MachineMismatch(
            f"nothing is known about the guest of QEMU (pid {pid}): pages of another "
            f"snapshot than {snapshot.path} would destroy it",
            hint="If it was restored from this very snapshot, say so with --force.",
        )
    if known.record.uuid != snapshot.uuid:
        raise errors.MachineMismatch(
            f"the guest of QEMU (pid {pid}) was restored from {known.record.snapshot} "
            f"(uuid {known.record.uuid}), and {snapshot.path} has uuid {snapshot.uuid}",
            hint="Give the file that it was restored from, or a copy of it.",
        )
    return known.record


@contextlib.asynccontextmanager
async def _find(
    attach: str, pid: int, record: control.Record | None
) -> AsyncIterator[Guest]:
    """Yield the guest; its QMP is connected only when it is needed.

    While the guest waits for a page, QEMU's main loop may wait with it, and
    no new QMP connection can be negotiated.
    """
    directory = Path(record.directory) if record and record.directory else None
    path = record.control if record else attach
    guest = Guest(
        pid=pid,
        qmp=None,
        qmp_path=control.absolute(path),
        directory=directory,
        lifeline=None if directory is None else Lifeline.in_directory(directory),
    )
    guest.ran = True
    try:
        yield guest
    finally:
        await guest.close()


async def _recover(
    snapshot: Snapshot,
    guest: Guest,
    record: control.Record | None,
    *,
    attach: str,
    socket_dir: str | None,
    options: Delivery,
    trace: int,
    report: Report,
    started: float,
) -> RestoreResult:
    preempt = record.preempt if record else await _has_preempt(guest)
    page_sizes = await _page_sizes(guest, record, snapshot)
    path = delivery.migration_socket(socket_dir, guest)
    path.unlink(missing_ok=True)
    try:
        await _migrate_recover(guest, f"unix:{path}")
        async with delivery.connect(guest, path, preempt=preempt) as link:
            path.unlink(missing_ok=True)
            found = {block.name: block.length for block in snapshot.image.ram_blocks}
            bitmaps = await _ask_bitmaps(link, found)
            await _resume(link)
            blocks = [
                postcopy.Block(name=block.name, length=block.length, page_size=size)
                for block, size in zip(
                    snapshot.image.ram_blocks, page_sizes, strict=True
                )
            ]
            new = control.Record(
                pid=guest.pid,
                started=control.start_time(guest.pid) or 0,
                name=record.name if record else snapshot.path.stem,
                snapshot=control.real_path(snapshot.path),
                uuid=snapshot.uuid,
                pager=os.getpid(),
                since=time.time(),
                qmp=record.qmp if record else control.absolute(attach),
                control=guest.qmp_path,
                preempt=preempt,
                page_sizes=page_sizes,
                capabilities=record.capabilities if record else {},
                directory=record.directory if record else "",
            )
            control.write_record(new)
            pager = delivery.make_pager(
                snapshot, link, blocks, options, guest, trace=trace
            )
            for index, bitmap in enumerate(bitmaps):
                pager.set_received(index, bitmap)
            received = sum(bitmap.bit_count() for bitmap in map(_number, bitmaps))
            report.event("running", pid=guest.pid, pages_received=received)
            job = Job(
                guest=guest,
                snapshot=snapshot,
                link=link,
                record=new,
                pager=pager,
                options=options,
                report=report,
                started=started,
                answered=None,
                paused=False,
                place=None,
            )
            return await delivery.serve(job)
    finally:
        path.unlink(missing_ok=True)


def _number(bitmap: bytes) -> int:
    return int.from_bytes(bitmap, "little")


async def _has_preempt(guest: Guest) -> bool:
    """Ask whether QEMU expects the second channel; no record tells it."""
    qmp = await guest.reconnect(_CONNECT_TIMEOUT)
    answer = await qmp.execute("query-migrate-capabilities")
    return any(
        item["capability"] == "postcopy-preempt" and item["state"] for item in answer
    )


async def _execute(
    guest: Guest, command: str, arguments: dict[str, object] | None = None
) -> Any:
    """Execute a command that works out of band, by the way that is open."""
    if guest.lifeline is not None:
        with contextlib.suppress(errors.QmpUnreachable):
            return await guest.lifeline.execute_oob(command, arguments)
    try:
        qmp = await guest.reconnect(_CONNECT_TIMEOUT)
    except errors.QmpUnreachable as error:
        raise errors.QmpUnreachable(
            error.message,
            hint="If nobody else uses that socket, QEMU waits for a page itself: then "
            "only a QMP connection that was there before can let it go on.",
        ) from error
    return await qmp.execute(command, arguments)


async def _migrate_recover(guest: Guest, uri: str) -> None:
    """Let QEMU listen for its new source.

    A dead connection that QEMU has not noticed yet is closed first.

    Raises:
        GuestBusy: It does not wait for one.
    """
    deadline = time.monotonic() + _PAUSE_TIMEOUT
    paused = False
    while True:
        try:
            await _execute(guest, "migrate-recover", {"uri": uri})
        except errors.QemuRefused as error:
            if _NOT_PAUSED not in error.message:
                raise
        else:
            return
        if not paused:
            paused = True
            try:
                await _execute(guest, "migrate-pause")
            except errors.QemuRefused:
                raise await _needs_none(guest) from None
        if time.monotonic() > deadline:
            raise errors.QemuTimeout(
                f"QEMU (pid {guest.pid}) does not pause its migration"
            )
        await asyncio.sleep(_POLL)


async def _needs_none(guest: Guest) -> errors.GuestBusy:
    state = "not known"
    with contextlib.suppress(errors.PagesaverError):
        qmp = await guest.reconnect(_CONNECT_TIMEOUT)
        answer = await qmp.execute("query-migrate")
        state = answer.get("status", "none")
    if state in LOST_SOURCE:
        text = "is being recovered by somebody else"
    else:
        text = f"waits for no pager (its migration is {state!r})"
    return errors.GuestBusy(f"QEMU (pid {guest.pid}) {text}")


async def _ask_bitmaps(link: Link, lengths: dict[str, int]) -> list[bytes]:
    """Ask which pages QEMU has; a bitmap for each block, in order."""
    doing = "when it was asked for the pages that it has"
    link.expect_blocks(lengths)
    bitmaps = []
    for name in lengths:
        await link.send(postcopy.recv_bitmap(name), doing)
        message = await link.receive(postcopy.Reply.RECV_BITMAP, None, doing)
        if message.block != name:
            raise errors.PeerNonsense(
                f"QEMU sent a bitmap of {message.block} when asked for one of {name}"
            )
        bitmaps.append(message.bitmap)
    return bitmaps


async def _resume(link: Link) -> None:
    doing = "when it was to go on"
    await link.send(postcopy.resume(), doing)
    message = await link.receive(postcopy.Reply.RESUME_ACK, None, doing)
    postcopy.check_resume_ack(message)


async def _page_sizes(
    guest: Guest, record: control.Record | None, snapshot: Snapshot
) -> list[int]:
    """Return the page size of each block's memory; QEMU may be unable to say."""
    blocks = snapshot.image.ram_blocks
    if record is not None:
        if len(record.page_sizes) != len(blocks):
            raise errors.MachineMismatch(
                f"the record of QEMU (pid {guest.pid}) is not of {snapshot.path}"
            )
        return list(record.page_sizes)
    qmp = await guest.reconnect(_CONNECT_TIMEOUT)
    found = await guest_state.ram_blocks(qmp)
    matched = delivery.match_blocks(blocks, found, where=f"QEMU (pid {guest.pid})")
    return [block.page_size for block in matched]
