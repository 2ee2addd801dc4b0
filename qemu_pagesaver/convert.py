# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU's stream files to snapshots and back; what a file is, its magic says."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import stat
import sys
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from qemu_pagesaver import __version__, errors, files
from qemu_pagesaver import devices as device_state
from qemu_pagesaver.locality import locate
from qemu_pagesaver.native import PAGE_SIZE, Job, Saver, SaverStats, Section
from qemu_pagesaver.report import Report, Silent
from qemu_pagesaver.snapshot import (
    DEFAULT_COMPRESSION,
    LIBVIRT_MAGIC,
    MAGIC,
    STREAM_MAGIC,
    Meta,
    Snapshot,
    head,
    open_regular,
    zstd_level,
)
from qemu_pagesaver.work import in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

Format: TypeAlias = Literal["psnap", "stream"]
StrPath: TypeAlias = "str | os.PathLike[str]"

_PAGES_PER_BLOCK = 16
_MAX_THREADS = 8
# 0x06 and be32 length, before the JSON description.
_DESCRIPTION_HEADER = 5


@dataclass(frozen=True, kw_only=True)
class Pages:
    """Pages of a snapshot by class; ``data`` are stored once, ``shared`` not."""

    zero: int
    fill: int
    data: int
    shared: int


@dataclass(frozen=True, kw_only=True)
class Converted:
    """What a conversion made; ``bytes`` of the new file, ``duration`` seconds.

    ``run_state`` is what the guest will be when it is restored by default:
    "running" or "paused".
    """

    source: str
    target: str
    format: Format
    bytes: int
    pages: Pages
    machine: str | None
    run_state: str | None
    duration: float


def convert(
    source: StrPath,
    target: StrPath,
    *,
    to: Format | None = None,
    compression: str = DEFAULT_COMPRESSION,
    spool_dir: StrPath | None = None,
    report: Report | None = None,
) -> Converted:
    """Convert a file; see :func:`convert_async`."""
    return asyncio.run(
        convert_async(
            source,
            target,
            to=to,
            compression=compression,
            spool_dir=spool_dir,
            report=report,
        )
    )


async def convert_async(
    source: StrPath,
    target: StrPath,
    *,
    to: Format | None = None,
    compression: str = DEFAULT_COMPRESSION,
    spool_dir: StrPath | None = None,
    report: Report | None = None,
) -> Converted:
    """Convert a stream file to a snapshot, or a snapshot to a stream file.

    Args:
        source: A file, or "-": a stream on standard input.
        target: The new file; it must not exist.
        to: The format wanted; None: the one that ``source`` is not. A snapshot
            may become a snapshot again, with another compression.
        compression: Of a new snapshot: none, zstd, zstd:LEVEL.
        spool_dir: Where pages are kept meanwhile; None: beside ``target``.
        report: Gets progress and notes.

    Raises:
        SnapshotError: ``source`` is neither, or is damaged.
        HostError: ``target`` cannot be written, or exists.
    """
    report = report or Silent()
    began = time.monotonic()
    level = zstd_level(compression)
    with files.AtomicFile(target) as new:
        async with _opened_source(source) as (fd, start):
            is_stream = _format(start, os.fspath(source)) == "stream"
            wanted = to or ("psnap" if is_stream else "stream")
            if is_stream and wanted == "stream":
                raise errors.UsageError(
                    f"{os.fspath(source)} is a stream already", hint="Copy it."
                )
            place = files.spool_directory(spool_dir, beside=target, need=0)
            writer = _Writer(
                fd=new.fd,
                name=os.fspath(target),
                place=place,
                level=level,
                compression=compression,
                report=report,
            )
            if is_stream:
                first = b"" if _is_seekable(fd) else start
                pages, meta = await writer.write(fd, os.fspath(source), first)
                machine, run_state = meta.machine, meta.run_state
            else:
                with Snapshot.of_descriptor(fd, path=source) as snapshot:
                    machine = snapshot.machine
                    run_state = snapshot.meta.run_state or _recorded(snapshot)
                    pages = _pages_of(snapshot)
                    if wanted == "stream":
                        await _export(snapshot, new, report)
                    else:
                        await _rewrite(snapshot, writer)
        size = os.fstat(new.fd).st_size
        # Only then the name, at once: an interruption leaves nothing.
        await in_thread(new.sync, cancel=lambda: None)
        new.commit()
    return Converted(
        source=os.fspath(source),
        target=os.fspath(target),
        format=wanted,
        bytes=size,
        pages=pages,
        machine=machine,
        run_state=run_state,
        duration=time.monotonic() - began,
    )


