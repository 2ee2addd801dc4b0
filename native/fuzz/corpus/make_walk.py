# SPDX-License-Identifier: LGPL-2.1-or-later
"""Write the seeds of fuzz_walk: registers, then words of memory by page."""

from __future__ import annotations

import struct
from collections import defaultdict
from pathlib import Path

X86_64, AARCH64, RISCV64, TWO = 1, 2, 3, 4
HIGH = 1 << 32
HIGH_PAGE = 512
USER = 0x7F0000000000
KERNEL = 0xFFFFC00000000000
DIRECT = 0xFFFF888000000000
TEXT = 0xFFFFFFFF80000000
DATA = 200


class Guest:
    """Memory as words by page, and tables taken from page 2 on."""

    def __init__(self, architecture: int, levels: int) -> None:
        self.architecture = architecture
        self.levels = levels
        self.words: dict[int, dict[int, int]] = defaultdict(dict)
        self.next = 2

    def table(self) -> int:
        self.next += 1
        return self.next - 1

    def table_entry(self, page: int) -> int:
        if self.architecture == RISCV64:
            return page << 10 | 1
        return page << 12 | (0x67 if self.architecture == X86_64 else 3)

    def leaf(self, address: int, level: int, user: bool) -> int:
        if self.architecture == X86_64:
            return address | (0x67 if user else 0x63) | (0x80 if level else 0)
        if self.architecture == AARCH64:
            return address | (0xF40 if user else 1 << 54 | 0x700) | (1 if level else 3)
        return address >> 2 | (0xDF if user else 0xCF)

    def map(
        self,
        root: int,
        virtual: int,
        address: int,
        level: int = 0,
        *,
        user: bool = True,
    ) -> None:
        page = root
        for at in range(self.levels - 1, level, -1):
            index = virtual >> (12 + 9 * at) & 511
            entry = self.words[page].get(index)
            if entry is None:
                entry = self.words[page][index] = self.table_entry(self.table())
            shift = 10 if self.architecture == RISCV64 else 12
            page = entry >> shift & 0xFFFFFFF
        index = virtual >> (12 + 9 * level) & 511
        self.words[page][index] = self.leaf(address, level, user)

    def data(self, page: int, count: int = 1) -> None:
        for i in range(count):
            self.words[page + i].update({0: 0x1234567, 7: 0xFFFF})

    def kernel(self, root: int, direct: int = DIRECT) -> None:
        self.map(root, direct, 0, 1, user=False)
        self.map(root, direct + HIGH, HIGH, 1, user=False)
        self.map(root, TEXT, DATA << 12, user=False)
        self.data(DATA)

    def process(self, root: int, number: int) -> None:
        for i in range(6):
            page = DATA + 20 + number * 10 + (5 - i if number else i)
            self.map(root, USER + (i << 12), page << 12)
            self.data(page)
        self.map(root, USER + (1 << 21), HIGH, 1)
        self.data(HIGH_PAGE + 9, 2)

    def pages(self) -> bytes:
        out = bytearray()
        for page, words in sorted(self.words.items()):
            left = sorted(words.items())
            while left:
                first = left[0][0]
                group = [
                    value
                    for i, (index, value) in enumerate(left[:255])
                    if index == first + i
                ]
                left = left[len(group) :]
                out += struct.pack("<HHB", page, first, len(group))
                out += struct.pack(f"<{len(group)}Q", *group)
        return bytes(out)


def seed(kind: int, registers: tuple[int, ...], memory: bytes) -> bytes:
    return struct.pack("<B6Q", kind, *registers, *([0] * (6 - len(registers)))) + memory


def x86(guest: Guest, root: int) -> tuple[int, ...]:
    return (0x80050033, root << 12, 0x1020 if guest.levels == 5 else 0x20, 0xD01)


def arm(guest: Guest, root: int, kernel: int) -> tuple[int, ...]:
    size = 16 if guest.levels == 4 else 25
    return (1, root << 12, kernel << 12, size | size << 16 | 2 << 30)


def processes_x86_64(levels: int) -> bytes:
    guest = Guest(X86_64, levels)
    roots = [guest.table() for _ in range(3)]
    guest.kernel(roots[0], DIRECT if levels == 4 else 0xFF11000000000000)
    upper = {i: v for i, v in guest.words[roots[0]].items() if i >= 256}
    for number, root in enumerate(roots[1:]):
        guest.words[root].update(upper)
        guest.process(root, number)
    return seed(X86_64 | TWO, x86(guest, roots[0]), guest.pages())


def kpti() -> bytes:
    guest = Guest(X86_64, 4)
    root, user = guest.table(), guest.table()
    guest.kernel(root)
    guest.process(root, 0)
    lower = {i: v for i, v in guest.words[root].items() if i < 256}
    guest.words[user] = {**lower, 511: guest.words[root][511]}
    return seed(X86_64, x86(guest, user), guest.pages())


