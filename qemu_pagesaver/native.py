# SPDX-License-Identifier: LGPL-2.1-or-later
"""The only gateway to the C core (native/include/pagesaver.h).

Every length is checked here before a call, and every C status becomes an
exception of :mod:`qemu_pagesaver.errors`. Long calls run without the GIL.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Self, TypeAlias

from qemu_pagesaver import errors
from qemu_pagesaver._native import ffi, lib

PAGE_SIZE = 4096
LEAF_PAGES = 512
NO_COMPRESSION = -(2**31)
UNBOUNDED = 2**64 - 1
ABI_VERSION = 1

if lib.ps_abi_version() != ABI_VERSION:
    raise ImportError("the C core is not of this version: build the package again")

Bytes: TypeAlias = bytes | bytearray | memoryview


class PageClass(IntEnum):
    """Class of a page: the low four bits of its page map entry (FORMAT.md)."""

    ABSENT = 0
    ZERO = 1
    FILL = 2
    DATA = 3


class Section(IntEnum):
    """Sections of a snapshot file (FORMAT.md)."""

    META = 1
    STREAM = 2
    CONFIGURATION = 3
    DEVICES = 4
    DESCRIPTION = 5
    RAM_BLOCKS = 6
    TOP_MAP = 7
    LEAVES = 8
    FILL_UNITS = 9
    BLOCK_INDEX = 10
    SIGNATURES = 11
    OWNERS = 12
    SPACES = 13
    VIRTUAL_RUNS = 14
    RUN_INDEX = 15


class SpaceKind(IntEnum):
    """Whose address space it is."""

    USER = 1
    KERNEL = 2


class Event(IntEnum):
    """Events of the stream parser."""

    NONE = 0
    HEADER = 1
    CONFIGURATION = 2
    SECTION = 3
    BLOCK = 4
    BLOCKS_END = 5
    ZERO = 6
    PAGE = 7
    COMMAND = 8
    RAM_END = 9
    DEVICES = 10
    DESCRIPTION = 11
    END = 12


class PagerState(IntEnum):
    """Where a pager is in its life."""

    NEW = 0
    SERVING = 1
    FINISHING = 2
    CLOSING = 3
    DONE = 4
    FAILED = 5


class Prefetch(IntEnum):
    """What is sent behind a requested page."""

    NONE = 0
    PHYSICAL = 1
    VIRTUAL = 2


class PrefetchKind(IntEnum):
    """Where neighbours of a fault were looked for."""

    VIRTUAL = 0
    FILE = 1
    PHYSICAL = 2


class Architecture(IntEnum):
    """Architectures whose page tables are known."""

    NONE = 0
    X86_64 = 1
    AARCH64 = 2
    RISCV64 = 3


@dataclass(frozen=True, kw_only=True)
class StreamInfo:
    """How QEMU's stream was framed."""

    stream_version: int
    ram_section_id: int
    ram_instance: int
    ram_version: int
    footers: bool
    configuration: bool
    description: bool
    postcopy: bool


@dataclass(frozen=True, kw_only=True)
class StreamEvent:
    """One event of the parser; fields that an event lacks are 0 or empty."""

    type: Event
    offset: int
    block: int
    value: int
    page_offset: int
    length: int
    page_size: int
    address: int | None
    section_id: int
    instance: int
    version: int
    name: str
    data: bytes


@dataclass(frozen=True, kw_only=True)
class RamBlock:
    """One RAM block of a snapshot; ``length`` in bytes, ``pages`` by class."""

    index: int
    name: str
    length: int
    page_size: int | None
    address: int | None
    first_leaf: int
    pages_zero: int
    pages_fill: int
    pages_data: int
    pages_absent: int


@dataclass(frozen=True, kw_only=True)
class ImageInfo:
    """What the header and the index of a snapshot say; sizes in bytes."""

    format_version: int
    pages_per_block: int
    uuid: bytes
    parent: bytes
    file_bytes: int
    index_bytes: int
    canonical_pages: int
    locality_blocks: int
    pages_zero: int
    pages_fill: int
    pages_data: int
    pages_absent: int
    memory_bytes: int
    stream: StreamInfo


@dataclass(frozen=True, kw_only=True)
class Run:
    """``count`` pages of one class from page ``first`` of a RAM block on."""

    first: int
    count: int
    page_class: PageClass
    shared: bool


