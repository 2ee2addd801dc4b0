# SPDX-License-Identifier: LGPL-2.1-or-later
"""A second reader of snapshot files, for tests and for people who look.

Written from FORMAT.md alone: it never calls the C core, so that where the two
agree the document is right. Clear before fast: a section is read and checked as
a whole when it is first used, and every page is decoded for itself.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar

import xxhash
import zstandard
from construct import Bytes, Int8ul, Int16ul, Int32ul, Int64ul, Struct

from qemu_pagesaver.errors import (
    Damaged,
    FormatVersionTooNew,
    IoError,
    NotASnapshot,
    Truncated,
    UnknownFeature,
    from_os_error,
)

FORMAT_VERSION = 1
MAGIC = b"\x89PSNAP\r\n"
TRAILER_MAGIC = b"PSNAPEND"
PAGE = 4096
CHUNK = 4096
LEAF_PAGES = 512
HEADER_LENGTH = 4096
TRAILER_LENGTH = 128
MAX_SECTIONS = 64
MAX_RAM_BLOCKS = 1024
MAX_RAM_BYTES = 1 << 44
MAX_TOP_ENTRIES = 1 << 23
MAX_SPACES = 1 << 20
UNKNOWN_ADDRESS = (1 << 64) - 1
ZSTD_MAGIC = bytes.fromhex("28b52ffd")

ABSENT, ZERO, FILL, DATA, LEAF = 0, 1, 2, 3, 15
CLASS_NAMES = {ABSENT: "absent", ZERO: "zero", FILL: "fill", DATA: "data"}
RAW, ZSTD = 0, 1

META, STREAM, CONFIGURATION, DEVICES, DESCRIPTION, RAM_BLOCKS = 1, 2, 3, 4, 5, 6
TOP_MAP, LEAVES, FILL_UNITS, BLOCK_INDEX, SIGNATURES, OWNERS = 7, 8, 9, 10, 11, 12
SPACES, VIRTUAL_RUNS, RUN_INDEX = 13, 14, 15
USER, KERNEL = 1, 2

# ---------------------------------------------------------------- structures

HEADER = Struct(
    "magic" / Bytes(8),
    "version" / Int32ul,
    "header_length" / Int32ul,
    "incompatible" / Int64ul,
    "compatible" / Int64ul,
    "uuid" / Bytes(16),
    "parent" / Bytes(16),
    "pages_per_block" / Int32ul,
    "reserved" / Bytes(4020),
    "checksum" / Int64ul,
)
TRAILER = Struct(
    "table_offset" / Int64ul,
    "table_length" / Int64ul,
    "table_checksum" / Int64ul,
    "file_length" / Int64ul,
    "uuid" / Bytes(16),
    "reserved" / Bytes(64),
    "checksum" / Int64ul,
    "magic" / Bytes(8),
)
SECTION = Struct(
    "type" / Int32ul,
    "flags" / Int32ul,
    "offset" / Int64ul,
    "length" / Int64ul,
    "sums_offset" / Int64ul,
    "sums_checksum" / Int64ul,
    "record_size" / Int32ul,
    "reserved" / Int32ul,
)
STREAM_RECORD = Struct(
    "stream_version" / Int32ul,
    "ram_section_id" / Int32ul,
    "ram_instance" / Int32ul,
    "ram_version" / Int32ul,
    "flags" / Int32ul,
    "page_bits" / Int32ul,
    "reserved" / Bytes(16),
)
RAM_BLOCK = Struct(
    "name_length" / Int8ul,
    "name" / Bytes(255),
    "length" / Int64ul,
    "page_size" / Int64ul,
    "address" / Int64ul,
    "first_leaf" / Int64ul,
    "pages_zero" / Int64ul,
    "pages_fill" / Int64ul,
    "pages_data" / Int64ul,
    "pages_absent" / Int64ul,
)
BLOCK = Struct(
    "offset" / Int64ul,
    "length" / Int32ul,
    "form" / Int32ul,
    "checksum" / Int64ul,
)
SPACE = Struct(
    "root" / Int64ul,
    "kind" / Int32ul,
    "mode" / Int32ul,
    "first_run" / Int64ul,
    "run_count" / Int64ul,
    "pages" / Int64ul,
    "pages_shared" / Int64ul,
    "reserved" / Bytes(16),
)
RUN = Struct(
    "address" / Int64ul,
    "first" / Int32ul,
    "pages" / Int16ul,
    "reserved" / Int16ul,
)
INDEXED_RUN = Struct(
    "first" / Int32ul,
    "run" / Int32ul,
    "space" / Int32ul,
    "pages" / Int16ul,
    "reserved" / Int16ul,
)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What version 1 says of a section type."""

    name: str
    record_size: int
    flags: int = 1
    required: bool = True
    limit: int | None = None  # bytes