@contextlib.asynccontextmanager
async def opened(
    path: StrPath,
    *,
    spool_dir: StrPath | None = None,
    report: Report | None = None,
) -> AsyncIterator[Snapshot]:
    """Open a snapshot, or a stream file as if it were one.

    A stream is converted into a file without a name in ``spool_dir`` (None: the
    directory of temporary files on disk, /var/tmp).
    """
    async with _opened_source(path) as (fd, start):
        if _format(start, os.fspath(path)) == "psnap":
            with Snapshot.of_descriptor(fd, path=path) as snapshot:
                yield snapshot
            return
        place = Path(spool_dir) if spool_dir is not None else default_spool()
        with files.spool_file(place) as image_fd:
            writer = _Writer(
                fd=image_fd,
                name=f"temporary file in {place}",
                place=place,
                level=zstd_level("none"),
                compression="none",
                report=report or Silent(),
            )
            first = b"" if _is_seekable(fd) else start
            await writer.write(fd, os.fspath(path), first)
            with Snapshot.of_descriptor(image_fd, path=path) as snapshot:
                yield snapshot


def default_spool() -> Path:
    """Return where to spool when no file is written: on disk, if there is one."""
    for each in (os.environ.get("TMPDIR"), "/var/tmp", "/tmp"):  # noqa: S108 - no names are made there
        if each and os.access(each, os.W_OK | os.X_OK):
            return Path(each)
    return Path()


# ------------------------------------------------------------------- source


@contextlib.asynccontextmanager
async def _opened_source(path: StrPath) -> AsyncIterator[tuple[int, bytes]]:
    """Yield descriptor and first bytes of a file or of standard input."""
    piped = os.fspath(path) == "-"
    fd = os.dup(sys.stdin.fileno()) if piped else open_regular(path)
    try:
        try:
            start = head(fd) if _is_seekable(fd) else await _read_start(fd)
        except OSError as error:
            raise errors.from_os_error(error, f"read {os.fspath(path)}") from error
        yield fd, start
    finally:
        os.close(fd)


def _is_seekable(fd: int) -> bool:
    return stat.S_ISREG(os.fstat(fd).st_mode) or stat.S_ISBLK(os.fstat(fd).st_mode)


async def _read_start(fd: int) -> bytes:
    start = b""
    while len(start) < len(LIBVIRT_MAGIC):
        await _readable(fd)
        more = os.read(fd, len(LIBVIRT_MAGIC) - len(start))
        if not more:
            break
        start += more
    return start