@dataclass(frozen=True, kw_only=True)
class Space:
    """An address space of the guest; counts in pages.

    ``root`` is the guest-physical address of its top table, ``mode`` a paging mode
    of FORMAT.md.
    """

    index: int
    root: int
    kind: SpaceKind
    mode: int
    first_run: int
    run_count: int
    pages: int
    pages_shared: int


@dataclass(frozen=True, kw_only=True)
class VirtualRun:
    """``pages`` that follow each other from guest-virtual ``address`` on, and
    from ``page`` of a RAM block on."""

    address: int
    block: int
    page: int
    pages: int


@dataclass(frozen=True, kw_only=True)
class Mapping:
    """Where an address space maps a page: ``index`` in virtual run ``run``."""

    space: int
    address: int
    run: int
    index: int


@dataclass(frozen=True, kw_only=True)
class SaverStats:
    """Counters of a save; pages of 4096 bytes."""

    bytes_in: int
    ram_bytes: int
    pages_seen: int
    pages_resent: int
    pages_zero: int
    pages_fill: int
    pages_data: int
    pages_shared: int
    spool_bytes: int
    memory_bytes: int
    blocks_total: int
    blocks_written: int
    bytes_out: int


@dataclass(frozen=True, kw_only=True)
class CpuPaging:
    """How a vCPU translates addresses; registers as the C header has them."""

    architecture: Architecture
    registers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PhysicalRange:
    """Guest-physical memory from ``address`` on: ``pages`` of a RAM block."""

    address: int
    block: int
    page: int
    pages: int


@dataclass(frozen=True, kw_only=True)
class Locality:
    """How address spaces were found, and what placed the pages that are not zero.

    ``mode`` is the paging mode, empty where none is followed; ``note`` says why, or
    what was left out; ``duration`` is in seconds. See ``ps_locality``.
    """

    mode: str
    note: str
    duration: float
    spaces: int
    runs: int
    candidates: int
    live: int
    dead: int
    duplicates: int
    pairs: int
    files: int
    from_user: int
    from_files: int
    from_kernel: int
    from_rest: int
    from_free: int


@dataclass(frozen=True, kw_only=True)
class PrefetchStats:
    """What one kind of prefetch did; a window is right when the guest came to the
    page behind it."""

    windows: int
    windows_right: int
    pages: int
    pages_right: int


@dataclass(frozen=True, kw_only=True)
class PagerStats:
    """Counters of a pager; pages of 4096 bytes, latencies in nanoseconds."""

    state: PagerState
    faults: int
    faults_late: int
    pages_requested: int
    pages_prefetched: int
    pages_background: int
    pages_zero_sent: int
    pages_total: int
    pages_left: int
    pages_avoided: int
    bytes_sent: int
    storage_reads: int
    storage_bytes: int
    blocks_decoded: int
    latency_p50: int
    latency_p99: int
    latency_max: int
    first_fault_at: int
    last_fault_at: int
    cpu_ns: int
    prefetch: dict[PrefetchKind, PrefetchStats]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A run of pages that differ between two RAM blocks."""

    first: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that ``check`` found; ``offset`` in the file, if it has one."""

    message: str
    offset: int | None


@dataclass(frozen=True, kw_only=True)
class PagerOptions:
    """How a pager serves; see ``ps_pager_options`` in the C header."""

    prefetch: Prefetch = Prefetch.VIRTUAL
    prefetch_window: int = 64
    trace_fd: int = -1
    background_rate: int = UNBOUNDED
    background_delay: float = 0.05
    in_flight_bytes: int = 128 << 10
    cache_bytes: int = 8 << 20


_CLASSES: dict[int, type[errors.PagesaverError]] = {
    lib.PS_ERR_NOT_OURS: errors.NotASnapshot,
    lib.PS_ERR_TRUNCATED: errors.Truncated,
    lib.PS_ERR_DAMAGED: errors.Damaged,
    lib.PS_ERR_VERSION: errors.FormatVersionTooNew,
    lib.PS_ERR_FEATURE: errors.UnknownFeature,
    lib.PS_ERR_UNSUPPORTED: errors.StreamUnsupported,
    lib.PS_ERR_PEER: errors.PeerNonsense,
    lib.PS_ERR_CLOSED: errors.QemuDied,
    lib.PS_ERR_CANCELLED: errors.Interrupted,
    lib.PS_ERR_NOMEM: errors.OutOfMemory,
}