def files() -> bytes:
    """An array of struct page, and a file whose inode is in page DATA + 1."""
    guest = Guest(X86_64, 4)
    root = guest.table()
    guest.kernel(root)
    guest.process(root, 0)
    guest.process(root, 1)
    for i in range(8):
        guest.map(root, KERNEL + (i << 12), (DATA - 20 + i) << 12, user=False)
    inode = DIRECT + ((DATA + 1) << 12) + 64
    guest.words[DATA + 1][(64 + 360) // 8] = inode
    for frame in range(512):
        page, at = DATA - 20 + frame // 64, frame % 64 * 8
        guest.words[page][at + 6] = 0x1FFFFFFFF
    anonymous = {DATA + 20 + i: i for i in range(6)}
    anonymous |= {DATA + 30 + 5 - i: i for i in range(6)}
    for frame, i in anonymous.items():
        page, at = DATA - 20 + frame // 64, frame % 64 * 8
        guest.words[page].update({at + 3: DIRECT + 1, at + 4: (USER >> 12) + i})
    for i in range(5):
        page, at = DATA - 20 + (DATA + 50 + i) // 64, (DATA + 50 + i) % 64 * 8
        guest.data(DATA + 50 + i)
        guest.words[page].update({at + 3: inode + 360, at + 4: 9 - i})
    guest.data(DATA + 60)
    page, at = DATA - 20 + (DATA + 60) // 64, (DATA + 60) % 64 * 8
    guest.words[page][at + 6] = 0xFFFFFF7F
    return seed(X86_64, x86(guest, root), guest.pages())


def processes_aarch64(levels: int) -> bytes:
    guest = Guest(AARCH64, levels)
    kernel, first, second = (guest.table() for _ in range(3))
    guest.kernel(kernel, -1 << (48 if levels == 4 else 39) & (1 << 64) - 1)
    guest.process(first, 0)
    guest.process(second, 1)
    return seed(AARCH64, arm(guest, first, kernel), guest.pages())


def riscv64(levels: int) -> bytes:
    guest = Guest(RISCV64, levels)
    root = guest.table()
    guest.kernel(root, 0xFFFFFFC000000000)
    guest.process(root, 0)
    return seed(RISCV64, ((levels + 5) << 60 | root,), guest.pages())


def explosion() -> bytes:
    """Tables that refer to each other with all their entries."""
    guest = Guest(X86_64, 4)
    memory = b""
    for page in range(2, 6):
        entry = (
            guest.table_entry(page + 1) if page < 5 else guest.leaf(DATA << 12, 0, True)
        )
        for index in (0, 256):
            memory += struct.pack("<HHBQ", page, 0x8000 | index, 128, entry)
    memory += struct.pack("<HHBQ", DATA, 0, 1, 1)
    return seed(X86_64, x86(guest, 2), memory)


def damaged() -> bytes:
    guest = Guest(X86_64, 4)
    root = guest.table()
    guest.kernel(root)
    guest.process(root, 0)
    guest.words[root].update({1: root << 12 | 0x67, 2: 1 << 40 | 0x67, 3: 0xE7})
    guest.map(root, 1 << 30, 3 << 30, 2)
    return seed(X86_64, x86(guest, root), guest.pages())


def led_on() -> bytes:
    """All of the kernel's mappings are of the same 2 MiB, again and again."""
    guest = Guest(X86_64, 4)
    root = guest.table()
    guest.map(root, 0, 100 << 12)
    (table,) = (
        page for page in guest.words if guest.words[page].get(0) == 100 << 12 | 0x67
    )
    guest.words[table].update({i: (100 + i) << 12 | 0x67 for i in range(64)})
    for directory in range(5):
        for entry in range(512):
            guest.map(
                root, KERNEL + (directory << 30) + (entry << 21), 0, 1, user=False
            )
    for page in range(20, 512):
        guest.words[page].setdefault(0, 0x1234)
    return seed(X86_64, x86(guest, root), guest.pages())


SEEDS = {
    "x86-64-led-on": led_on(),
    "x86-64-4": processes_x86_64(4),
    "x86-64-5": processes_x86_64(5),
    "x86-64-kpti": kpti(),
    "x86-64-files": files(),
    "x86-64-explosion": explosion(),
    "x86-64-damaged": damaged(),
    "x86-64-off": seed(X86_64, (1, 0x2000), b""),
    "aarch64-3": processes_aarch64(3),
    "aarch64-4": processes_aarch64(4),
    "riscv64-sv39": riscv64(3),
    "riscv64-sv48": riscv64(4),
    "none": seed(0, (), b""),
}


def main() -> None:
    directory = Path(__file__).parent / "walk"
    directory.mkdir(exist_ok=True)
    for name, data in SEEDS.items():
        (directory / name).write_bytes(data)


if __name__ == "__main__":
    main()
