# SPDX-License-Identifier: LGPL-2.1-or-later
"""A minimal redis client, and values that anybody can compute again."""

from __future__ import annotations

import socket
import struct
import time
from types import TracebackType
from typing import Self

VALUE_SIZE = 4000  # with redis' header just in a 4 KiB size class
_BATCH = 64
_HEADER = 424
_RAW = 352
_WORDS = (VALUE_SIZE - _HEADER) // 8
_TEXT = VALUE_SIZE - _HEADER - _RAW
_NAMES = ("ada", "barbara", "dennis", "edsger", "grace", "ken", "margaret", "niklaus")
_CITIES = ("Basel", "Delft", "Espoo", "Lyon", "Porto", "Tartu", "Uppsala", "Zagreb")

_TERMS = (
    "Goods remain the property of the seller until paid for in full. Claims are to "
    "be made in writing within fourteen days of delivery. The place of performance "
    "is the seat of the seller; the law of that place applies, whatever the buyer's "
    "own terms may say. Should one of these provisions be void, the others stand."
)

Reply = bytes | int | None | list["Reply"]


class RedisError(Exception):
    """Redis answered with an error."""


def key(index: int) -> str:
    return f"key:{index:08d}"


def _lanes() -> int:
    x, lanes = 0x2545F491, 0
    for i in range(_WORDS):
        x = x * 1664525 + 1013904223 & 0xFFFFFFFF
        lanes |= (x | 1) << 64 * i
    return lanes


_LANES = _lanes()
_TEXT_MASK = int.from_bytes(b"\x0f" * _TEXT)
_TEXT_BASE = int.from_bytes(b"a" * _TEXT)


def value(index: int, seed: int = 1) -> bytes:
    """Value of key INDEX: a record, text, and some bytes of noise.

    zstd -3 makes about half of it.
    """
    number = (index * 0x9E3779B1 + seed * 0x85EBCA6B) & 0xFFFFFFFF
    number = (number ^ number >> 15) * 0x2C1B3C6D & 0xFFFFFFFF
    header = (
        f'{{"id": {index}, "seed": {seed}, "name": "{_NAMES[number & 7]}", '
        f'"city": "{_CITIES[number >> 3 & 7]}", "balance": {number >> 6}, '
        f'"terms": "{_TERMS}", "text": "'
    )
    noise = _LANES * (number | 0x80000001)
    low = noise & (1 << 8 * _RAW) - 1
    text = (noise >> 8 * _RAW & _TEXT_MASK) + _TEXT_BASE
    return (
        header.encode().ljust(_HEADER)
        + text.to_bytes(_TEXT, "little")
        + struct.pack("<I", index)
        + low.to_bytes(_RAW, "little")[4:]
    )


class RedisClient:
    """One connection to 127.0.0.1:PORT."""

    def __init__(self, port: int, deadline: float = 60.0) -> None:
        self._deadline = deadline
        end = time.monotonic() + deadline
        while True:
            try:
                self._socket = socket.create_connection(("127.0.0.1", port), deadline)
                self._file = self._socket.makefile("rb")
                assert self.command("PING") == b"PONG"
            except (OSError, EOFError):
                # slirp accepts before the guest listens, and then hangs up
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
            else:
                return

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def command(self, *words: str | bytes | int) -> Reply:
        self._socket.sendall(_request(*words))
        return self._reply()

    def get(self, name: str) -> bytes | None:
        reply = self.command("GET", name)
        assert reply is None or isinstance(reply, bytes)
        return reply

    def set(self, name: str, content: str | bytes) -> None:
        assert self.command("SET", name, content) == b"OK"

    def dbsize(self) -> int:
        reply = self.command("DBSIZE")
        assert isinstance(reply, int)
        return reply

    def info(self) -> dict[str, str]:
        reply = self.command("INFO")
        assert isinstance(reply, bytes)
        lines = (line.split(":", 1) for line in reply.decode().splitlines())
        return {line[0]: line[1] for line in lines if len(line) == 2}

    def load(self, count: int, *, seed: int = 1, first: int = 0) -> None:
        """Set key(i) = value(i, seed) for COUNT keys, in a pipeline."""
        outstanding = 0
        for start in range(first, first + count, _BATCH):
            batch = range(start, min(start + _BATCH, first + count))
            requests = [_request("SET", key(i), value(i, seed)) for i in batch]
            self._socket.sendall(b"".join(requests))
            self._expect_ok(outstanding)
            outstanding = len(batch)
        self._expect_ok(outstanding)

    def check(self, indexes: range | list[int], *, seed: int = 1) -> None:
        """Every key of INDEXES has its value."""
        for start in range(0, len(indexes), _BATCH):
            batch = indexes[start : start + _BATCH]
            self._socket.sendall(b"".join(_request("GET", key(i)) for i in batch))
            for i in batch:
                found = self._reply()
                assert found == value(i, seed), f"{key(i)} is {found!r}"

    def _expect_ok(self, count: int) -> None:
        replies = self._file.read(5 * count)
        assert replies == b"+OK\r\n" * count, replies[:200]

    def _reply(self) -> Reply:
        line = self._file.readline()
        if not line.endswith(b"\r\n"):
            raise EOFError("redis closed the connection")
        kind, rest = line[:1], line[1:-2]
        if kind == b"+":
            return rest
        if kind == b":":
            return int(rest)
        if kind == b"-":
            raise RedisError(rest.decode())
        length = int(rest)
        if length < 0:
            return None
        if kind == b"*":
            return [self._reply() for _ in range(length)]
        return self._file.read(length + 2)[:-2]


def _request(*words: str | bytes | int) -> bytes:
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        content = word if isinstance(word, bytes) else str(word).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(content), content))
    return b"".join(parts)


def keys_for(megabytes: int) -> int:
    """How many keys make so many megabytes of values."""
    return (megabytes << 20) // VALUE_SIZE