def _text(error: Any) -> str:
    return str(ffi.string(error.message).decode(errors="replace"))


def _offset(error: Any) -> int | None:
    return None if error.offset == UNBOUNDED else int(error.offset)


def _check(code: int, error: Any, where: str) -> None:
    """Raise what a C status means; ``where`` names the file or peer."""
    if code == lib.PS_OK:
        return
    if code == lib.PS_ERR_ARGUMENT:
        raise ValueError(_text(error))
    message = f"{where}: {_text(error)}" if where else _text(error)
    offset = _offset(error)
    if offset is not None:
        message += f" (at offset {offset})"
    kind = _CLASSES.get(code)
    if kind is None:
        kind = errors.class_for_errno(error.os_errno)
    raise kind(message)


def _new_error() -> Any:
    return ffi.new("ps_error *")


def _numbers(struct: Any, kind: type[Any], /, **more: object) -> Any:
    """Make a dataclass of ints from a C struct that has the same names."""
    names = kind.__dataclass_fields__
    values = {name: int(getattr(struct, name)) for name in names if name not in more}
    return kind(**values, **more)


def _stream_info(struct: Any) -> StreamInfo:
    return StreamInfo(
        stream_version=struct.stream_version,
        ram_section_id=struct.ram_section_id,
        ram_instance=struct.ram_instance,
        ram_version=struct.ram_version,
        footers=bool(struct.footers),
        configuration=bool(struct.configuration),
        description=bool(struct.description),
        postcopy=bool(struct.postcopy),
    )


def _ram_block(index: int, struct: Any) -> RamBlock:
    return _numbers(  # type: ignore[no-any-return]
        struct,
        RamBlock,
        index=index,
        name=ffi.string(struct.name).decode("utf-8", "surrogateescape"),
        page_size=struct.page_size or None,
        address=None if struct.address == UNBOUNDED else int(struct.address),
    )


def xxh3_64(data: Bytes) -> int:
    """Return XXH3-64 of ``data``."""
    view = ffi.from_buffer("uint8_t[]", data)
    return int(lib.ps_xxh3_64(view, len(view)))


@dataclass(frozen=True, kw_only=True)
class PageInfo:
    """What one page is: class, unit size in bytes (fill), signature (data)."""

    page_class: PageClass
    unit: int
    signature: int


def classify(page: Bytes) -> PageInfo:
    """Classify one page of 4096 bytes."""
    view = ffi.from_buffer("uint8_t[]", page)
    if len(view) != PAGE_SIZE:
        raise ValueError("a page has 4096 bytes")
    out = ffi.new("ps_page_info *")
    lib.ps_page_classify(view, out)
    kind = PageClass(out.page_class)
    return PageInfo(
        page_class=kind,
        unit=1 << out.unit_log2 if kind is PageClass.FILL else 0,
        signature=(
            out.signature_high << 64 | out.signature_low
            if kind is PageClass.DATA
            else 0
        ),
    )


class Parser:
    """The push parser: bytes in any split, events out. Does no I/O."""

    def __init__(self, *, name: str = "stream") -> None:
        self._name = name
        out = ffi.new("ps_parser **")
        error = _new_error()
        _check(lib.ps_parser_create(out, error), error, name)
        self._parser = ffi.gc(out[0], lib.ps_parser_destroy)

    def push(self, data: Bytes) -> Iterator[StreamEvent]:
        """Yield the events that ``data`` completes; consume it all."""
        view = ffi.from_buffer("uint8_t[]", data)
        used = ffi.new("size_t *")
        event = ffi.new("ps_event *")
        error = _new_error()
        at = 0
        while True:
            code = lib.ps_parser_push(
                self._parser, view + at, len(view) - at, used, event, error
            )
            _check(code, error, self._name)
            at += used[0]
            if event.type == lib.PS_EVENT_NONE:
                return
            yield self._event(event)

    def finish(self) -> Iterator[StreamEvent]:
        """Yield the events at the end of input; the last one is END."""
        event = ffi.new("ps_event *")
        error = _new_error()
        while True:
            _check(lib.ps_parser_finish(self._parser, event, error), error, self._name)
            yield self._event(event)
            if event.type == lib.PS_EVENT_END:
                return

    def info(self) -> StreamInfo:
        """Return how the stream is framed, as far as it was seen."""
        out = ffi.new("ps_stream_info *")
        lib.ps_parser_info(self._parser, out)
        return _stream_info(out)

    @staticmethod
    def _event(event: Any) -> StreamEvent:
        name = ffi.buffer(event.name, event.name_length)[:] if event.name else b""
        data = ffi.buffer(event.data, event.data_length)[:] if event.data else b""
        return StreamEvent(
            type=Event(event.type),
            offset=event.offset,
            block=event.block,
            value=event.value,
            page_offset=event.page_offset,
            length=event.length,
            page_size=event.page_size,
            address=None if event.address == UNBOUNDED else event.address,
            section_id=event.section_id,
            instance=event.instance,
            version=event.version,
            name=name.decode("utf-8", "replace"),
            data=data,
        )


