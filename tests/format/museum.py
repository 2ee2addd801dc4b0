# SPDX-License-Identifier: LGPL-2.1-or-later
"""Snapshot files of all kinds, good and broken, made by code and always alike.

An encoder of its own, written from FORMAT.md: it shares nothing with the
package. A :class:`Draft` is a snapshot in parts; :meth:`Draft.seal` puts them
together with right checksums, so that an exhibit can be wrong in one way only.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import xxhash
import zstandard

PAGE = 4096
UUID = bytes.fromhex("6f1f8f3e5c0d4b7a9a3e0123456789ab")
ABSENT, ZERO, FILL, DATA, LEAF = 0, 1, 2, 3, 15
META, STREAM, CONFIGURATION, DEVICES, DESCRIPTION, RAM_BLOCKS = 1, 2, 3, 4, 5, 6
TOP_MAP, LEAVES, FILL_UNITS, BLOCK_INDEX, SIGNATURES, OWNERS = 7, 8, 9, 10, 11, 12
SPACES, VIRTUAL_RUNS, RUN_INDEX = 13, 14, 15
RECORD_SIZES = {
    STREAM: 40,
    RAM_BLOCKS: 320,
    TOP_MAP: 8,
    LEAVES: 4096,
    FILL_UNITS: 8,
    BLOCK_INDEX: 24,
    SIGNATURES: 16,
    OWNERS: 4,
    SPACES: 64,
    VIRTUAL_RUNS: 16,
    RUN_INDEX: 16,
}


def xxh64(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data)


def entry(kind: int, value: int = 0, log2: int = 0) -> int:
    return kind | log2 << 4 | value << 16


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def noise(seed: int) -> bytes:
    """A page that does not compress."""
    return random.Random(seed).randbytes(PAGE)


def text(seed: int) -> bytes:
    """A page that compresses, but is no fill page."""
    line = f"page {seed} of a guest that writes one line again and again. "
    return (line.encode() * 80)[: PAGE - 8] + struct.pack("<Q", seed)


def fill(unit: bytes) -> bytes:
    return unit * (PAGE // len(unit))


def shortest(page: bytes) -> bytes | None:
    for log2 in range(7):
        unit = page[: 1 << log2]
        if page == fill(unit):
            return unit
    return None


def _nothing(_rows: object) -> None:
    pass


@dataclass
class Part:
    """A section; ``record_size`` and ``flags`` as they go into the table."""

    data: bytes
    record_size: int = 1
    flags: int = 1


@dataclass
class Stored:
    """A locality block as its bytes are stored."""

    data: bytes
    form: int


@dataclass
class Draft:
    """A snapshot in parts. The hooks change what seal() is about to write."""

    blocks: list[Stored]
    sections: dict[int, Part]
    pages_per_block: int = 4
    version: int = 1
    header_length: int = 4096
    incompatible: int = 0
    compatible: int = 0
    uuid: bytes = UUID
    parent: bytes = bytes(16)
    header_reserved: bytes = bytes(4020)
    trailer_uuid: bytes | None = None
    trailer_reserved: bytes = bytes(64)
    gap: bytes = b""  # after the last block
    # [type, flags, offset, length, sums offset, sums checksum, record size, 0]
    edit_table: Callable[[list[list[int]]], None] = _nothing
    # [offset, stored length, form, checksum]
    edit_index: Callable[[list[list[int]]], None] = _nothing
    # [table offset, table length, table checksum, file length]
    edit_trailer: Callable[[list[int]], None] = _nothing
    # The checksum array of a section, by type.
    edit_sums: dict[int, Callable[[bytes], bytes]] = field(default_factory=dict)

    def seal(self) -> bytes:
        out = bytearray(4096)
        index: list[list[int]] = []
        for block in self.blocks:
            if block.form == 0:
                out += bytes(-len(out) % 4096)
            index.append([len(out), len(block.data), block.form, xxh64(block.data)])
            out += block.data
        out += self.gap
        self.edit_index(index)
        sections = dict(self.sections)
        if BLOCK_INDEX not in sections:
            packed = b"".join(struct.pack("<QIIQ", *record) for record in index)
            sections[BLOCK_INDEX] = Part(packed, 24)
        table = []
        for kind, part in sorted(sections.items()):
            sums = b"".join(
                words(xxh64(part.data[at : at + 4096]))
                for at in range(0, len(part.data), 4096)
            )
            if kind in self.edit_sums:
                sums = self.edit_sums[kind](sums)
            offset = 0
            sums_offset = 0
            if part.data:
                out += bytes(-len(out) % 8)
                offset = len(out)
                out += part.data
                out += bytes(-len(out) % 8)
                sums_offset = len(out)
                out += sums
            table.append(
                [
                    kind,
                    part.flags,
                    offset,
                    len(part.data),
                    sums_offset,
                    xxh64(sums),
                    part.record_size,
                    0,
                ]
            )
        self.edit_table(table)
        out += bytes(-len(out) % 8)
        packed = b"".join(struct.pack("<IIQQQQII", *row) for row in table)
        trailer = [len(out), len(packed), xxh64(packed), len(out) + len(packed) + 128]
        out += packed
        self.edit_trailer(trailer)
        end = words(*trailer) + (self.trailer_uuid or self.uuid)
        end += self.trailer_reserved
        out += end + words(xxh64(end)) + b"PSNAPEND"
        out[:4096] = self._header()
        return bytes(out)

    def _header(self) -> bytes:
        head = b"\x89PSNAP\r\n" + struct.pack(
            "<IIQQ",
            self.version,
            self.header_length,
            self.incompatible,
            self.compatible,
        )
        head += self.uuid + self.parent
        head += struct.pack("<I", self.pages_per_block) + self.header_reserved
        return head + words(xxh64(head))

    # ------------------------------------------------- changes, for exhibits

    def put(self, kind: int, at: int, data: bytes) -> Draft:
        """Overwrite bytes of a section."""
        old = self.sections[kind].data
        assert at + len(data) <= len(old)
        self.sections[kind].data = old[:at] + data + old[at + len(data) :]
        return self

    def number(self, kind: int, index: int, value: int) -> Draft:
        """Overwrite the 8 bytes number ``index`` of a section."""
        return self.put(kind, 8 * index, words(value))


@dataclass(frozen=True)
class Ram:
    """A RAM block: its name and its pages; None is an absent page."""

    name: bytes
    pages: list[bytes | None]
    page_size: int = 0
    address: int = 2**64 - 1


def ram_record(ram: Ram, first_leaf: int, counts: list[int]) -> bytes:
    return (
        bytes([len(ram.name)])
        + ram.name.ljust(255, b"\0")
        + words(
            len(ram.pages) * PAGE,
            ram.page_size,
            ram.address,
            first_leaf,
            counts[ZERO],
            counts[FILL],
            counts[DATA],
            counts[ABSENT],
        )
    )


def stream_record(*, flags: int = 7, page_bits: int = 12, more: bytes = b"") -> bytes:
    head = struct.pack("<IIIIII", 3, 2, 0, 4, flags, page_bits)
    return head + more.ljust(16, b"\0")


CONFIGURATION_BYTES = b"\x07\x00\x00\x00\x0apc-q35-9.9"
DEVICE_BYTES = b"\x04\x00\x00\x00\x09\x05timer" + bytes(16) + b"\x7e\x00\x00\x00\x09"
DESCRIPTION_BYTES = b'{"page_size": 4096, "devices": []}'
META_BYTES = b'{"machine": "pc-q35-9.9", "run-state": "running"}'


def draft(
    rams: list[Ram],
    *,
    per_block: int = 4,
    level: int | None = 3,
    uniform_leaves: bool = False,
) -> Draft:
    """Describe RAM blocks as a writer would.

    Args:
        level: zstd's, or None: blocks are stored as they are.
        uniform_leaves: write a leaf also where the top map would do.
    """
    top: list[int] = []
    leaves: list[int] = []
    units = b""
    canonical: dict[bytes, int] = {}
    owners: list[int] = []
    records = b""
    for ram in rams:
        first_leaf = len(top)
        counts = [0] * 4
        entries: list[int] = []
        for number, page in enumerate(ram.pages):
            if page is None:
                entries.append(entry(ABSENT))
            elif (unit := shortest(page)) == b"\0":
                entries.append(entry(ZERO))
            elif unit is not None:
                log2 = len(unit).bit_length() - 1
                if log2 <= 2:
                    value = int.from_bytes(unit, "little")
                else:
                    at = units.find(unit)
                    while at % 8:
                        at = units.find(unit, at + 1) if at >= 0 else len(units)
                    if at == len(units):
                        units += unit
                    value = at // 8
                entries.append(entry(FILL, value, log2))
            else:
                if page not in canonical:
                    canonical[page] = len(canonical)
                    owners.append(512 * first_leaf + number)
                entries.append(entry(DATA, canonical[page]))
            counts[entries[-1] & 15] += 1
        for at in range(0, len(entries), 512):
            some = entries[at : at + 512]
            uniform = len(set(some)) == 1 and some[0] & 15 != DATA
            if uniform and not uniform_leaves:
                top.append(some[0])
            else:
                top.append(entry(LEAF, len(leaves) // 512))
                leaves += some + [0] * (512 - len(some))
        records += ram_record(ram, first_leaf, counts)
    pages = list(canonical)
    blocks = []
    for at in range(0, len(pages), per_block):
        plain = b"".join(pages[at : at + per_block])
        packed = plain if level is None else zstandard.compress(plain, level)
        if len(packed) < len(plain):
            blocks.append(Stored(packed, 1))
        else:
            blocks.append(Stored(plain, 0))
    signatures = b"".join(
        xxhash.xxh3_128_intdigest(page).to_bytes(16, "little") for page in pages
    )
    return Draft(
        pages_per_block=per_block,
        blocks=blocks,
        sections={
            META: Part(META_BYTES, flags=0),
            STREAM: Part(stream_record(), 40),
            CONFIGURATION: Part(CONFIGURATION_BYTES),
            DEVICES: Part(DEVICE_BYTES),
            DESCRIPTION: Part(DESCRIPTION_BYTES),
            RAM_BLOCKS: Part(records, 320),
            TOP_MAP: Part(words(*top), 8),
            LEAVES: Part(words(*leaves), 4096),
            FILL_UNITS: Part(units, 8),
            SIGNATURES: Part(signatures, 16),
            OWNERS: Part(struct.pack(f"<{len(owners)}I", *owners), 4),
        },
    )


# (kind, root, [(address, first global page, pages)])
SpaceDraft = tuple[int, int, list[tuple[int, int, int]]]


def with_spaces(to: Draft, spaces: list[SpaceDraft]) -> Draft:
    """Add address spaces to a draft."""
    records, runs = b"", b""
    index: list[tuple[int, int, int, int, int]] = []
    for number, (kind, root, mapped) in enumerate(spaces):
        first = len(index)
        shared = {
            p for k, r, other in spaces if (k, r) != (kind, root) for p in _of(other)
        }
        pages = _of(mapped)
        records += struct.pack(
            "<QIIQQQQ",
            root,
            kind,
            1,
            first,
            len(mapped),
            len(pages),
            len(pages & shared),
        ) + bytes(16)
        for address, page, count in mapped:
            runs += struct.pack("<QIHH", address, page, count, 0)
            index.append((page, len(index), number, count, 0))
    packed = b"".join(struct.pack("<IIIHH", *row) for row in sorted(index))
    to.sections[SPACES] = Part(records, 64, 0)
    to.sections[VIRTUAL_RUNS] = Part(runs, 16, 0)
    to.sections[RUN_INDEX] = Part(packed, 16, 0)
    return to


def _of(mapped: list[tuple[int, int, int]]) -> set[int]:
    return {page + i for _, page, count in mapped for i in range(count)}


def spaced() -> Draft:
    """small(), with two processes that share a page, and a kernel."""
    top = 0xFFFF_8880_0000_0000
    return with_spaces(
        small(),
        [
            (1, 0x1000, [(0x40_0000, 1, 4), (0x40_4000, 100, 2), (0x7FFF_F000, 7, 1)]),
            (1, 0x2000, [(0x40_0000, 3, 1), (0x7FFF_E000, 9, 2)]),
            (2, 0x1000, [(top, 512, 8), (2**64 - PAGE, 1024, 1)]),
        ],
    )


UNIT64 = bytes(range(1, 65))


def guest() -> list[Ram]:
    """Two RAM blocks with pages of every class.

    The first has 520 pages, so a last leaf of 8, with shared pages in both;
    the second is one page of ROM with the content of a page of the first.
    """
    pages: list[bytes | None] = [bytes(PAGE)] * 520
    pages[0] = noise(1)
    pages[1:5] = [text(1), text(2), text(3), text(4)]
    pages[7] = noise(1)
    pages[9:16] = [
        fill(b"\xff"),
        fill(b"\x01\x02"),
        fill(b"\x01\x02\x03\x04"),
        fill(UNIT64[:8]),
        fill(UNIT64[:16]),
        fill(UNIT64[:32]),
        fill(UNIT64),
    ]
    pages[100:103] = [text(5), text(1), text(6)]
    pages[511] = text(7)
    pages[512] = text(8)
    pages[519] = fill(UNIT64[:8])
    return [Ram(b"pc.ram", pages), Ram(b"pc.rom", [text(3)], 4096, 0xFFFC0000)]


def small() -> Draft:
    return draft(guest())


@dataclass(frozen=True)
class Exhibit:
    """A file and what readers are to make of it.

    ``refused`` is the name of the error class with which it cannot be opened;
    ``sound`` says that nothing at all is wrong with it.
    """

    name: str
    data: bytes
    refused: str | None = None
    sound: bool = True
    python_only: bool = False  # what is wrong is inside of META


def good() -> list[Exhibit]:
    everything = guest()
    one_page = [Ram(b"x", [text(1)])]
    zeros = [Ram(b"pc.ram", [bytes(PAGE)] * 1500)]
    extra = small()
    extra.sections[77] = Part(b"what a later version may add", flags=0)
    no_meta = small()
    del no_meta.sections[META]
    bare = small()
    del bare.sections[CONFIGURATION]
    del bare.sections[DESCRIPTION]
    bare.sections[STREAM].data = stream_record(flags=1)
    empty_description = small()
    empty_description.sections[DESCRIPTION].data = b""
    compatible = small()
    compatible.compatible = 1 << 63
    return [
        Exhibit("plain", small().seal()),
        Exhibit("spaces", spaced().seal()),
        Exhibit("spaces-empty", with_spaces(small(), []).seal()),
        Exhibit("spaces-without-runs", with_spaces(small(), [(1, 4096, [])]).seal()),
        Exhibit("uncompressed", draft(everything, level=None).seal()),
        Exhibit("one-page-a-block", draft(everything, per_block=1).seal()),
        Exhibit("large-blocks", draft(everything, per_block=512).seal()),
        Exhibit("leaves-not-needed", draft(everything, uniform_leaves=True).seal()),
        Exhibit("no-ram", draft([]).seal()),
        Exhibit("one-page", draft(one_page).seal()),
        Exhibit("all-zero", draft(zeros).seal()),
        Exhibit("all-fill", draft([Ram(b"r", [fill(UNIT64)] * 600)]).seal()),
        Exhibit("absent", draft([Ram(b"r", [None, text(1), None])]).seal()),
        Exhibit("all-absent", draft([Ram(b"r", [None] * 513)]).seal()),
        Exhibit(
            "long-name",
            draft([Ram(b"/rom@etc/" + b"n" * 246, [text(1), bytes(PAGE)])]).seal(),
        ),
        Exhibit("unknown-section", extra.seal()),
        Exhibit("no-meta", no_meta.seal()),
        Exhibit("no-configuration", bare.seal()),
        Exhibit("empty-description", empty_description.seal()),
        Exhibit("compatible-feature", compatible.seal()),
        Exhibit("many-leaves", many_leaves().seal()),
    ]


def many_leaves() -> Draft:
    """More than one chunk of the top map, of signatures and of the index."""
    pages: list[bytes | None] = [bytes(PAGE)] * (512 * 515)
    for number in range(300):
        pages[number * 877] = text(number)
    pages[512 * 514 + 3] = noise(3)
    return draft([Ram(b"pc.ram", pages)], per_block=1)


def flip(data: bytes, offset: int, bit: int = 0) -> bytes:
    changed = bytearray(data)
    changed[offset] ^= 1 << bit
    return bytes(changed)


def row(table: list[list[int]], kind: int) -> list[int]:
    return next(r for r in table if r[0] == kind)


def broken_at_open() -> list[Exhibit]:
    plain = small().seal()
    found: list[Exhibit] = []

    def add(name: str, data: bytes, refused: str = "Damaged") -> None:
        found.append(Exhibit(name, data, refused, sound=False))

    def add_draft(name: str, change: Callable[[Draft], object], **more: str) -> None:
        changed = small()
        change(changed)
        add(name, changed.seal(), **more)

    def add_table(name: str, kind: int, column: int, value: int) -> None:
        def edit(table: list[list[int]]) -> None:
            row(table, kind)[column] = value

        add_draft(name, lambda d: setattr(d, "edit_table", edit))

    def add_trailer(name: str, column: int, value: int, **more: str) -> None:
        def edit(trailer: list[int]) -> None:
            trailer[column] = value

        add_draft(name, lambda d: setattr(d, "edit_trailer", edit), **more)

    def add_put(name: str, kind: int, at: int, data: bytes) -> None:
        add_draft(name, lambda d: d.put(kind, at, data))

    add("empty", b"", "NotASnapshot")
    add("text", b"hello, world\n" * 1000, "NotASnapshot")
    add("qemu-stream", b"QEVM\0\0\0\x03" + bytes(5000), "NotASnapshot")
    add("magic-in-text-mode", plain.replace(b"\r\n", b"\n", 1), "NotASnapshot")
    add("magic-alone", plain[:8], "Truncated")
    add("header-alone", plain[:4096], "Truncated")
    add("no-trailer", plain[:-128], "Truncated")
    add("half-a-trailer", plain[:-64], "Truncated")
    add("half", plain[: len(plain) // 2], "Truncated")
    add("longer", plain + bytes(512), "Truncated")
    add("twice", plain + plain)
    add("header-flip", flip(plain, 20))
    add("header-checksum", flip(plain, 4090))
    add("trailer-flip", flip(plain, len(plain) - 128 + 60))
    add("trailer-magic", flip(plain, len(plain) - 1))
    add("table-flip", flip(plain, len(plain) - 128 - 40))
    later = "FormatVersionTooNew"
    add_draft("version-2", lambda d: setattr(d, "version", 2), refused=later)
    add_draft("version-0", lambda d: setattr(d, "version", 0))
    add_draft("header-length", lambda d: setattr(d, "header_length", 8192))
    add_draft(
        "incompatible-feature",
        lambda d: setattr(d, "incompatible", 1 << 40),
        refused="UnknownFeature",
    )
    add_draft("parent", lambda d: setattr(d, "parent", UUID))
    for number in (0, 3, 1024):
        add_draft(
            f"pages-per-block-{number}",
            lambda d, n=number: setattr(d, "pages_per_block", n),  # type: ignore[misc]
        )
    add_draft(
        "header-reserved",
        lambda d: setattr(d, "header_reserved", bytes(4019) + b"\1"),
    )
    add_draft("trailer-uuid", lambda d: setattr(d, "trailer_uuid", bytes(15) + b"\1"))
    add_draft(
        "trailer-reserved", lambda d: setattr(d, "trailer_reserved", bytes(63) + b"\1")
    )
    size = len(plain)
    add_trailer("file-length-more", 3, size + 1, refused="Truncated")
    add_trailer("file-length-less", 3, size - 1)
    add_trailer("table-length-odd", 1, 47)
    add_trailer("table-length-huge", 1, 48 << 50)
    add_trailer("table-too-many", 1, 48 * 65)
    add_trailer("table-offset-odd", 0, 4097)
    add_trailer("table-offset-header", 0, 0)
    add_trailer("table-offset-end", 0, size)
    add_trailer("table-offset-huge", 0, (1 << 64) - 8)
    add_draft(
        "table-empty",
        lambda d: setattr(d, "edit_table", lambda table: table.clear()),
    )
    add_draft(
        "table-order",
        lambda d: setattr(d, "edit_table", lambda table: table.reverse()),
    )
    add_draft(
        "table-duplicate",
        lambda d: setattr(d, "edit_table", lambda table: table.insert(0, table[0])),
    )
    add_table("section-flags", TOP_MAP, 1, 3)
    add_table("section-not-required", TOP_MAP, 1, 0)
    add_table("section-meta-required", META, 1, 1)
    add_table("section-reserved", TOP_MAP, 7, 1)
    add_table("section-offset-odd", DEVICES, 2, 4100)
    add_table("section-offset-header", DEVICES, 2, 0)
    add_table("section-offset-end", DEVICES, 2, size - 128)
    add_table("section-offset-huge", DEVICES, 2, (1 << 64) - 4096)
    add_table("section-length-huge", DEVICES, 3, (1 << 64) - 1)
    add_table("section-length-long", DEVICES, 3, (64 << 20) + 1)
    add_table("section-length-records", LEAVES, 3, 4095)
    add_table("section-record-size", LEAVES, 6, 8)
    add_table("section-record-size-0", DEVICES, 6, 0)
    add_table("section-sums-odd", DEVICES, 4, 4100)
    add_table("section-sums-end", DEVICES, 4, size - 128)
    add_table("section-sums-overlap", DEVICES, 4, row_offset(STREAM))
    add_table("section-empty-sum", FILL_UNITS, 3, 0)
    for kind in (STREAM, DEVICES, RAM_BLOCKS, TOP_MAP, LEAVES, FILL_UNITS):
        add_draft(f"missing-{kind}", lambda d, k=kind: d.sections.pop(k))  # type: ignore[misc]
    for kind in (BLOCK_INDEX, SIGNATURES, OWNERS):
        add_draft(
            f"missing-{kind}",
            lambda d, k=kind: setattr(  # type: ignore[misc]
                d, "edit_table", lambda table: table.remove(row(table, k))
            ),
        )
    add_draft(
        "unknown-required",
        lambda d: d.sections.update({99: Part(b"?")}),
        refused="UnknownFeature",
    )
    add_put("stream-version", STREAM, 0, b"\4")
    add_put("stream-ram-version", STREAM, 12, b"\3")
    add_put("stream-flags", STREAM, 16, b"\x0f")
    add_put("stream-page-bits", STREAM, 20, b"\x0e")
    add_put("stream-reserved", STREAM, 39, b"\1")
    add_put("stream-denies-configuration", STREAM, 16, b"\5")
    add_put("stream-denies-description", STREAM, 16, b"\3")
    add_draft(
        "stream-promises-configuration",
        lambda d: d.sections.pop(CONFIGURATION),
    )
    add_draft(
        "stream-twice",
        lambda d: d.sections.update({STREAM: Part(stream_record() * 2, 40)}),
    )
    add_put("ram-name-empty", RAM_BLOCKS, 0, b"\0")
    add_put("ram-name-zero", RAM_BLOCKS, 2, b"\0")
    add_put("ram-name-padding", RAM_BLOCKS, 255, b"x")
    add_put("ram-name-twice", RAM_BLOCKS, 320, b"\6pc.ram")
    add_put("ram-length-odd", RAM_BLOCKS, 256, words(520 * 4096 + 1))
    add_put("ram-length-0", RAM_BLOCKS, 256, words(0))
    add_put("ram-length-huge", RAM_BLOCKS, 256, words((1 << 64) - 4096))
    add_put("ram-length-over", RAM_BLOCKS, 256, words((1 << 44) + 4096))
    add_put("ram-length-more", RAM_BLOCKS, 256, words(521 * 4096))
    add_put("ram-first-leaf", RAM_BLOCKS, 320 + 280, words(1))
    add_put("ram-counts", RAM_BLOCKS, 288, words(1))
    add_put(
        "ram-counts-overflow",
        RAM_BLOCKS,
        288,
        words((1 << 63), 0, (1 << 63) + 520, 0),
    )
    for kind in (RAM_BLOCKS, STREAM):
        add_draft(
            f"sums-{kind}",
            lambda d, k=kind: d.edit_sums.update(  # type: ignore[misc]
                {k: lambda sums: flip(sums, 0)}
            ),
        )
    add_draft("top-map-short", lambda d: cut(d, TOP_MAP, 8))
    add_draft("top-map-long", lambda d: extend(d, TOP_MAP, words(entry(ZERO))))
    add_draft("leaves-long", lambda d: extend(d, LEAVES, bytes(2 * 4096)))
    add_draft("owners-short", lambda d: cut(d, OWNERS, 4))
    add_draft("signatures-long", lambda d: extend(d, SIGNATURES, bytes(16)))
    add_draft("units-long", lambda d: extend(d, FILL_UNITS, bytes(64 * 8)))
    add_draft("index-long", lambda d: d.blocks.append(Stored(noise(9), 0)))
    add_draft("index-short", lambda d: d.blocks.pop())
    short = spaced()
    cut(short, RUN_INDEX, 16)
    add("run-index-short", short.seal())
    for kind in (SPACES, VIRTUAL_RUNS, RUN_INDEX):
        flagged = spaced()
        flagged.sections[kind].flags = 1
        add(f"flags-{kind}", flagged.seal())
    return found


def row_offset(kind: int) -> int:
    """Where a section of small() begins."""
    found: list[int] = []
    probe = small()
    probe.edit_table = lambda table: found.append(row(table, kind)[2])
    probe.seal()
    return found[0]


def cut(d: Draft, kind: int, length: int) -> None:
    d.sections[kind].data = d.sections[kind].data[:-length]


def extend(d: Draft, kind: int, data: bytes) -> None:
    d.sections[kind].data += data


def broken_inside() -> list[Exhibit]:
    """Files that can be opened, with something wrong within."""
    found: list[Exhibit] = []

    def add(name: str, change: Callable[[Draft], object]) -> None:
        changed = small()
        change(changed)
        found.append(Exhibit(name, changed.seal(), sound=False))

    def add_entry(name: str, index: int, value: int, kind: int = LEAVES) -> None:
        add(name, lambda d: d.number(kind, index, value))

    def add_block(name: str, number: int, column: int, value: int) -> None:
        def edit(index: list[list[int]]) -> None:
            index[number][column] = value

        add(name, lambda d: setattr(d, "edit_index", edit))

    def add_stored(name: str, number: int, data: bytes, form: int = 1) -> None:
        add(name, lambda d: d.blocks.__setitem__(number, Stored(data, form)))

    # The page map. Pages 0, 7: noise, shared; 1..4: text; 9..15: fill.
    add_entry("entry-class-4", 20, entry(4))
    add_entry("entry-class-leaf", 20, entry(LEAF))
    add_entry("entry-reserved", 20, entry(ZERO) | 1 << 8)
    add_entry("entry-log2-of-zero", 20, entry(ZERO, 0, 1))
    add_entry("entry-value-of-zero", 20, entry(ZERO, 1))
    add_entry("entry-value-of-absent", 20, entry(ABSENT, 1))
    add_entry("entry-canonical-out", 1, entry(DATA, 10))
    add_entry("entry-canonical-far", 1, entry(DATA, (1 << 48) - 1))
    add_entry("entry-fill-log2", 9, entry(FILL, 0, 7))
    add_entry("entry-fill-value", 9, entry(FILL, 0x100, 0))
    add_entry("entry-fill-out", 15, entry(FILL, 9999, 6))
    add_entry("entry-fill-far", 15, entry(FILL, (1 << 48) - 1, 6))
    add_entry("entry-fill-end", 15, entry(FILL, 8, 6))
    add_entry("entry-fill-zero", 9, entry(FILL, 0, 0))
    add_entry("entry-fill-not-shortest", 10, entry(FILL, 0x0101, 1))
    add_entry("entry-beyond-end", 512 + 8, entry(ZERO))
    add_entry("entry-counts", 20, entry(FILL, 5))
    add_entry("entry-other-canonical", 1, entry(DATA, 2))
    add_entry("top-class-data", 0, entry(DATA, 0), TOP_MAP)
    add_entry("top-leaf-out", 1, entry(LEAF, 3), TOP_MAP)
    add_entry("top-leaf-twice", 1, entry(LEAF, 0), TOP_MAP)
    add_entry("top-leaf-unused", 2, entry(ZERO), TOP_MAP)
    add_entry("top-reserved", 0, entry(LEAF, 0) | 1 << 15, TOP_MAP)
    add(
        "top-leaves-swapped",
        lambda d: d.put(TOP_MAP, 0, words(entry(LEAF, 1), entry(LEAF, 0))),
    )
    add("unit-not-shortest", lambda d: d.put(FILL_UNITS, 0, b"\1\2\3\4" * 2))
    # Owners and signatures.
    add("owner-other", lambda d: d.put(OWNERS, 0, struct.pack("<I", 1)))
    add("owner-zero-page", lambda d: d.put(OWNERS, 0, struct.pack("<I", 20)))
    add("owner-between", lambda d: d.put(OWNERS, 0, struct.pack("<I", 600)))
    add("owner-out", lambda d: d.put(OWNERS, 0, struct.pack("<I", 2**32 - 1)))
    add("signature", lambda d: d.put(SIGNATURES, 16, b"\0"))
    # Locality blocks: 0 is stored as it is if incompressible; here all zstd.
    add_block("block-offset-0", 1, 0, 0)
    add_block("block-offset-far", 1, 0, (1 << 64) - 1)
    add_block("block-length-0", 1, 1, 0)
    add_block("block-length-more", 1, 1, 2**32 - 1)
    add_block("block-length-less", 1, 1, 10)
    add_block("block-form", 1, 2, 2)
    add_block("block-form-raw", 1, 2, 0)
    add_block("block-checksum", 1, 3, 0)
    add(
        "blocks-swapped",
        lambda d: setattr(d, "edit_index", lambda index: index.reverse()),
    )
    first = small().blocks[0]
    add_stored("block-no-frame", 1, b"no zstd frame at all")
    add_stored("block-tiny", 1, b"\x28")
    add_stored("block-skippable", 1, bytes.fromhex("502a4d1804000000") + b"skip")
    add_stored("block-cut", 0, first.data[:-20])
    add_stored("block-two-frames", 0, first.data + first.data)
    add_stored("block-tail", 0, first.data + b"\0")
    add_stored("block-short", 0, zstandard.compress(text(1) * 3))
    add_stored("block-long", 0, zstandard.compress(text(1) * 5))
    add_stored("block-bomb", 0, zstandard.compress(bytes(64 << 20)), 1)
    add_stored(
        "block-no-size",
        0,
        zstandard.ZstdCompressor(write_content_size=False).compress(
            b"".join(decoded(small(), 0))
        ),
    )
    pages = decoded(small(), 1)
    add_stored("page-zero", 1, zstandard.compress(b"".join([bytes(PAGE), *pages[1:]])))
    add_stored("page-fill", 1, zstandard.compress(b"".join([fill(b"ab"), *pages[1:]])))
    add_stored("page-other", 1, zstandard.compress(b"".join([text(77), *pages[1:]])))
    add("page-twice", store_twice)
    add("page-is-fill", store_fill)
    add("gap", lambda d: setattr(d, "gap", b"\1" * 8))
    # Sections whose checksums are wrong.
    for kind in (META, DEVICES, TOP_MAP, LEAVES, FILL_UNITS, SIGNATURES, OWNERS):
        add(
            f"inside-sums-{kind}",
            lambda d, k=kind: d.edit_sums.update(  # type: ignore[misc]
                {k: lambda sums: flip(sums, len(sums) - 1)}
            ),
        )
        # Here the array itself is not what the table says.
        add(
            f"inside-array-{kind}",
            lambda d, k=kind: setattr(  # type: ignore[misc]
                d,
                "edit_table",
                lambda table: row(table, k).__setitem__(5, 1),
            ),
        )
    found += spaces_broken()
    unknown = small()
    unknown.sections[77] = Part(b"later", flags=0)
    unknown.edit_sums[77] = lambda sums: flip(sums, 0)
    found.append(Exhibit("unknown-section-sums", unknown.seal(), sound=False))
    for name, meta in (
        ("meta-not-json", b"{"),
        ("meta-not-object", b"[]"),
        ("meta-not-utf8", b'{"machine": "\xff"}'),
    ):
        changed = small()
        changed.sections[META].data = meta
        found.append(Exhibit(name, changed.seal(), sound=False, python_only=True))
    return found


def spaces_broken() -> list[Exhibit]:
    """Address spaces that lie, over pages that are all right."""
    runs = [(0x40_0000, 1, 4)]

    def put(kind: int, at: int, data: bytes) -> Draft:
        return spaced().put(kind, at, data)

    unordered = spaced()
    index = unordered.sections[RUN_INDEX].data
    unordered.sections[RUN_INDEX].data = index[-16:] + index[:-16]
    twice = spaced()
    twice.sections[RUN_INDEX].data = index[:16] + index[:-16]
    sums = spaced()
    sums.edit_sums[VIRTUAL_RUNS] = lambda data: flip(data, 0)
    without = spaced()
    del without.sections[SPACES]
    drafts = {
        "spaces-kind": put(SPACES, 8, b"\3"),
        "spaces-reserved": put(SPACES, 63, b"\1"),
        "spaces-runs-out": put(SPACES, 24, words(8)),
        "spaces-runs-overflow": put(SPACES, 16, words(2**64 - 1)),
        "spaces-runs-gap": put(SPACES, 16, words(1)),
        "spaces-run-empty": put(VIRTUAL_RUNS, 12, b"\0"),
        "spaces-run-long": put(VIRTUAL_RUNS, 12, b"\x01\x02"),
        "spaces-run-over-leaf": put(VIRTUAL_RUNS, 8, struct.pack("<I", 510)),
        "spaces-run-nowhere": put(VIRTUAL_RUNS, 8, struct.pack("<I", 1100)),
        "spaces-run-over-block": put(VIRTUAL_RUNS, 8, struct.pack("<I", 518)),
        "spaces-run-unaligned": put(VIRTUAL_RUNS, 0, b"\1"),
        "spaces-run-reserved": put(VIRTUAL_RUNS, 14, b"\1"),
        "spaces-run-descends": put(VIRTUAL_RUNS, 16, words(0x40_3000)),
        "spaces-run-index-run": put(RUN_INDEX, 4, struct.pack("<I", 9)),
        "spaces-run-index-space": put(RUN_INDEX, 8, struct.pack("<I", 3)),
        "spaces-run-index-pages": put(RUN_INDEX, 12, b"\1"),
        "spaces-run-index-reserved": put(RUN_INDEX, 14, b"\1"),
        "spaces-run-index-order": unordered,
        "spaces-run-index-twice": twice,
        "spaces-run-sums": sums,
        "spaces-missing": without,
        "spaces-alien-run": with_spaces(small(), [(1, 0, runs), (1, 1, runs)]).put(
            RUN_INDEX, 8, struct.pack("<I", 1)
        ),
    }
    return [Exhibit(name, d.seal(), sound=False) for name, d in drafts.items()]


def decoded(d: Draft, number: int) -> list[bytes]:
    stored = d.blocks[number]
    plain = zstandard.decompress(stored.data) if stored.form else stored.data
    return [plain[at : at + PAGE] for at in range(0, len(plain), PAGE)]


def replace_canonical(d: Draft, number: int, page: bytes) -> None:
    """Store another content, with a right signature."""
    pages = decoded(d, number // d.pages_per_block)
    pages[number % d.pages_per_block] = page
    packed = zstandard.compress(b"".join(pages))
    d.blocks[number // d.pages_per_block] = Stored(packed, 1)
    signature = xxhash.xxh3_128_intdigest(page).to_bytes(16, "little")
    d.put(SIGNATURES, 16 * number, signature)


def store_twice(d: Draft) -> None:
    replace_canonical(d, 2, text(1))  # canonical page 1 is that


def store_fill(d: Draft) -> None:
    replace_canonical(d, 2, fill(b"\5\6"))


def museum() -> list[Exhibit]:
    """Every exhibit."""
    return good() + broken_at_open() + broken_inside()


def seeds() -> list[tuple[str, bytes]]:
    """The corpus of native/fuzz/fuzz_image.c: small files, one for each form."""
    units: list[bytes | None] = [fill(UNIT64), fill(UNIT64[:16]), fill(b"\7")]
    return [
        ("header", small().seal()[:4096]),
        ("page-zstd", draft([Ram(b"r", [text(1), None, text(1)])]).seal()),
        ("page-raw", draft([Ram(b"r", [noise(1), noise(2)])], per_block=1).seal()),
        ("map-uniform", draft([Ram(b"r", [bytes(PAGE)] * 513)]).seal()),
        ("spaces", spaced().seal()),
        ("map-fill", draft([Ram(b"r", units), Ram(b"s", units[:1])]).seal()),
        (
            "blocks-many",
            draft([Ram(b"r", [text(n) for n in range(9)])], per_block=2).seal(),
        ),
        (
            "block-two-frames",
            next(e for e in broken_inside() if e.name == "block-two-frames").data,
        ),
    ]


if __name__ == "__main__":
    import sys
    from pathlib import Path

    for name, data in seeds():
        (Path(sys.argv[1]) / f"{name}.psnap").write_bytes(data)
