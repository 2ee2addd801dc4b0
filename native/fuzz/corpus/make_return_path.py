# SPDX-License-Identifier: LGPL-2.1-or-later
"""Write the seeds of fuzz_return_path: a mode byte, then return path messages."""

from __future__ import annotations

import struct
from pathlib import Path

PREEMPT, PREFETCH, BACKGROUND, HUGE, EARLY, FINISH = 1, 2, 4, 8, 16, 32


def message(kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">HH", kind, len(data)) + data


def named(start: int, name: bytes, length: int = 4096) -> bytes:
    return message(3, struct.pack(">QIB", start, length, len(name)) + name)


def same(start: int, length: int = 4096) -> bytes:
    return message(4, struct.pack(">QI", start, length))


FIRST = named(0x2000, b"pc.ram")
PONG = message(2, bytes([0, 0, 0, 3]))

SEEDS = {
    "request-first": (0, FIRST),
    "request-same-block": (
        PREFETCH,
        FIRST + same(0x3000) + same(0x2000) + named(0, b"b") + same(0x1000),
    ),
    "request-preempt": (PREEMPT | PREFETCH, FIRST + same(0x6000) + same(0xA000)),
    "request-huge": (HUGE, named(0x10000, b"pc.ram", 65536) + same(0, 65536)),
    "request-huge-preempt": (
        HUGE | PREEMPT,
        named(0x10000, b"pc.ram", 65536) + same(0x20000, 65536),
    ),
    "request-long": (BACKGROUND, named(0x8000, b"pc.ram", 0x40000)),
    "request-absent": (0, named(0x7000, b"pc.ram")),
    "request-outside": (0, named(0x80000, b"pc.ram")),
    "request-unnamed": (0, same(0)),
    "early-background": (EARLY | BACKGROUND | PREFETCH, message(7) + PONG + FIRST),
    "finish-shut": (FINISH, PONG + message(1, bytes(4))),
    "shut-error": (BACKGROUND, message(1, bytes([0, 0, 0, 1]))),
    "recover-ack": (0, message(6, bytes([0, 0, 0, 1])) + FIRST),
    "recover-bitmap": (0, message(5, b"\6pc.ram")),
    "bad-type": (0, message(9)),
    "bad-length": (0, message(3, bytes(300))),
}


def main() -> None:
    directory = Path(__file__).parent / "return_path"
    directory.mkdir(exist_ok=True)
    for name, (mode, data) in SEEDS.items():
        (directory / name).write_bytes(bytes([mode]) + data)


if __name__ == "__main__":
    main()
