# SPDX-License-Identifier: LGPL-2.1-or-later
"""One whole file, written down literally, and what both readers make of it.

The offsets below are worked out by hand from FORMAT.md: a writer or a reader
that disagrees with this file disagrees with the document.
"""

from __future__ import annotations

import io
import struct
from dataclasses import astuple, dataclass
from uuid import UUID

import pytest
import xxhash

from qemu_pagesaver import native
from qemu_pagesaver.image.slow import Header, SlowImage, StreamRecord

from . import reading

NAME_UUID = UUID("6f1f8f3e-5c0d-4b7a-9a3e-0123456789ab")
PAGE_A = bytes(range(256)) * 15 + b"canonical page 0" * 16
PAGE_B = bytes(range(255, -1, -1)) * 15 + b"canonical page 1" * 16
UNIT = b"8 bytes!"


def sum64(data: bytes) -> bytes:
    return struct.pack("<Q", xxhash.xxh3_64_intdigest(data))


def sum128(data: bytes) -> bytes:
    return xxhash.xxh3_128_intdigest(data).to_bytes(16, "little")


@dataclass(frozen=True)
class File:
    """The parts of the file in file order, each at the offset beside it."""

    header: bytes  # 0
    block: bytes  # 4096: two pages as they are
    stream: bytes  # 12288
    stream_sums: bytes  # 12328
    devices: bytes  # 12336, padded by 1
    devices_sums: bytes  # 12344
    ram_blocks: bytes  # 12352
    ram_blocks_sums: bytes  # 12992
    top_map: bytes  # 13000
    top_map_sums: bytes  # 13016
    leaves: bytes  # 13024
    leaves_sums: bytes  # 17120
    fill_units: bytes  # 17128
    fill_units_sums: bytes  # 17136
    block_index: bytes  # 17144
    block_index_sums: bytes  # 17168
    signatures: bytes  # 17176
    signatures_sums: bytes  # 17208
    owners: bytes  # 17216
    owners_sums: bytes  # 17224
    table: bytes  # 17232
    trailer: bytes  # 17664

    def __bytes__(self) -> bytes:
        return b"".join(astuple(self))


def ram_block(
    name: bytes, length: int, page_size: int, first: int, *counts: int
) -> bytes:
    return struct.pack(
        "<B255sQQQQQQQQ", len(name), name, length, page_size, 2**64 - 1, first, *counts
    )


def whole_file() -> File:
    header = b"\x89PSNAP\r\n"
    header += struct.pack("<IIQQ", 1, 4096, 0, 0)
    header += NAME_UUID.bytes + bytes(16)
    header += struct.pack("<I", 2) + bytes(4020)
    header += sum64(header)
    block = PAGE_A + PAGE_B
    stream = struct.pack("<IIIIII16x", 3, 2, 0, 4, 1, 12)
    devices = b"devices"
    ram_blocks = ram_block(b"pc.ram", 7 * 4096, 0, 0, 2, 2, 3, 0)
    ram_blocks += ram_block(b"pc.rom", 2 * 4096, 4096, 1, 2, 0, 0, 0)
    top_map = struct.pack("<QQ", 15, 1)
    leaves = struct.pack(
        "<QQQQQQQ",
        0x0000_0000_0000_0003,  # data, canonical page 0
        0x0000_0000_0000_0001,  # zero
        0x0000_0000_00FF_0002,  # fill, one byte ff
        0x0000_0000_0001_0003,  # data, canonical page 1
        0x0000_0000_0000_0032,  # fill, 8 bytes at 0 in FILL_UNITS
        0x0000_0000_0000_0003,  # data, canonical page 0 again: shared
        0x0000_0000_0000_0001,  # zero
    ) + bytes(505 * 8)
    block_index = struct.pack("<QII", 4096, 8192, 0) + sum64(block)
    signatures = sum128(PAGE_A) + sum128(PAGE_B)
    owners = struct.pack("<II", 0, 3)

    def row(
        kind: int, offset: int, data: bytes, sums_offset: int, record_size: int
    ) -> bytes:
        place = struct.pack("<IIQQQ", kind, 1, offset, len(data), sums_offset)
        return place + sum64(sum64(data)) + struct.pack("<II", record_size, 0)

    table = row(2, 12288, stream, 12328, 40)
    table += row(4, 12336, devices, 12344, 1)
    table += row(6, 12352, ram_blocks, 12992, 320)
    table += row(7, 13000, top_map, 13016, 8)
    table += row(8, 13024, leaves, 17120, 4096)
    table += row(9, 17128, UNIT, 17136, 8)
    table += row(10, 17144, block_index, 17168, 24)
    table += row(11, 17176, signatures, 17208, 16)
    table += row(12, 17216, owners, 17224, 4)
    trailer = struct.pack("<QQ", 17232, 432) + sum64(table)
    trailer += struct.pack("<Q", 17792) + NAME_UUID.bytes + bytes(64)
    trailer += sum64(trailer) + b"PSNAPEND"
    return File(
        header=header,
        block=block,
        stream=stream,
        stream_sums=sum64(stream),
        devices=devices + b"\0",
        devices_sums=sum64(devices),
        ram_blocks=ram_blocks,
        ram_blocks_sums=sum64(ram_blocks),
        top_map=top_map,
        top_map_sums=sum64(top_map),
        leaves=leaves,
        leaves_sums=sum64(leaves),
        fill_units=UNIT,
        fill_units_sums=sum64(UNIT),
        block_index=block_index,
        block_index_sums=sum64(block_index),
        signatures=signatures,
        signatures_sums=sum64(signatures),
        owners=owners,
        owners_sums=sum64(owners),
        table=table,
        trailer=trailer,
    )