RULES = {
    META: Rule(name="META", record_size=1, flags=0, required=False, limit=16 << 20),
    STREAM: Rule(name="STREAM", record_size=40, limit=40),
    CONFIGURATION: Rule(
        name="CONFIGURATION", record_size=1, required=False, limit=1 << 20
    ),
    DEVICES: Rule(name="DEVICES", record_size=1, limit=64 << 20),
    DESCRIPTION: Rule(
        name="DESCRIPTION", record_size=1, required=False, limit=64 << 20
    ),
    RAM_BLOCKS: Rule(name="RAM_BLOCKS", record_size=320, limit=320 * MAX_RAM_BLOCKS),
    TOP_MAP: Rule(name="TOP_MAP", record_size=8, limit=8 * MAX_TOP_ENTRIES),
    LEAVES: Rule(name="LEAVES", record_size=4096),
    FILL_UNITS: Rule(name="FILL_UNITS", record_size=8),
    BLOCK_INDEX: Rule(name="BLOCK_INDEX", record_size=24),
    SIGNATURES: Rule(name="SIGNATURES", record_size=16),
    OWNERS: Rule(name="OWNERS", record_size=4),
    SPACES: Rule(
        name="SPACES", record_size=64, flags=0, required=False, limit=64 * MAX_SPACES
    ),
    VIRTUAL_RUNS: Rule(name="VIRTUAL_RUNS", record_size=16, flags=0, required=False),
    RUN_INDEX: Rule(name="RUN_INDEX", record_size=16, flags=0, required=False),
}


@dataclass(frozen=True, kw_only=True)
class Header:
    """The first 4096 bytes."""

    version: int
    incompatible: int
    compatible: int
    uuid: bytes
    parent: bytes
    pages_per_block: int


