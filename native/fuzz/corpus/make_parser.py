# SPDX-License-Identifier: LGPL-2.1-or-later
"""Write the seeds of fuzz_parser: one small stream for each protocol phase.

python3 make_parser.py [DIRECTORY]     (default: parser/ beside this file)
"""

import struct
import sys
from collections.abc import Iterator
from pathlib import Path

RAM = 2
PAGE = 4096


def name(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()


def u16(value: int) -> bytes:
    return struct.pack(">H", value)


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


def footer(section: int) -> bytes:
    return b"\x7e" + u32(section)


def subsection(title: str, body: bytes) -> bytes:
    return b"\x05" + name(title) + u32(1) + body


def capabilities(*names: str) -> bytes:
    body = u32(len(names)) + b"".join(map(name, names))
    return subsection("configuration/capabilities", body)


def command(number: int, body: bytes = b"") -> bytes:
    return b"\x08" + u16(number) + u16(len(body)) + body


def start(section_name: str = "ram", version: int = 4) -> bytes:
    return b"\x01" + u32(RAM) + name(section_name) + u32(0) + u32(version)


def block(title: str, pages: int, *extra: int) -> bytes:
    return name(title) + u64(pages * PAGE) + b"".join(map(u64, extra))


def entry(offset: int, flags: int, title: str | None, body: bytes) -> bytes:
    if title is None:
        return u64(offset | flags | 0x20) + body
    return u64(offset | flags) + name(title) + body


def zero(offset: int, title: str | None = None) -> bytes:
    return entry(offset, 0x02, title, b"\0")


def page(offset: int, title: str | None = None) -> bytes:
    return entry(offset, 0x08, title, bytes(i * i >> 3 & 255 for i in range(PAGE)))


HEADER = b"QEVM" + u32(3)
MACHINE = b"\x07" + u32(7) + b"pc-test"
BEGIN = HEADER + MACHINE
LIST = u64(4 * PAGE | 0x04) + block("pc.ram", 3) + block("pc.rom", 1)
EOS = u64(0x10)
PART = b"\x02" + u32(RAM)
END = b"\x03" + u32(RAM) + EOS
DEVICE = b"\x04" + u32(7) + name("timer") + u32(0) + u32(1) + b"\1\0\x7e\0\0"
JSON = b'{"devices": []}'
DESCRIPTION = b"\x06" + u32(len(JSON)) + JSON
FOOT = footer(RAM)
PAGES = zero(0, "pc.ram") + page(PAGE) + zero(2 * PAGE) + zero(0, "pc.rom")
WHOLE = (
    BEGIN
    + start()
    + LIST
    + EOS
    + FOOT
    + PART
    + PAGES
    + EOS
    + FOOT
    + command(11)
    + END
    + FOOT
    + DEVICE
    + footer(7)
)
ADVISE = command(1) + command(2, u32(1)) + command(3, u64(0x201000) + u64(PAGE))


def seeds() -> Iterator[tuple[str, bytes]]:
    yield "header", HEADER
    yield "header-version", b"QEVM" + u32(2)
    yield "configuration", BEGIN
    yield (
        "configuration-subsections",
        BEGIN
        + subsection("configuration/target-page-bits", u32(12))
        + capabilities("x-ignore-shared", "postcopy-ram")
        + subsection("configuration/uuid", bytes(16))
        + start(),
    )
    yield "configuration-multifd", BEGIN + capabilities("multifd")
    yield "command-advise", BEGIN + ADVISE + start()
    yield "command-packaged", BEGIN + command(7, u32(100))
    yield "section-block", BEGIN + start("block", 1)
    yield "section-full-early", BEGIN + DEVICE
    yield "list", BEGIN + start() + LIST + EOS + FOOT
    yield (
        "list-page-size",
        BEGIN
        + ADVISE
        + start()
        + u64(1024 * PAGE | 0x04)
        + block("pc.ram", 512, 2 << 20)
        + block("pc.rom", 512)
        + EOS
        + FOOT,
    )
    yield (
        "list-address",
        BEGIN
        + capabilities("x-ignore-shared")
        + start()
        + u64(2 * PAGE | 0x04)
        + block("pc.ram", 1, 0)
        + block("pc.rom", 1, 0xC0000)
        + EOS
        + FOOT,
    )
    yield "pages", BEGIN + start() + LIST + EOS + FOOT + PART + PAGES
    yield "pages-no-footers", HEADER + start() + LIST + EOS + PART + PAGES + EOS + END
    yield "pages-xbzrle", BEGIN + start() + LIST + EOS + FOOT + PART + u64(0x48)
    yield "devices", WHOLE
    yield "whole", WHOLE + b"\0"
    yield "whole-description", WHOLE + b"\0" + DESCRIPTION
    yield "whole-padding", WHOLE + b"\0" + DESCRIPTION + bytes(100)
    yield (
        "whole-no-footers",
        HEADER
        + start()
        + LIST
        + EOS
        + PART
        + PAGES
        + EOS
        + END
        + DEVICE
        + b"\0"
        + DESCRIPTION,
    )


def main() -> None:
    here = Path(__file__).parent / "parser"
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else here
    target.mkdir(parents=True, exist_ok=True)
    for title, data in seeds():
        (target / title).write_bytes(data)


if __name__ == "__main__":
    main()
