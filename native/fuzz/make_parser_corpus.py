# SPDX-License-Identifier: LGPL-2.1-or-later
"""Write the seeds of fuzz_parser, each named by the phase that it is about."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

HEADER = b"QEVM" + struct.pack(">I", 3)
PAGE = bytes(range(256)) * 16


def counted(name: str) -> bytes:
    return bytes([len(name)]) + name.encode()


def configuration(machine: str, *, sub: bytes = b"") -> bytes:
    return b"\x07" + struct.pack(">I", len(machine)) + machine.encode() + sub


def subsection(name: str, data: bytes) -> bytes:
    return b"\x05" + counted(name) + struct.pack(">I", 1) + data


def section(kind: int, body: bytes, *, footers: bool, identity: bytes = b"") -> bytes:
    end = b"\x7e" + struct.pack(">I", 2) if footers else b""
    return bytes([kind]) + struct.pack(">I", 2) + identity + body + end


def entry(offset: int, flags: int, rest: bytes = b"") -> bytes:
    return struct.pack(">Q", offset | flags) + rest


EOS = entry(0, 0x10)


def setup(*, footers: bool = True, extra: bytes = b"") -> bytes:
    blocks = [("pc.ram", 3 * 4096), ("pc.bios", 4096)]
    body = entry(sum(length for _, length in blocks), 4)
    for name, length in blocks:
        body += counted(name) + struct.pack(">Q", length) + extra
    identity = counted("ram") + struct.pack(">II", 0, 4)
    return section(1, body + EOS, footers=footers, identity=identity)


def pages(*, footers: bool = True) -> bytes:
    body = entry(0, 8, counted("pc.ram") + PAGE)
    body += entry(4096, 2 | 0x20, b"\0") + entry(8192, 8 | 0x20, PAGE)
    body += entry(0, 2, counted("pc.bios") + b"\0")
    return section(2, body + EOS, footers=footers)


def end(*, footers: bool = True) -> bytes:
    return section(3, EOS, footers=footers)


def device(*, footers: bool = True) -> bytes:
    identity = counted("timer") + struct.pack(">II", 0, 2)
    return section(4, b"\0" * 24, footers=footers, identity=identity)


def description() -> bytes:
    text = b'{"page_size": 4096, "devices": []}'
    return b"\x06" + struct.pack(">I", len(text)) + text


def seeds() -> dict[str, bytes]:
    pc = configuration("pc-i440fx-10.0")
    capabilities = struct.pack(">I", 1) + counted("multifd")
    bits = subsection("configuration/target-page-bits", struct.pack(">I", 12))
    caps = subsection("configuration/capabilities", capabilities)
    uuid = subsection("configuration/uuid", bytes(16))
    tail = device() + b"\0" + description()
    advise = b"\x08" + struct.pack(">HHQQ", 3, 16, 0x1000, 0x1000)
    return {
        "header": HEADER,
        "configuration": HEADER + configuration("virt-10.0", sub=bits + uuid),
        "configuration-multifd": HEADER + configuration("virt-10.0", sub=caps),
        "block-list": HEADER + pc + setup(),
        "block-list-page-size": HEADER
        + advise
        + setup(extra=struct.pack(">Q", 1 << 21)),
        "pages": HEADER + pc + setup() + pages(),
        "whole": HEADER + pc + setup() + pages() + end() + tail,
        "whole-no-configuration": HEADER + setup() + pages() + end() + tail,
        "whole-no-footers": HEADER
        + pc
        + setup(footers=False)
        + pages(footers=False)
        + end(footers=False)
        + device(footers=False)
        + b"\0",
        "flag-xbzrle": HEADER + pc + setup() + section(2, entry(0, 0x40), footers=True),
        "packaged": HEADER + b"\x08" + struct.pack(">HHI", 7, 4, 100) + bytes(100),
    }


def main() -> None:
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in seeds().items():
        (directory / name).write_bytes(data)


if __name__ == "__main__":
    main()
