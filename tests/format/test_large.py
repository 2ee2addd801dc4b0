# SPDX-License-Identifier: LGPL-2.1-or-later
"""64 GiB of RAM, 1 GiB in use: file, open time and memory follow the 1 GiB."""

from __future__ import annotations

import os
import random
import struct
import time
import uuid
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest

from qemu_pagesaver.files import spool_file
from qemu_pagesaver.native import NO_COMPRESSION, Image, Saver

PAGE = 4096
GIB = 1 << 30
ZERO, MEM_SIZE, DATA, EOS, CONTINUE = 0x02, 0x04, 0x08, 0x10, 0x20


def zero_pages(first: int, count: int) -> bytes:
    """Entries of zero pages of the block at hand, 9 bytes each."""
    offsets = (page * PAGE | ZERO | CONTINUE for page in range(first, first + count))
    numbers = array("Q", offsets)
    numbers.byteswap()
    columns = numbers.tobytes()
    out = bytearray(9 * count)
    for byte in range(8):
        out[byte::9] = columns[byte::8]
    return bytes(out)


def stream(ram: int, used: int) -> Iterator[bytes]:
    """A stream of one block whose used pages lie in stretches of 2 MiB."""
    ram_id = struct.pack(">I", 2)
    yield b"QEVM" + struct.pack(">I", 3)
    yield b"\x01" + ram_id + b"\x03ram" + struct.pack(">II", 0, 4)
    yield struct.pack(">Q", ram | MEM_SIZE) + b"\x06pc.ram" + struct.pack(">Q", ram)
    yield struct.pack(">Q", EOS) + b"\x7e" + ram_id
    # The first entry names the block, the others go on in it.
    yield b"\x02" + ram_id + struct.pack(">Q", ZERO) + b"\x06pc.ram" + b"\0"
    filler = random.Random(1).randbytes(PAGE - 8)
    every = ram // used
    step = 512
    for first in range(0, ram // PAGE, step):
        if first // step % every == 0:
            entries = (
                struct.pack(">Q", page * PAGE | DATA | CONTINUE)
                + struct.pack("<Q", page + 1)
                + filler
                for page in range(first, first + step)
            )
            yield b"".join(entries)
        else:
            yield zero_pages(first, step)
    yield struct.pack(">Q", EOS) + b"\x7e" + ram_id
    yield b"\x03" + ram_id + struct.pack(">Q", EOS) + b"\x7e" + ram_id + b"\0"


def figures(ram: int, used: int, directory: Path) -> dict[str, float]:
    path = directory / "large.psnap"
    with spool_file(directory) as spool, spool_file(directory) as units:
        saver = Saver(spool_fd=spool, units_fd=units, zstd_level=NO_COMPRESSION)
        for part in stream(ram, used):
            saver.feed(part)
        saver.end()
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        saver.write(fd, uuid=uuid.uuid4().bytes, parent=bytes(16), name=str(path))
        stats = saver.stats()
    assert stats.pages_data == used // PAGE
    assert stats.memory_bytes <= (64 << 20) + 48 * used // PAGE
    best = 1.0
    for _ in range(20):
        start = time.perf_counter()
        image = Image(fd, name=str(path))
        best = min(best, time.perf_counter() - start)
    runs = sum(1 for _ in image.runs(0))
    assert runs >= used // (2 << 20)
    info = image.info()
    image.close()
    os.close(fd)
    path.unlink()
    return {
        "save memory MiB": stats.memory_bytes / 2**20,
        "file MiB": info.file_bytes / 2**20,
        "index MiB": info.index_bytes / 2**20,
        "open ms": best * 1e3,
        "page map MiB": info.memory_bytes / 2**20,
    }


@pytest.mark.long
def test_cost_follows_use(disk_path: Path) -> None:
    small = figures(2 * GIB, GIB, disk_path)
    large = figures(64 * GIB, GIB, disk_path)
    print({"2 GiB": small, "64 GiB": large})
    assert large["file MiB"] < small["file MiB"] + 1
    assert large["page map MiB"] < small["page map MiB"] + 1
