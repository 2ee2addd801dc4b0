# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the pages of the pattern guest hold, by formula (see its kernel.c)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

PAGE = 4096
ARENA = 16 << 20
CONTROL = 15 << 20
DUP_PERIOD = 16
_WORDS = PAGE // 8
_M32 = 0xFFFFFFFF
MARK_OFFSET = PAGE - 4
COUNTER_OFFSET = PAGE - 8


def _mix(x: int) -> int:
    x ^= x >> 16
    x = x * 0x7FEB352D & _M32
    x ^= x >> 15
    x = x * 0x846CA68B & _M32
    return x ^ x >> 16


def _multipliers() -> Iterator[int]:
    x = 0x9E3779B9
    for _ in range(_WORDS):
        x ^= x << 13 & _M32
        x ^= x >> 17
        x ^= x << 5 & _M32
        yield x


# 64-bit lanes of 32-bit numbers: times a 32-bit key, no lane runs over.
_LANES = sum(m << 64 * i for i, m in enumerate(_multipliers()))
_TEXT_MASK = int.from_bytes(b"\x0f" * PAGE)
_TEXT_BASE = int.from_bytes(b"a" * PAGE)
_ZERO = bytes(PAGE)


def physical(page: int) -> int:
    """Guest-physical address of arena page PAGE (on `pc`, its offset in pc.ram)."""
    return ARENA + page * PAGE


def content(kind: str, seed: int, page: int) -> bytes:
    """Arena page PAGE after `fill SEED .. KIND`."""
    if kind == "zero":
        return _ZERO
    if kind.startswith("unit:"):
        _, length, unit = kind.split(":")
        return bytes.fromhex(unit) * (PAGE // int(length))
    if kind == "dup":
        page %= DUP_PERIOD
    elif kind not in {"data", "text"}:
        raise ValueError(kind)
    key = _mix((page + _mix(seed)) & _M32) | 0x80000001
    words = _LANES * key
    if kind == "text":
        words = (words & _TEXT_MASK) + _TEXT_BASE
    return struct.pack("<II", page, seed) + words.to_bytes(PAGE, "little")[8:]


def marked(page_content: bytes, mark: int, page: int) -> bytes:
    """PAGE_CONTENT after `write MARK` reached PAGE."""
    return page_content[:MARK_OFFSET] + struct.pack("<I", mark + page & _M32)


def touch_order(seed: int, count: int, n: int) -> Iterator[int]:
    """Pages, relative to FIRST, in the order of `touch SEED .. random N`."""
    bits = max(1, (count - 1).bit_length())
    mask, half = (1 << bits) - 1, (bits + 1) // 2
    at = 0
    for _ in range(n):
        while True:
            x, key = at, _mix(seed)
            at += 1
            for _ in range(3):
                x = x * 0x9E3779B1 + key & mask
                x ^= x >> half
                key = _mix(key)
            if x < count:
                yield x
                break


@dataclass(frozen=True)
class Control:
    """The block at physical 15 MiB, as a memory image shows it."""

    nonce: str
    spinning: bool
    first: int
    count: int
    total: int

    @classmethod
    def parse(cls, page_content: bytes) -> Control:
        magic, nonce, on, first, count, total = struct.unpack_from(
            "<8s128s4I", page_content
        )
        if magic != b"PATTERN1":
            raise ValueError(f"no pattern guest here: {magic!r}")
        text = nonce.split(b"\0")[0].decode()
        return cls(text, bool(on), first, count, total)

    def counter_is_right(self, page: int, page_content: bytes) -> bool:
        """Whether arena page PAGE has a count of this very instant."""
        (found,) = struct.unpack_from("<I", page_content, COUNTER_OFFSET)
        rounds, at = divmod(self.total, self.count)
        index = page - self.first
        allowed = {rounds + 1} if index < at else {rounds}
        if index == at:
            allowed.add(rounds + 1)
        return found in allowed
