# SPDX-License-Identifier: LGPL-2.1-or-later
"""A damaged file is refused, or gives exactly the right pages; never others."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import qemu_pagesaver
from qemu_pagesaver import errors
from qemu_pagesaver.native import Image, PageClass, Section
from tests.support import qemus
from tests.support.vm import Vm, private_directory

SECTIONS = (Section.CONFIGURATION, Section.DEVICES, Section.DESCRIPTION)


def everything(file: int) -> list[object]:
    """All that a restore takes from a snapshot: page map, pages, sections."""
    found: list[object] = []
    with Image(file, name="damaged") as image:
        for block in image.ram_blocks:
            for run in image.runs(block.index):
                zero = run.page_class is PageClass.ZERO
                found.append((block.name, run.first, run.count, zero))
                if not zero:
                    found.append(image.read_pages(block.index, run.first, run.count))
        found += map(image.section, SECTIONS)
        found.append(image.info().stream)
    return found


class Victim:
    """A small real snapshot, and a copy of it that may be damaged."""

    def __init__(self, directory: Path, compression: str) -> None:
        original = directory / f"{compression.partition(':')[0]}.psnap"
        with Vm(qemus.get(), "pattern", memory=64) as vm:
            vm.start()
            vm.pattern.fill(3, 0, 300, "text")
            vm.pattern.fill(3, 300, 100, "data")
            vm.pattern.fill(3, 400, 100, "dup")
            vm.pattern.fill(3, 500, 100, "unit:16:000102030405060708090a0b0c0d0e0f")
            qemu_pagesaver.save(vm.qmp_path, original, compression=compression)
        self.bytes = original.read_bytes()
        self.copy = os.open(directory / "copy", os.O_RDWR | os.O_CREAT, 0o600)
        os.pwrite(self.copy, self.bytes, 0)
        self.right = everything(self.copy)

    def survives(self) -> bool:
        """Whether the copy still opens; then all of it must be right."""
        try:
            found = everything(self.copy)
        except errors.SnapshotError:
            return False
        assert found == self.right
        return True


@pytest.fixture(scope="module", params=["zstd:3", "none"])
def victim(request: pytest.FixtureRequest) -> Iterator[Victim]:
    directory = private_directory()
    made = Victim(directory, request.param)
    yield made
    os.close(made.copy)
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()


def flips(victim: Victim, count: int) -> int:
    rng = random.Random(5)
    harmless = 0
    for _ in range(count):
        at = rng.randrange(len(victim.bytes))
        flipped = victim.bytes[at] ^ 1 << rng.randrange(8)
        os.pwrite(victim.copy, bytes([flipped]), at)
        harmless += victim.survives()
        os.pwrite(victim.copy, victim.bytes[at : at + 1], at)
    assert victim.survives()
    return harmless


def truncations(victim: Victim, count: int) -> None:
    size = len(victim.bytes)
    ends = {0, 1, size - 1, *random.Random(6).sample(range(size), count)}
    for end in sorted(ends, reverse=True):
        os.ftruncate(victim.copy, end)
        assert not victim.survives(), end
    os.pwrite(victim.copy, victim.bytes, 0)
    assert victim.survives()


def test_bit_flips(victim: Victim) -> None:
    # Only padding between parts may be flipped without being noticed.
    assert flips(victim, 1000) < 100


def test_truncations(victim: Victim) -> None:
    truncations(victim, 200)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_many_bit_flips(victim: Victim) -> None:
    print(flips(victim, 10_000), "of 10000 flips were in padding")


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_many_truncations(victim: Victim) -> None:
    truncations(victim, 1000)
