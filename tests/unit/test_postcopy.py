# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is said to QEMU, byte for byte, and what it may answer."""

from __future__ import annotations

import random
import struct

import pytest

from qemu_pagesaver import errors, postcopy
from qemu_pagesaver.native import StreamInfo
from qemu_pagesaver.postcopy import Block, Message, Reply, ReturnPath

STREAM = StreamInfo(
    stream_version=3,
    ram_section_id=2,
    ram_instance=0,
    ram_version=4,
    footers=True,
    configuration=True,
    description=True,
    postcopy=False,
)
MACHINE = b"\x07" + struct.pack(">I", 2) + b"pc"


def subsection(name: bytes, body: bytes) -> bytes:
    return b"\x05" + bytes((len(name),)) + name + struct.pack(">I", 1) + body


CAPABILITIES = subsection(
    b"configuration/capabilities",
    struct.pack(">I", 2) + b"\x06xbzrle" + b"\x0fx-ignore-shared",
)
PAGE_BITS = subsection(b"configuration/target-page-bits", struct.pack(">I", 12))
UUID = subsection(b"configuration/uuid", bytes(16))


def test_opening_is_what_qemu_reads() -> None:
    blocks = [
        Block(name="pc.ram", length=1 << 21, page_size=1 << 21),
        Block(name="rom", length=4096, page_size=4096),
    ]
    data = postcopy.opening(
        stream=STREAM,
        configuration=MACHINE,
        blocks=blocks,
        page_sizes=[1 << 21, 4096],
        host_page_size=4096,
    )
    expected = [
        *(b"QEVM", struct.pack(">I", 3), MACHINE),
        b"\x08\x00\x01\x00\x00",
        b"\x08\x00\x02\x00\x04" + struct.pack(">I", 1),
        b"\x08\x00\x03\x00\x10" + struct.pack(">QQ", (1 << 21) | 4096, 4096),
        b"\x01\x00\x00\x00\x02\x03ram" + struct.pack(">II", 0, 4),
        struct.pack(">Q", (1 << 21) + 4096 | 4),
        b"\x06pc.ram" + struct.pack(">QQ", 1 << 21, 1 << 21),
        b"\x03rom" + struct.pack(">Q", 4096),
        struct.pack(">Q", 0x10) + b"\x7e\x00\x00\x00\x02",
        b"\x08\x00\x06\x00\x19\x00\x06pc.ram\0" + struct.pack(">QQ", 0, 1 << 21),
        b"\x08\x00\x06\x00\x16\x00\x03rom\0" + struct.pack(">QQ", 0, 4096),
        b"\x08\x00\x02\x00\x04" + struct.pack(">I", 2),
    ]
    assert data == b"".join(expected)


def test_no_footers_no_configuration_and_large_host_pages() -> None:
    stream = StreamInfo(**{**vars(STREAM), "footers": False, "configuration": False})
    block = Block(name="r", length=1 << 16, page_size=1 << 16)
    data = postcopy.opening(
        stream=stream,
        configuration=b"",
        blocks=[block],
        page_sizes=[1 << 16],
        host_page_size=1 << 16,
    )
    # Memory of the host's own page size is the default: the size is not told.
    listed = struct.pack(">Q", 1 << 16 | 4) + b"\x01r" + struct.pack(">Q", 1 << 16)
    assert listed + struct.pack(">Q", 0x10) + b"\x08\x00\x06" in data


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (b"", b""),
        (MACHINE, MACHINE),
        (MACHINE + CAPABILITIES, MACHINE),
        (MACHINE + PAGE_BITS + CAPABILITIES + UUID, MACHINE + PAGE_BITS + UUID),
        (MACHINE + b"\x05\x03new" + CAPABILITIES,) * 2,
        (MACHINE + CAPABILITIES[:-20],) * 2,
        (MACHINE + b"\x05",) * 2,
        (MACHINE[:3],) * 2,
    ],
)
def test_capabilities_are_left_out(given: bytes, kept: bytes) -> None:
    assert postcopy.without_capabilities(given) == kept


def test_package() -> None:
    data = postcopy.package(b"DEVICES")
    assert data == (
        b"\x08\x00\x07\x00\x04" + struct.pack(">I", 26) + b"\x08\x00\x04\x00\x00DEVICES"
        b"\x08\x00\x02\x00\x04\x00\x00\x00\x03\x08\x00\x05\x00\x00"
    )


def test_package_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postcopy, "PACKAGE_MAX", 16)
    with pytest.raises(errors.StreamUnsupported, match="7 bytes"):
        postcopy.package(b"DEVICES")


def test_recovery() -> None:
    assert postcopy.recv_bitmap("pc.ram") == b"\x08\x00\x0a\x00\x07\x06pc.ram"
    assert postcopy.resume() == b"\x08\x00\x09\x00\x00"


def message(kind: int, body: bytes) -> bytes:
    return struct.pack(">HH", kind, len(body)) + body


BITMAP = bytes(range(8)) + bytes(8)
RECEIVED = (
    message(5, b"\x06pc.ram")
    + struct.pack(">Q", 16)
    + BITMAP
    + struct.pack(">Q", 0x0123456789ABCDEF)
)
ANSWERS = [
    message(2, struct.pack(">I", 7)),
    message(3, struct.pack(">QI", 8192, 4096) + b"\x06pc.ram"),
    RECEIVED,
    message(4, struct.pack(">QI", 4096, 4096)),
    message(6, struct.pack(">I", 1)),
    message(7, b""),
    message(1, bytes(4)),
]


def parse(data: bytes, cuts: list[int]) -> tuple[list[Message], bytes]:
    path = ReturnPath({"pc.ram": 65 * 4096})
    found = []
    for first, last in zip([0, *cuts], [*cuts, len(data)], strict=True):
        found += list(path.push(data[first:last]))
    return found, path.rest


@pytest.mark.parametrize("seed", range(50))
def test_return_path_in_any_split(seed: int) -> None:
    data = b"".join(ANSWERS) + b"\0"
    count = random.Random(seed).randrange(len(data))
    cuts = sorted(random.Random(seed).sample(range(len(data) + 1), count))
    found, rest = parse(data, cuts)
    assert [each.raw for each in found] == ANSWERS
    assert rest == b"\0"
    pong, ask, bitmap, _, acknowledged, *_ = found
    assert (pong.type, pong.value) == (Reply.PONG, 7)
    assert (ask.type, ask.block) == (Reply.REQ_PAGES_ID, "pc.ram")
    assert (bitmap.type, bitmap.bitmap) == (Reply.RECV_BITMAP, BITMAP)
    postcopy.check_resume_ack(acknowledged)
    with pytest.raises(errors.PeerNonsense):
        postcopy.check_resume_ack(pong)


@pytest.mark.parametrize(
    "data",
    [
        message(0, b""),
        message(9, bytes(4)),
        message(2, bytes(5)),
        message(4, bytes(13)),
        b"\x00\x03\xff\xff",
        message(3, bytes(12) + b"\x05pc.ram"),
        message(5, b"\x05other"),
        message(5, b"\x06pc.ram") + struct.pack(">Q", 1 << 40),
        RECEIVED[:-1] + b"\0",
    ],
    ids=range(9),
)
def test_nonsense(data: bytes) -> None:
    with pytest.raises(errors.PeerNonsense):
        parse(data, [])