PAGES = [
    PAGE_A,
    bytes(4096),
    b"\xff" * 4096,
    PAGE_B,
    UNIT * 512,
    PAGE_A,
    bytes(4096),
]


def test_slow_reader() -> None:
    data = bytes(whole_file())
    assert len(data) == 17792
    image = SlowImage(io.BytesIO(data), name="literal")
    assert image.header == Header(
        version=1,
        incompatible=0,
        compatible=0,
        uuid=NAME_UUID.bytes,
        parent=bytes(16),
        pages_per_block=2,
    )
    assert image.stream == StreamRecord(
        stream_version=3,
        ram_section_id=2,
        ram_instance=0,
        ram_version=4,
        flags=1,
        page_bits=12,
    )
    assert image.meta == {}
    assert [b.name for b in image.ram_blocks] == ["pc.ram", "pc.rom"]
    assert [image.page(0, page) for page in range(7)] == PAGES
    assert [image.page(1, page) for page in range(2)] == [bytes(4096)] * 2
    assert [image.page_class(0, p) for p in range(7)] == [3, 1, 2, 3, 2, 3, 1]
    assert image.section(4) == b"devices"
    assert [image.owner(n) for n in range(2)] == [0, 3]
    assert image.verify() == []
    with pytest.raises(ValueError, match="has 7 pages"):
        image.page(0, 7)


def test_core_reader() -> None:
    with reading.core(bytes(whole_file()), "literal") as image:
        info = image.info()
        assert info.uuid == NAME_UUID.bytes
        assert info.pages_per_block == 2
        assert (info.pages_zero, info.pages_fill, info.pages_data) == (4, 2, 3)
        assert (info.canonical_pages, info.locality_blocks) == (2, 1)
        assert info.stream.footers
        assert not info.stream.description
        assert image.read_pages(0, 0, 7) == b"".join(PAGES)
        assert image.read_pages(1, 0, 2) == bytes(8192)
        assert image.section(native.Section.DEVICES) == b"devices"
        runs = [(r.first, r.count, int(r.page_class), r.shared) for r in image.runs(0)]
        assert runs == [
            (0, 1, 3, False),
            (1, 1, 1, False),
            (2, 1, 2, False),
            (3, 1, 3, False),
            (4, 1, 2, False),
            (5, 1, 3, True),
            (6, 1, 1, False),
        ]
        assert image.check(native.Job()) == (0, [])