class Saver:
    """First and second pass of a save: stream in, snapshot out.

    Args:
        spool_fd, units_fd: Open, empty regular files, best without a name.
            They stay the caller's.
        pages_per_block: Power of two, 1 to 512.
        zstd_level: Level, or NO_COMPRESSION.
        threads: Compressing threads, 1 to 64.
        name: What error messages call the input.
    """

    def __init__(
        self,
        *,
        spool_fd: int,
        units_fd: int,
        pages_per_block: int = 16,
        zstd_level: int = 3,
        threads: int = 2,
        name: str = "stream",
    ) -> None:
        self._name = name
        options = ffi.new("ps_saver_options *")
        options.spool_fd = spool_fd
        options.units_fd = units_fd
        options.pages_per_block = pages_per_block
        options.zstd_level = zstd_level
        options.threads = threads
        out = ffi.new("ps_saver **")
        error = _new_error()
        _check(lib.ps_saver_create(options, out, error), error, "")
        self._saver = ffi.gc(out[0], lib.ps_saver_destroy)

    def feed(self, data: Bytes) -> None:
        """Take bytes of the stream."""
        view = ffi.from_buffer("uint8_t[]", data)
        error = _new_error()
        _check(
            lib.ps_saver_feed(self._saver, view, len(view), error), error, self._name
        )

    def drain(self, fd: int) -> None:
        """Take the stream from a descriptor until its end; for a thread."""
        error = _new_error()
        _check(lib.ps_saver_drain(self._saver, fd, error), error, self._name)

    def end(self) -> None:
        """Check that the stream was whole and told every page."""
        error = _new_error()
        _check(lib.ps_saver_end(self._saver, error), error, self._name)

    def stream_info(self) -> StreamInfo:
        """Return how the stream was framed."""
        out = ffi.new("ps_stream_info *")
        lib.ps_saver_stream_info(self._saver, out)
        return _stream_info(out)

    def ram_blocks(self) -> tuple[RamBlock, ...]:
        """Return the RAM blocks of the stream; their counts of pages are 0."""
        out = ffi.new("ps_ram_block *")
        error = _new_error()
        found = []
        for index in range(lib.ps_saver_block_count(self._saver)):
            code = lib.ps_saver_ram_block(self._saver, index, out, error)
            _check(code, error, self._name)
            found.append(_ram_block(index, out))
        return tuple(found)

    def locate(
        self, cpus: Sequence[CpuPaging], ranges: Sequence[PhysicalRange]
    ) -> Locality:
        """Find address spaces and the order of pages; between the passes, in a thread.

        Args:
            cpus: One for each vCPU.
            ranges: Where RAM is, ascending.
        """
        given = ffi.new("ps_cpu_paging[]", len(cpus))
        for one, cpu in zip(given, cpus, strict=True):
            one.architecture = int(cpu.architecture)
            for index, value in enumerate(cpu.registers):
                one.registers[index] = value
        where = ffi.new("ps_physical_range[]", len(ranges))
        for each, known in zip(where, ranges, strict=True):
            each.address = known.address
            each.page = known.page
            each.pages = known.pages
            each.block = known.block
        out = ffi.new("ps_locality *")
        error = _new_error()
        code = lib.ps_saver_locate(
            self._saver, given, len(cpus), where, len(ranges), out, error
        )
        _check(code, error, self._name)
        return _numbers(  # type: ignore[no-any-return]
            out,
            Locality,
            mode=ffi.string(out.mode).decode(),
            note=ffi.string(out.note).decode(),
            duration=out.duration / 1e9,
        )

    def section(self, section: Section) -> bytes:
        """Return CONFIGURATION, DEVICES or DESCRIPTION of the stream."""
        data = ffi.new("const uint8_t **")
        length = ffi.new("size_t *")
        error = _new_error()
        code = lib.ps_saver_section(self._saver, int(section), data, length, error)
        _check(code, error, self._name)
        return bytes(ffi.buffer(data[0], length[0])) if length[0] else b""

    def set_section(self, section: Section, data: Bytes) -> None:
        """Set META, DEVICES or CONFIGURATION."""
        view = ffi.from_buffer("uint8_t[]", data)
        error = _new_error()
        code = lib.ps_saver_set_section(
            self._saver, int(section), view, len(view), error
        )
        _check(code, error, self._name)

    def write(self, fd: int, *, uuid: bytes, parent: bytes, name: str) -> None:
        """Write the snapshot into an empty file; for a thread."""
        if len(uuid) != 16 or len(parent) != 16:
            raise ValueError("a uuid has 16 bytes")
        error = _new_error()
        _check(lib.ps_saver_write(self._saver, fd, uuid, parent, error), error, name)

    def cancel(self) -> None:
        """Make a running drain() or write() raise Interrupted. Thread-safe."""
        lib.ps_saver_cancel(self._saver)

    def stats(self) -> SaverStats:
        """Return the counters; may be called from any thread."""
        out = ffi.new("ps_saver_stats *")
        lib.ps_saver_get_stats(self._saver, out)
        return _numbers(out, SaverStats)  # type: ignore[no-any-return]