@dataclass(frozen=True, kw_only=True)
class Section:
    """Where a section and its checksums are; offsets and lengths in bytes."""

    type: int
    flags: int
    offset: int
    length: int
    sums_offset: int
    sums_checksum: int
    record_size: int

    @property
    def name(self) -> str:
        """The name that FORMAT.md gives it."""
        rule = RULES.get(self.type)
        return rule.name if rule else f"of type {self.type}"

    @property
    def chunks(self) -> int:
        """How many checksums it has."""
        return -(-self.length // CHUNK)


@dataclass(frozen=True, kw_only=True)
class StreamRecord:
    """How QEMU's stream was framed."""

    stream_version: int
    ram_section_id: int
    ram_instance: int
    ram_version: int
    flags: int
    page_bits: int


@dataclass(frozen=True, kw_only=True)
class Space:
    """An address space; counts in pages."""

    root: int
    kind: int
    mode: int
    first_run: int
    run_count: int
    pages: int
    pages_shared: int


@dataclass(frozen=True, kw_only=True)
class VirtualRun:
    """Pages that are neighbours; ``first`` is a global page number."""

    address: int
    first: int
    pages: int


@dataclass(frozen=True, kw_only=True)
class RamBlock:
    """A RAM block; ``length`` in bytes, counts in pages."""

    name: str
    length: int
    page_size: int | None
    address: int | None
    first_leaf: int
    pages_zero: int
    pages_fill: int
    pages_data: int
    pages_absent: int

    @property
    def pages(self) -> int:
        """Pages of 4096 bytes."""
        return self.length // PAGE


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A page entry, taken apart."""

    page_class: int
    unit_log2: int
    value: int


@dataclass(frozen=True, kw_only=True)
class LocalityBlock:
    """Where the bytes of a locality block are, and how they are stored."""

    number: int
    offset: int
    length: int
    form: int
    checksum: int
    pages: int


# ------------------------------------------------------------------- helpers

T = TypeVar("T")


def _pick(kind: type[T], parsed: object, **instead: object) -> T:
    """Make a dataclass from the fields of the same name of a parsed struct."""
    names = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    return kind(**{n: instead.get(n, getattr(parsed, n, None)) for n in names})


def xxh3_64(data: bytes) -> int:
    """XXH3-64 with seed 0."""
    return xxhash.xxh3_64_intdigest(data)


def xxh3_128(data: bytes) -> int:
    """XXH3-128 with seed 0, the high half in the high bits."""
    return xxhash.xxh3_128_intdigest(data)


def shortest_unit(page: bytes) -> bytes | None:
    """Return the unit of 1, 2, 4 .. 64 bytes that a page repeats, if any."""
    for size in (1, 2, 4, 8, 16, 32, 64):
        if page == page[:size] * (len(page) // size):
            return page[:size]
    return None


def classify(page: bytes) -> int:
    """Return the class that the content of a page has."""
    unit = shortest_unit(page)
    if unit is None:
        return DATA
    return ZERO if unit == b"\0" else FILL


# -------------------------------------------------------------------- reader


class SlowImage:
    """A snapshot file.

    Opening checks what the file says of itself as a whole; a section is checked
    when it is first used, a locality block whenever it is read; :meth:`verify`
    checks all that FORMAT.md demands.

    Raises:
        NotASnapshot, Truncated, Damaged, FormatVersionTooNew, UnknownFeature:
            what is wrong with the file, and where.
    """

    def __init__(self, file: BinaryIO, *, name: str) -> None:
        """Check what the file says of itself; ``name`` is for messages."""
        self._file = file
        self._name = name
        self._cache: dict[int, bytes] = {}
        self._last_leaf: tuple[int, list[Entry]] = (-1, [])
        file.seek(0, 2)
        self.length = file.tell()
        self.header = self._open_header()
        self._open_trailer()
        self.sections = self._open_table()
        self.stream = self._open_stream()
        self.ram_blocks = self._open_ram_blocks()
        self._open_lengths()

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Open the snapshot at ``path``; to be closed, or used by ``with``."""
        try:
            file = Path(path).open("rb")  # noqa: SIM115 - kept, see close()
        except OSError as error:
            raise from_os_error(error, "opening") from error
        try:
            return cls(file, name=str(path))
        except BaseException:
            file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()

    def _damaged(self, what: str, offset: int | None = None) -> Damaged:
        at = "" if offset is None else f" (at offset {offset})"
        return Damaged(f"{self._name}: {what}{at}")

    def _demand(self, holds: bool, what: str, offset: int | None = None) -> None:
        if not holds:
            raise self._damaged(what, offset)

    def _read(self, offset: int, length: int, what: str) -> bytes:
        try:
            self._file.seek(offset)
            data = self._file.read(length)
        except OSError as error:
            raise IoError(f"{self._name}: {what}: {error}") from error
        if len(data) < length:
            raise Truncated(f"{self._name}: {what}: the file ends here")
        return data

    # -------------------------------------------------------------- opening

    def _open_header(self) -> Header:
        raw = self._read(0, min(self.length, HEADER_LENGTH), "header")
        if not raw or raw[:8] != MAGIC[: len(raw)]:
            raise NotASnapshot(f"{self._name}: not a snapshot")
        if self.length < HEADER_LENGTH + TRAILER_LENGTH:
            raise Truncated(f"{self._name}: it ends before its trailer")
        header = HEADER.parse(raw)
        self._demand(header.checksum == xxh3_64(raw[:-8]), "header: checksum", 0)
        if header.version > FORMAT_VERSION:
            raise FormatVersionTooNew(
                f"{self._name}: format version {header.version} is newer than "
                f"{FORMAT_VERSION}"
            )
        self._demand(header.version == FORMAT_VERSION, "header: version", 8)
        self._demand(header.header_length == HEADER_LENGTH, "header: length", 12)
        if header.incompatible:
            raise UnknownFeature(
                f"{self._name}: unknown incompatible features {header.incompatible:#x}"
            )
        self._demand(not any(header.parent), "header: a parent in version 1", 48)
        self._demand(
            header.pages_per_block in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
            "header: pages per locality block",
            64,
        )
        self._demand(not any(header.reserved), "header: reserved bytes", 68)
        return _pick(Header, header)

    def _open_trailer(self) -> None:
        at = self.length - TRAILER_LENGTH
        raw = self._read(at, TRAILER_LENGTH, "trailer")
        trailer = TRAILER.parse(raw)
        magic = trailer.magic == TRAILER_MAGIC
        checksum = trailer.checksum == xxh3_64(raw[:112])
        if not magic and not checksum:
            raise Truncated(f"{self._name}: there is no trailer")
        self._demand(magic and checksum, "trailer: magic or checksum", at)
        if trailer.file_length > self.length:
            raise Truncated(f"{self._name}: it should be {trailer.file_length} bytes")
        self._demand(trailer.file_length == self.length, "trailer: file length", at)
        self._demand(trailer.uuid == self.header.uuid, "trailer: uuid", at)
        self._demand(not any(trailer.reserved), "trailer: reserved bytes", at)
        self._demand(
            trailer.table_length % 48 == 0
            and trailer.table_length <= 48 * MAX_SECTIONS,
            "trailer: length of the section table",
            at,
        )
        self._demand(
            trailer.table_offset % 8 == 0
            and trailer.table_offset >= HEADER_LENGTH
            and trailer.table_offset + trailer.table_length <= at,
            "trailer: place of the section table",
            at,
        )
        self.table_offset = int(trailer.table_offset)
        self.table_length = int(trailer.table_length)
        self._table_checksum = int(trailer.table_checksum)

    def _open_table(self) -> dict[int, Section]:
        raw = self._read(self.table_offset, self.table_length, "section table")
        self._demand(
            xxh3_64(raw) == self._table_checksum,
            "section table: checksum",
            self.table_offset,
        )
        sections: dict[int, Section] = {}
        for at in range(0, len(raw), 48):
            parsed = SECTION.parse(raw[at : at + 48])
            section = _pick(Section, parsed)
            offset = self.table_offset + at
            self._demand(
                all(section.type > t for t in sections),
                "section table: not in order of type",
                offset,
            )
            self._demand(
                parsed.flags & ~1 == 0 and parsed.reserved == 0,
                "section table: reserved bits",
                offset,
            )
            self._open_section(section, offset)
            sections[section.type] = section
        for number, rule in RULES.items():
            self._demand(
                not rule.required or number in sections,
                f"section {rule.name} is missing",
                self.table_offset,
            )
        end = HEADER_LENGTH
        for start, length in self._section_parts(sections):
            self._demand(start >= end, "section table: parts overlap", start)
            end = start + length
        return sections

    def _open_section(self, section: Section, offset: int) -> None:
        rule = RULES.get(section.type)
        if rule is None and section.flags & 1:
            raise UnknownFeature(
                f"{self._name}: unknown section type {section.type}, which must "
                f"be known"
            )
        self._demand(
            section.record_size > 0 and section.length % section.record_size == 0,
            f"section {section.name}: length or record size",
            offset,
        )
        if rule:
            self._demand(
                section.flags == rule.flags and section.record_size == rule.record_size,
                f"section {section.name}: flags or record size",
                offset,
            )
            self._demand(
                rule.limit is None or section.length <= rule.limit,
                f"section {section.name}: too long",
                offset,
            )
        if section.length == 0:
            self._demand(
                section.sums_checksum == xxh3_64(b""),
                f"section {section.name}: checksum of no bytes",
                offset,
            )
            return
        for start, length in (
            (section.offset, section.length),
            (section.sums_offset, 8 * section.chunks),
        ):
            self._demand(
                start % 8 == 0
                and start >= HEADER_LENGTH
                and start + length <= self.table_offset,
                f"section {section.name}: out of place",
                offset,
            )

    @staticmethod
    def _section_parts(sections: dict[int, Section]) -> list[tuple[int, int]]:
        """Return (offset, length) of sections and checksum arrays, in order."""
        parts = []
        for section in sections.values():
            if section.length:
                parts.append((section.offset, section.length))
                parts.append((section.sums_offset, 8 * section.chunks))
        return sorted(parts)

    @property
    def blocks_end(self) -> int:
        """Locality blocks end before this offset."""
        parts = self._section_parts(self.sections)
        return parts[0][0] if parts else self.table_offset

    def _open_stream(self) -> StreamRecord:
        raw = self.section(STREAM)
        at = self.sections[STREAM].offset
        self._demand(len(raw) == 40, "section STREAM: not one record", at)
        parsed = STREAM_RECORD.parse(raw)
        self._demand(
            (parsed.stream_version, parsed.ram_version, parsed.page_bits) == (3, 4, 12),
            "section STREAM: versions or page size",
            at,
        )
        self._demand(
            parsed.flags & ~7 == 0 and not any(parsed.reserved),
            "section STREAM: reserved bits",
            at,
        )
        self._demand(
            bool(parsed.flags & 2) == bool(self._section_length(CONFIGURATION)),
            "section STREAM: is there a CONFIGURATION?",
            at,
        )
        self._demand(
            bool(parsed.flags & 4) or not self._section_length(DESCRIPTION),
            "section STREAM: is there a DESCRIPTION?",
            at,
        )
        return _pick(StreamRecord, parsed)

    def _open_ram_blocks(self) -> tuple[RamBlock, ...]:
        raw = self.section(RAM_BLOCKS)
        blocks: list[RamBlock] = []
        leaf = total = 0
        for at in range(0, len(raw), 320):
            parsed = RAM_BLOCK.parse(raw[at : at + 320])
            offset = self.sections[RAM_BLOCKS].offset + at
            name = parsed.name[: parsed.name_length]
            self._demand(
                bool(name)
                and b"\0" not in name
                and not any(parsed.name[parsed.name_length :]),
                "RAM block: malformed name",
                offset,
            )
            text = name.decode("utf-8", "surrogateescape")
            what = f"RAM block {text}"
            self._demand(
                all(b.name != text for b in blocks), f"{what}: name twice", offset
            )
            total += parsed.length
            self._demand(
                parsed.length > 0
                and parsed.length % PAGE == 0
                and total <= MAX_RAM_BYTES,
                f"{what}: length",
                offset,
            )
            self._demand(parsed.first_leaf == leaf, f"{what}: its first entry", offset)
            counts = (
                parsed.pages_zero
                + parsed.pages_fill
                + parsed.pages_data
                + parsed.pages_absent
            )
            self._demand(
                counts == parsed.length // PAGE, f"{what}: counts of pages", offset
            )
            unknown = parsed.address == UNKNOWN_ADDRESS
            block = _pick(
                RamBlock,
                parsed,
                name=text,
                page_size=parsed.page_size or None,
                address=None if unknown else parsed.address,
            )
            leaf += -(-block.pages // LEAF_PAGES)
            blocks.append(block)
        return tuple(blocks)

    def _open_lengths(self) -> None:
        """The lengths of all other sections fit STREAM and RAM_BLOCKS."""
        entries = sum(-(-b.pages // LEAF_PAGES) for b in self.ram_blocks)
        fill = sum(b.pages_fill for b in self.ram_blocks)
        data = sum(b.pages_data for b in self.ram_blocks)
        canonical = self._section_length(SIGNATURES) // 16
        blocks = -(-canonical // self.header.pages_per_block)
        for holds, number in (
            (self._section_length(TOP_MAP) == 8 * entries, TOP_MAP),
            (entries <= MAX_TOP_ENTRIES, TOP_MAP),
            (self._section_length(LEAVES) <= 4096 * entries, LEAVES),
            (self._section_length(FILL_UNITS) <= 64 * fill, FILL_UNITS),
            (canonical <= data, SIGNATURES),
            (self._section_length(OWNERS) == 4 * canonical, OWNERS),
            (self._section_length(BLOCK_INDEX) == 24 * blocks, BLOCK_INDEX),
            (
                self._section_length(RUN_INDEX) == self._section_length(VIRTUAL_RUNS),
                RUN_INDEX,
            ),
        ):
            section = self.sections.get(number)
            self._demand(
                holds,
                f"section {RULES[number].name}: length",
                section.offset if section else None,
            )

    # ------------------------------------------------------------- sections

    def _section_length(self, number: int) -> int:
        section = self.sections.get(number)
        return section.length if section else 0

    def section(self, number: int) -> bytes:
        """Return the bytes of a section, checked; none if it is absent."""
        if number not in self._cache:
            section = self.sections.get(number)
            self._cache[number] = self._load(section) if section else b""
        return self._cache[number]

    def _load(self, section: Section) -> bytes:
        if section.length == 0:
            return b""
        what = f"section {section.name}"
        sums = self._read(section.sums_offset, 8 * section.chunks, what)
        self._demand(
            xxh3_64(sums) == section.sums_checksum,
            f"{what}: checksum of its checksums",
            section.sums_offset,
        )
        data = self._read(section.offset, section.length, what)
        for chunk in range(section.chunks):
            want = int.from_bytes(sums[8 * chunk : 8 * chunk + 8], "little")
            self._demand(
                xxh3_64(data[chunk * CHUNK : (chunk + 1) * CHUNK]) == want,
                f"{what}, chunk {chunk}: checksum",
                section.offset + chunk * CHUNK,
            )
        return data

    @cached_property
    def meta(self) -> dict[str, Any]:
        """The JSON object of META; empty if there is none."""
        raw = self.section(META)
        if not raw:
            return {}
        try:
            meta = json.loads(raw.decode())
        except ValueError as error:
            raise self._damaged(f"section META: {error}") from error
        if not isinstance(meta, dict):
            raise self._damaged("section META: not a JSON object")
        return meta

    # ------------------------------------------------------------- page map

    def _parse_entry(self, raw: bytes, *, top: bool, where: str) -> Entry:
        number = int.from_bytes(raw, "little")
        entry = Entry(
            page_class=number & 15, unit_log2=number >> 4 & 15, value=number >> 16
        )
        reserved = number >> 8 & 255
        if entry.page_class != FILL:
            reserved |= entry.unit_log2
        self._demand(reserved == 0, f"{where}: reserved bits")
        value = entry.value
        match entry.page_class:
            case 0 | 1:
                right = value == 0
            case 2 if entry.unit_log2 <= 2:
                right = value < 1 << (8 << entry.unit_log2)
            case 2:
                size = 1 << entry.unit_log2
                right = (
                    entry.unit_log2 <= 6
                    and 8 * value + size <= self._section_length(FILL_UNITS)
                )
            case 3:
                right = not top and value < self.canonical_pages
            case 15:
                right = top and value < self._section_length(LEAVES) // 4096
            case _:
                right = False
        self._demand(right, f"{where}: it cannot be")
        return entry

    def _parse_entries(self, raw: bytes, *, top: bool, where: str) -> list[Entry]:
        return [
            self._parse_entry(
                raw[at : at + 8], top=top, where=f"{where}, entry {at // 8}"
            )
            for at in range(0, len(raw), 8)
        ]

    @cached_property
    def top_map(self) -> list[Entry]:
        """The top map, one entry for each leaf of 512 pages."""
        entries = self._parse_entries(self.section(TOP_MAP), top=True, where="top map")
        leaves = [e.value for e in entries if e.page_class == LEAF]
        self._demand(
            leaves == list(range(len(leaves))), "top map: leaves are not in order"
        )
        return entries

    def leaf(self, number: int) -> list[Entry]:
        """The 512 entries of a leaf."""
        if self._last_leaf[0] != number:
            raw = self.section(LEAVES)[number * 4096 : (number + 1) * 4096]
            entries = self._parse_entries(raw, top=False, where=f"leaf {number}")
            self._last_leaf = (number, entries)
        return self._last_leaf[1]

    def entry(self, block: int, page: int) -> Entry:
        """The entry of a page, be it in the top map or in a leaf."""
        ram = self.ram_blocks[block]
        if not 0 <= page < ram.pages:
            raise ValueError(f"RAM block {ram.name} has {ram.pages} pages")
        entry = self.top_map[ram.first_leaf + page // LEAF_PAGES]
        if entry.page_class == LEAF:
            entry = self.leaf(entry.value)[page % LEAF_PAGES]
        return entry

    def page_class(self, block: int, page: int) -> int:
        """ABSENT, ZERO, FILL or DATA."""
        return self.entry(block, page).page_class

    def unit(self, entry: Entry) -> bytes:
        """The unit of an entry of class fill, 1 to 64 bytes."""
        size = 1 << entry.unit_log2
        if size <= 4:
            return entry.value.to_bytes(6, "little")[:size]
        return self.section(FILL_UNITS)[8 * entry.value : 8 * entry.value + size]

    def page(self, block: int, page: int) -> bytes:
        """The 4096 bytes of a page; ValueError if the snapshot lacks it."""
        entry = self.entry(block, page)
        if entry.page_class == ZERO:
            return bytes(PAGE)
        if entry.page_class == FILL:
            return self.unit(entry) * (PAGE >> entry.unit_log2)
        if entry.page_class == DATA:
            return self.canonical(entry.value)
        raise ValueError("the snapshot does not have this page")

    def place(self, global_page: int) -> tuple[int, int] | None:
        """Return (RAM block, page) of a global page number, if there is one."""
        for index, ram in enumerate(self.ram_blocks):
            page = global_page - LEAF_PAGES * ram.first_leaf
            if 0 <= page < ram.pages:
                return index, page
        return None

    # ------------------------------------------------------ canonical pages

    @property
    def canonical_pages(self) -> int:
        """How many pages have bytes of their own."""
        return self._section_length(SIGNATURES) // 16

    @property
    def locality_blocks(self) -> int:
        """How many blocks these are stored in."""
        return self._section_length(BLOCK_INDEX) // 24

    def signature(self, number: int) -> int:
        """XXH3-128 of a canonical page, as the file has it."""
        raw = self.section(SIGNATURES)[16 * number : 16 * number + 16]
        return int.from_bytes(raw, "little")

    def owner(self, number: int) -> int:
        """The global page number of the page that owns a canonical page."""
        raw = self.section(OWNERS)[4 * number : 4 * number + 4]
        owner = int.from_bytes(raw, "little")
        self._demand(
            self.place(owner) is not None,
            f"owner of canonical page {number}: there is no page {owner}",
        )
        return owner

    def block(self, number: int) -> LocalityBlock:
        """The record of a locality block."""
        parsed = BLOCK.parse(self.section(BLOCK_INDEX)[24 * number : 24 * number + 24])
        per_block = self.header.pages_per_block
        block = _pick(
            LocalityBlock,
            parsed,
            number=number,
            pages=min(per_block, self.canonical_pages - number * per_block),
        )
        plain = PAGE * block.pages
        where = f"locality block {number}"
        self._demand(
            block.offset >= HEADER_LENGTH
            and block.offset + block.length <= self.blocks_end,
            f"{where}: out of place",
        )
        self._demand(block.form in (RAW, ZSTD), f"{where}: unknown form")
        if block.form == RAW:
            right = block.length == plain and block.offset % 4096 == 0
        else:
            right = 0 < block.length < plain
        self._demand(right, f"{where}: length or alignment")
        return block

    def block_pages(self, number: int) -> list[bytes]:
        """The canonical pages of a locality block."""
        block = self.block(number)
        where = f"locality block {number}"
        stored = self._read(block.offset, block.length, where)
        self._demand(
            xxh3_64(stored) == block.checksum, f"{where}: checksum", block.offset
        )
        plain = stored
        if block.form == ZSTD:
            plain = self._decompress(stored, PAGE * block.pages, where)
        return [plain[at : at + PAGE] for at in range(0, len(plain), PAGE)]

    def _decompress(self, stored: bytes, length: int, where: str) -> bytes:
        self._demand(stored[:4] == ZSTD_MAGIC, f"{where}: no zstd frame")
        try:
            stated = zstandard.frame_content_size(stored)
            self._demand(stated == length, f"{where}: content size of the frame")
            plain = zstandard.ZstdDecompressor().decompress(
                stored, allow_extra_data=False
            )
        except zstandard.ZstdError as error:
            raise self._damaged(f"{where}: {error}") from error
        self._demand(len(plain) == length, f"{where}: length of the content")
        return plain

    def canonical(self, number: int) -> bytes:
        """The 4096 bytes of a canonical page."""
        per_block = self.header.pages_per_block
        return self.block_pages(number // per_block)[number % per_block]

    # ------------------------------------------------------- address spaces

    @cached_property
    def spaces(self) -> list[Space]:
        """The guest's address spaces; empty where the file does not tell."""
        raw = self.section(SPACES)
        runs = self._section_length(VIRTUAL_RUNS) // 16
        found = []
        for at in range(0, len(raw), 64):
            parsed = SPACE.parse(raw[at : at + 64])
            self._demand(
                parsed.kind in (USER, KERNEL)
                and parsed.first_run + parsed.run_count <= runs
                and not any(parsed.reserved),
                f"section SPACES, record {at // 64}: kind, runs or reserved bytes",
            )
            found.append(_pick(Space, parsed))
        return found

    def run(self, number: int) -> VirtualRun:
        """A virtual run."""
        raw = self.section(VIRTUAL_RUNS)[16 * number : 16 * number + 16]
        parsed = RUN.parse(raw)
        first = self.place(parsed.first)
        last = self.place(parsed.first + parsed.pages - 1)
        self._demand(
            parsed.pages > 0
            and parsed.first % LEAF_PAGES + parsed.pages <= LEAF_PAGES
            and parsed.address % PAGE == 0
            and parsed.reserved == 0
            and first is not None
            and last is not None
            and first[0] == last[0],
            f"section VIRTUAL_RUNS, record {number}: its pages",
        )
        return _pick(VirtualRun, parsed)

    def mappings(self, block: int, page: int) -> list[tuple[int, int]]:
        """Where a page is mapped: (number of the space, guest-virtual address)."""
        wanted = LEAF_PAGES * self.ram_blocks[block].first_leaf + page
        found = []
        for number, space in enumerate(self.spaces):
            for at in range(space.first_run, space.first_run + space.run_count):
                run = self.run(at)
                if run.first <= wanted < run.first + run.pages:
                    found.append((number, run.address + PAGE * (wanted - run.first)))
        return found

    # --------------------------------------------------------------- verify

    def verify(self) -> list[str]:
        """Check everything that FORMAT.md demands; one sentence per problem."""
        problems: list[str] = []
        steps: tuple[Callable[[], Iterator[str]], ...] = (
            self._verify_sections,
            self._verify_map,
            self._verify_owners,
            self._verify_spaces,
            self._verify_blocks,
            self._verify_padding,
        )
        for step in steps:
            try:
                problems.extend(step())
            except (Damaged, Truncated) as error:
                problems.append(error.message)
        return problems

    def _verify_sections(self) -> Iterator[str]:
        for number in self.sections:
            try:
                self.section(number)
            except (Damaged, Truncated) as error:
                yield error.message
        _ = self.meta

    def _verify_map(self) -> Iterator[str]:
        used = 0
        for ram in self.ram_blocks:
            counts: Counter[int] = Counter()
            for first in range(0, ram.pages, LEAF_PAGES):
                pages = min(LEAF_PAGES, ram.pages - first)
                top = self.top_map[ram.first_leaf + first // LEAF_PAGES]
                if top.page_class == LEAF:
                    used += 1
                    entries = self.leaf(top.value)
                    beyond = Entry(page_class=ABSENT, unit_log2=0, value=0)
                    if any(e != beyond for e in entries[pages:]):
                        yield f"leaf {top.value}: not 0 beyond the end of {ram.name}"
                    entries = entries[:pages]
                else:
                    entries = [top]
                    counts[top.page_class] += pages - 1
                for entry in entries:
                    counts[entry.page_class] += 1
                    if entry.page_class == FILL:
                        yield from self._verify_fill(entry)
            said = (ram.pages_absent, ram.pages_zero, ram.pages_fill, ram.pages_data)
            if said != tuple(counts[c] for c in (ABSENT, ZERO, FILL, DATA)):
                yield f"RAM block {ram.name}: counts are not those of the page map"
        if used != self._section_length(LEAVES) // 4096:
            yield "section LEAVES: not every leaf is referred to"

    def _verify_fill(self, entry: Entry) -> Iterator[str]:
        unit = self.unit(entry)
        if unit == b"\0":
            yield "page map: a page of zeros is of class fill"
        elif shortest_unit(unit * (PAGE // len(unit))) != unit:
            yield "page map: a fill page has a shorter unit"

    def _verify_owners(self) -> Iterator[str]:
        for number in range(self.canonical_pages):
            place = self.place(self.owner(number))
            if place is None or self.entry(*place) != Entry(
                page_class=DATA, unit_log2=0, value=number
            ):
                yield f"owner of canonical page {number}: it does not refer to it"

    def _verify_spaces(self) -> Iterator[str]:
        runs = self._section_length(VIRTUAL_RUNS) // 16
        following = 0
        for number, space in enumerate(self.spaces):
            if space.first_run != following:
                yield f"space {number}: its runs do not follow those before"
            following = space.first_run + space.run_count
            end = 0
            for at in range(space.first_run, following):
                run = self.run(at)
                if run.address < end:
                    yield f"virtual run {at}: it does not ascend"
                end = run.address + PAGE * run.pages
        if following != runs:
            yield "section VIRTUAL_RUNS: runs without a space"
        seen = set()
        before = 0
        raw = self.section(RUN_INDEX)
        for at in range(0, len(raw), 16):
            parsed = INDEXED_RUN.parse(raw[at : at + 16])
            where = f"run index {at // 16}"
            if parsed.run >= runs or parsed.space >= len(self.spaces):
                yield f"{where}: there is no such run or space"
                continue
            run, space = self.run(parsed.run), self.spaces[parsed.space]
            if (
                (run.first, run.pages, 0)
                != (parsed.first, parsed.pages, parsed.reserved)
                or not 0 <= parsed.run - space.first_run < space.run_count
                or parsed.first < before
                or parsed.run in seen
            ):
                yield f"{where}: another run, or another order"
            seen.add(parsed.run)
            before = parsed.first

    def _verify_blocks(self) -> Iterator[str]:
        end = HEADER_LENGTH
        seen: dict[int, list[bytes]] = {}
        for number in range(self.locality_blocks):
            try:
                block = self.block(number)
                if block.offset < end:
                    yield f"locality block {number}: it overlaps the one before"
                end = block.offset + block.length
                pages = self.block_pages(number)
            except (Damaged, Truncated) as error:
                yield error.message
                continue
            first = number * self.header.pages_per_block
            for slot, page in enumerate(pages):
                where = f"locality block {number}, page {slot}"
                if classify(page) != DATA:
                    yield f"{where}: it is zero or fill"
                if xxh3_128(page) != self.signature(first + slot):
                    yield f"{where}: signature"
                twins = seen.setdefault(self.signature(first + slot), [])
                if page in twins:
                    yield f"{where}: its content is stored twice"
                twins.append(page)

    def _verify_padding(self) -> Iterator[str]:
        parts = [(0, HEADER_LENGTH)]
        for number in range(self.locality_blocks):
            block = self.block(number)
            parts.append((block.offset, block.length))
        parts += self._section_parts(self.sections)
        parts.append((self.table_offset, self.table_length))
        parts.append((self.length - TRAILER_LENGTH, TRAILER_LENGTH))
        end = 0
        for start, length in parts:
            if start > end and any(self._read(end, start - end, "padding")):
                yield f"padding at {end} is not 0"
            end = max(end, start + length)