async def _readable(fd: int) -> None:
    """Wait until a pipe has something, so that Ctrl-C is heard meanwhile."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    try:
        loop.add_reader(fd, wake)
    except PermissionError:
        return  # of a kind that never makes a reader wait
    try:
        await ready
    finally:
        loop.remove_reader(fd)


def _format(start: bytes, name: str) -> Format:
    if start.startswith(MAGIC):
        if name == "-":
            raise errors.UsageError(
                "a snapshot cannot be read from a pipe", hint="Give its name."
            )
        return "psnap"
    if start.startswith(STREAM_MAGIC):
        return "stream"
    if start.startswith(LIBVIRT_MAGIC):
        raise errors.StreamUnsupported(
            f"{name}: a file of `virsh save`, which this version does not read",
            hint="Its stream begins behind header and XML; cut these off.",
        )
    if len(start) < len(MAGIC) and (MAGIC.startswith(start) or not start):
        raise errors.Truncated(f"{name}: it ends before its magic does")
    raise errors.NotASnapshot(
        f"{name}: neither a snapshot nor a QEMU stream",
        hint="A snapshot begins with \\x89PSNAP, a stream with QEVM.",
    )


# ---------------------------------------------------------------- directions


@dataclass(frozen=True, kw_only=True)
class _Writer:
    """Writes a stream as a snapshot into ``fd``; ``place`` is for the spool."""

    fd: int
    name: str
    place: Path
    level: int
    compression: str
    report: Report

    async def write(
        self, source: int, name: str, first: bytes, *, meta: Meta | None = None
    ) -> tuple[Pages, Meta]:
        """Write what ``source`` gives after ``first``; without META, make it."""
        total = os.fstat(source).st_size if _is_seekable(source) else 0
        if files.is_memory(self.place):
            self.report.detail(f"spooling into {self.place}, which is in memory")
        with (
            files.spool_file(self.place) as spool,
            files.spool_file(self.place) as units,
        ):
            saver = Saver(
                spool_fd=spool,
                units_fd=units,
                pages_per_block=_PAGES_PER_BLOCK,
                zstd_level=self.level,
                threads=min(_MAX_THREADS, len(os.sched_getaffinity(0))),
                name=name,
            )
            if first:
                saver.feed(first)
            await in_thread(
                lambda: saver.drain(source),
                cancel=saver.cancel,
                watch=lambda: self.report.progress(
                    "reading", saver.stats().bytes_in, total
                ),
            )
            saver.end()
            if meta is None:
                meta = _imported_meta(saver, name, self.report)
            plain = replace(meta, compression=self.compression)
            meta = await in_thread(lambda: locate(saver, plain), cancel=saver.cancel)
            saver.set_section(Section.META, meta.to_bytes())
            await in_thread(
                lambda: saver.write(
                    self.fd, uuid=uuid.uuid4().bytes, parent=bytes(16), name=self.name
                ),
                cancel=saver.cancel,
                watch=lambda: self._writing(saver.stats()),
            )
            return _pages(saver.stats()), meta

    def _writing(self, stats: SaverStats) -> None:
        block = _PAGES_PER_BLOCK * PAGE_SIZE
        self.report.progress(
            "writing", stats.blocks_written * block, stats.blocks_total * block
        )


def _imported_meta(saver: Saver, name: str, report: Report) -> Meta:
    """Make META of what a stream tells."""
    machine = architecture = state = None
    try:
        configuration = saver.section(Section.CONFIGURATION)
        if configuration:
            machine = device_state.machine_name(configuration)
        found = device_state.decode(
            saver.section(Section.DESCRIPTION),
            saver.section(Section.DEVICES),
            footers=saver.stream_info().footers,
        )
        architecture = device_state.architecture(found)
        state = as_run_state(device_state.run_state(found))
    except errors.Damaged as error:
        report.note(f"{name}: {error.message}; kept as it is")
    return Meta(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        creator=f"qemu-pagesaver {__version__} (convert)",
        machine=machine,
        architecture=architecture,
        run_state=state,
    )


def as_run_state(recorded: str | None) -> str:
    """Turn QEMU's run state of a stream into that of META.

    None: the stream does not tell, and QEMU then starts the guest. A guest in
    ACPI sleep ("suspended") is not paused: devices may wake it.
    """
    return "running" if recorded in (None, "running", "suspended") else "paused"


def _recorded(snapshot: Snapshot) -> str | None:
    try:
        return as_run_state(device_state.run_state(snapshot.devices))
    except errors.Damaged:
        return None


async def _export(snapshot: Snapshot, new: files.AtomicFile, report: Report) -> None:
    """Write a snapshot as a stream that stock QEMU takes."""
    await _export_to(snapshot, new.fd, str(new.path), report)
    wanted = snapshot.meta.run_state
    if wanted is None or wanted == _recorded(snapshot):
        return
    # The stream was taken from a stopped guest: say in it what the guest was.
    description = snapshot.image.section(Section.DESCRIPTION)
    old = snapshot.image.section(Section.DEVICES)
    changed = device_state.with_run_state(
        old, description, footers=snapshot.info.stream.footers, state=wanted
    )
    behind = 1
    if snapshot.info.stream.description:
        behind += _DESCRIPTION_HEADER + len(description)
    at = os.fstat(new.fd).st_size - behind - len(old)
    if os.pread(new.fd, len(old), at) != old:
        raise errors.PagesaverError(
            f"{new.path}: the device sections are not where they were written"
        )
    try:
        os.pwrite(new.fd, changed, at)
    except OSError as error:
        raise errors.from_os_error(error, f"write {new.path}") from error


async def _export_to(
    snapshot: Snapshot, fd: int, name: str, report: Report | None
) -> None:
    job = Job()

    def watch() -> None:
        if report is not None:
            report.progress("writing", job.done, job.total)

    await in_thread(
        lambda: snapshot.image.export(fd, job, name=name),
        cancel=job.cancel,
        watch=watch,
    )


async def _rewrite(snapshot: Snapshot, into: _Writer) -> None:
    """Write a snapshot as another one, with a uuid of its own."""
    reader, writer = os.pipe()

    async def export() -> None:
        try:
            await _export_to(snapshot, writer, "pipe", None)
        finally:
            os.close(writer)

    exporting = asyncio.create_task(export())
    try:
        await into.write(reader, str(snapshot.path), b"", meta=snapshot.meta)
    except errors.SnapshotError:
        # A stream that ends too early: why, the other side knows.
        if exporting.done():
            exporting.result()
        raise
    finally:
        os.close(reader)
        exporting.cancel()
        with contextlib.suppress(asyncio.CancelledError, errors.PagesaverError):
            await exporting


def _pages(stats: SaverStats) -> Pages:
    return Pages(
        zero=stats.pages_zero,
        fill=stats.pages_fill,
        data=stats.pages_data,
        shared=stats.pages_shared,
    )


def _pages_of(snapshot: Snapshot) -> Pages:
    info = snapshot.info
    return Pages(
        zero=info.pages_zero,
        fill=info.pages_fill,
        data=info.canonical_pages,
        shared=info.pages_data - info.canonical_pages,
    )