@dataclass
class Job:
    """Progress and cancellation of long work on an image. Thread-safe."""

    _job: Any = field(default_factory=lambda: ffi.new("ps_job *"))

    @property
    def done(self) -> int:
        """Work done so far, in the unit of ``total``."""
        return int(self._job.done)

    @property
    def total(self) -> int:
        """All the work; 0 while it is not known."""
        return int(self._job.total)

    def cancel(self) -> None:
        """Make the work raise Interrupted soon."""
        self._job.cancel = 1


class Image:
    """A snapshot file, open for reading.

    Args:
        fd: Open for reading; must stay open while the image is used.
        name: What error messages call the file.
    """

    def __init__(self, fd: int, *, name: str) -> None:
        self.name = name
        out = ffi.new("ps_image **")
        error = _new_error()
        _check(lib.ps_image_open(fd, out, error), error, name)
        self._image = ffi.gc(out[0], lib.ps_image_destroy)
        self.ram_blocks: tuple[RamBlock, ...] = tuple(self._ram_blocks())

    def close(self) -> None:
        """Free the reader's memory; the descriptor stays the caller's."""
        ffi.release(self._image)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def info(self) -> ImageInfo:
        """Return what header and index say."""
        out = ffi.new("ps_image_info *")
        lib.ps_image_get_info(self._image, out)
        return _numbers(  # type: ignore[no-any-return]
            out,
            ImageInfo,
            uuid=bytes(ffi.buffer(out.uuid)),
            parent=bytes(ffi.buffer(out.parent)),
            stream=_stream_info(out.stream),
        )

    def _ram_blocks(self) -> Iterator[RamBlock]:
        info = ffi.new("ps_image_info *")
        lib.ps_image_get_info(self._image, info)
        out = ffi.new("ps_ram_block *")
        error = _new_error()
        for index in range(info.ram_blocks):
            code = lib.ps_image_ram_block(self._image, index, out, error)
            _check(code, error, self.name)
            yield _ram_block(index, out)

    def section(self, section: Section) -> bytes:
        """Return the checked bytes of a whole section; empty if absent."""
        length = int(lib.ps_image_section_length(self._image, int(section)))
        buffer = bytearray(length)
        if length:
            error = _new_error()
            view = ffi.from_buffer("uint8_t[]", buffer, require_writable=True)
            code = lib.ps_image_read_section(
                self._image, int(section), 0, view, length, error
            )
            _check(code, error, self.name)
        return bytes(buffer)

    def _pages(self, block: int, first: int, count: int) -> None:
        pages = self.ram_blocks[block].length // PAGE_SIZE
        if first < 0 or count < 0 or first + count > pages:
            raise ValueError(f"RAM block {block} has {pages} pages")

    def entries(self, block: int, first: int, count: int) -> Sequence[int]:
        """Return page map entries (FORMAT.md) of pages of one RAM block."""
        self._pages(block, first, count)
        out = ffi.new("uint64_t[]", count or 1)
        error = _new_error()
        code = lib.ps_image_entries(self._image, block, first, count, out, error)
        _check(code, error, self.name)
        return list(ffi.unpack(out, count)) if count else []

    def read_pages(self, block: int, first: int, count: int) -> bytes:
        """Return the content of pages of one RAM block, 4096 bytes each."""
        self._pages(block, first, count)
        buffer = bytearray(count * PAGE_SIZE)
        error = _new_error()
        view = ffi.from_buffer("uint8_t[]", buffer, require_writable=True)
        code = lib.ps_image_read_pages(self._image, block, first, count, view, error)
        _check(code, error, self.name)
        return bytes(buffer)

    def runs(self, block: int) -> Iterator[Run]:
        """Yield the runs of equal class of one RAM block."""
        self._pages(block, 0, 0)
        capacity = 4096
        out = ffi.new("ps_run[]", capacity)
        count = ffi.new("size_t *")
        following = ffi.new("uint64_t *")
        error = _new_error()
        pages = self.ram_blocks[block].length // PAGE_SIZE
        at = 0
        while at < pages:
            code = lib.ps_image_runs(
                self._image, block, at, out, capacity, count, following, error
            )
            _check(code, error, self.name)
            for run in out[0 : count[0]]:
                yield Run(
                    first=run.first,
                    count=run.count,
                    page_class=PageClass(run.page_class),
                    shared=bool(run.shared),
                )
            at = following[0]

    @property
    def space_count(self) -> int:
        """How many address spaces of the guest the file tells."""
        return int(lib.ps_image_space_count(self._image))

    def spaces(self) -> tuple[Space, ...]:
        """Return the guest's address spaces; none where the file does not tell."""
        return tuple(self.space(index) for index in range(self.space_count))

    def space(self, index: int) -> Space:
        """Return one of them."""
        out = ffi.new("ps_space_info *")
        error = _new_error()
        code = lib.ps_image_space(self._image, index, out, error)
        _check(code, error, self.name)
        return _numbers(  # type: ignore[no-any-return]
            out, Space, index=index, kind=SpaceKind(out.kind)
        )

    def virtual_runs(self, space: Space) -> Iterator[VirtualRun]:
        """Yield the runs of an address space, in order of their addresses."""
        for index in range(space.first_run, space.first_run + space.run_count):
            yield self.virtual_run(index)

    def virtual_run(self, index: int) -> VirtualRun:
        """Return one run by its number."""
        out = ffi.new("ps_run_info *")
        error = _new_error()
        code = lib.ps_image_virtual_run(self._image, index, out, error)
        _check(code, error, self.name)
        return _numbers(out, VirtualRun)  # type: ignore[no-any-return]

    def mappings(
        self, block: int, page: int, at_most: int = 1024
    ) -> tuple[Mapping, ...]:
        """Return where address spaces map a page."""
        self._pages(block, page, 1)
        out = ffi.new("ps_page_mapping[]", at_most)
        count = ffi.new("size_t *")
        error = _new_error()
        code = lib.ps_image_mappings(
            self._image, block, page, out, at_most, count, error
        )
        _check(code, error, self.name)
        return tuple(_numbers(out[i], Mapping) for i in range(count[0]))

    def check(self, job: Job, *, at_most: int = 1000) -> tuple[int, list[Problem]]:
        """Check everything: how many problems, and the first of them."""
        out = ffi.new("ps_error[]", at_most)
        count = ffi.new("size_t *")
        error = _new_error()
        code = lib.ps_image_check(self._image, job._job, out, at_most, count, error)
        _check(code, error, self.name)
        found = [
            Problem(message=_text(out[i]), offset=_offset(out[i]))
            for i in range(min(count[0], at_most))
        ]
        return int(count[0]), found

    def export(self, fd: int, job: Job, *, name: str) -> None:
        """Write the snapshot as an ordinary stream; for a thread."""
        error = _new_error()
        code = lib.ps_image_export(self._image, fd, job._job, error)
        _check(code, error, f"{self.name} to {name}")

    def compare(
        self, block: int, other: Image, other_block: int, job: Job, at_most: int = 1000
    ) -> tuple[int, list[Difference]]:
        """Compare RAM blocks of equal length: differing pages, first runs."""
        out = ffi.new("ps_difference[]", at_most)
        count = ffi.new("size_t *")
        pages = ffi.new("uint64_t *")
        error = _new_error()
        code = lib.ps_image_compare(
            self._image,
            block,
            other._image,
            other_block,
            job._job,
            out,
            at_most,
            count,
            pages,
            error,
        )
        _check(code, error, f"{self.name} against {other.name}")
        runs = [
            Difference(first=out[i].first, count=out[i].count)
            for i in range(min(count[0], at_most))
        ]
        return int(pages[0]), runs


class Pager:
    """The source of a postcopy migration, once QEMU listens.

    Args:
        image: Used by the pager alone while run() runs.
        fd: Connected socket to QEMU, stays the caller's.
        preempt_fd: Second channel of postcopy-preempt, or None.
        blocks: (page size of the backing memory, length), in the image's order.
        options: How to serve.
        name: What error messages call the guest.
    """

    def __init__(
        self,
        image: Image,
        *,
        fd: int,
        preempt_fd: int | None,
        blocks: Sequence[tuple[int, int]],
        options: PagerOptions,
        name: str,
    ) -> None:
        self._name = name
        self._image = image
        given = ffi.new("ps_pager_options *")
        given.fd = fd
        given.preempt_fd = -1 if preempt_fd is None else preempt_fd
        given.prefetch = int(options.prefetch)
        given.prefetch_window = options.prefetch_window
        given.trace_fd = options.trace_fd
        given.background_rate = options.background_rate
        given.background_delay_ns = int(options.background_delay * 1e9)
        given.in_flight_bytes = options.in_flight_bytes
        given.cache_bytes = options.cache_bytes
        array = ffi.new("ps_pager_block[]", len(blocks))
        for item, (page_size, length) in zip(array, blocks, strict=True):
            item.page_size = page_size
            item.length = length
        out = ffi.new("ps_pager **")
        error = _new_error()
        code = lib.ps_pager_create(image._image, given, array, len(blocks), out, error)
        _check(code, error, name)
        self._pager = ffi.gc(out[0], lib.ps_pager_destroy)

    def send_first(self, data: Bytes) -> None:
        """Queue bytes that go out before any page (the PACKAGED command)."""
        view = ffi.from_buffer("uint8_t[]", data)
        error = _new_error()
        _check(
            lib.ps_pager_send_first(self._pager, view, len(view), error),
            error,
            self._name,
        )

    def received_first(self, data: Bytes) -> None:
        """Hand over bytes of the return path that were read already."""
        view = ffi.from_buffer("uint8_t[]", data)
        error = _new_error()
        _check(
            lib.ps_pager_received_first(self._pager, view, len(view), error),
            error,
            self._name,
        )

    def set_received(self, block: int, bitmap: Bytes) -> None:
        """In recovery: the pages that QEMU has, one bit each."""
        view = ffi.from_buffer("uint8_t[]", bitmap)
        error = _new_error()
        code = lib.ps_pager_set_received(self._pager, block, view, len(view), error)
        _check(code, error, self._name)

    def run(self) -> None:
        """Serve until all is loaded and QEMU has said so; for a thread."""
        error = _new_error()
        _check(lib.ps_pager_run(self._pager, error), error, self._name)

    def finish(self) -> None:
        """Load the rest at full speed. Thread-safe."""
        lib.ps_pager_finish(self._pager)

    def cancel(self) -> None:
        """Make run() raise Interrupted. Thread-safe."""
        lib.ps_pager_cancel(self._pager)

    def set_background(self, rate: int) -> None:
        """Set the background rate, bytes/s; 0: off. Thread-safe."""
        lib.ps_pager_set_background(self._pager, rate)

    def stats(self) -> PagerStats:
        """Return the counters. Thread-safe."""
        out = ffi.new("ps_pager_stats *")
        lib.ps_pager_get_stats(self._pager, out)
        return _numbers(  # type: ignore[no-any-return]
            out,
            PagerStats,
            state=PagerState(out.state),
            prefetch={
                kind: _numbers(out.prefetch[kind], PrefetchStats)
                for kind in PrefetchKind
            },
        )

    def thread(self) -> int:
        """Return the kernel thread id of run(); 0 before."""
        return int(lib.ps_pager_thread(self._pager))


def measure_wakeups() -> tuple[float, float]:
    """Measure waking a thread on the same and on another CPU, in seconds."""
    same = ffi.new("uint64_t *")
    other = ffi.new("uint64_t *")
    error = _new_error()
    _check(lib.ps_measure_wakeups(same, other, error), error, "wake-up test")
    return same[0] / 1e9, other[0] / 1e9
