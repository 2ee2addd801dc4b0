# SPDX-License-Identifier: LGPL-2.1-or-later
"""The C core and the Python reader agree on every exhibit of the museum."""

from __future__ import annotations

import random
from functools import partial

import pytest

from qemu_pagesaver import native
from qemu_pagesaver.errors import Damaged, PagesaverError
from qemu_pagesaver.image.slow import ABSENT, DATA, SlowImage

from . import museum, reading

EXHIBITS = museum.museum()
GOOD = [e for e in EXHIBITS if e.refused is None and e.sound]
INSIDE = [e for e in EXHIBITS if e.refused is None and not e.sound]
REFUSED = [e for e in EXHIBITS if e.refused is not None]


def sample(pages: int) -> list[int]:
    """All pages of small RAM blocks, some of large ones."""
    if pages <= 2000:
        return list(range(pages))
    return [*range(0, pages, 877), 512 * 514 + 3, pages - 1]


def test_the_museum_is_always_the_same() -> None:
    again = museum.museum()
    assert [(e.name, e.data) for e in again] == [(e.name, e.data) for e in EXHIBITS]
    assert len({e.name for e in EXHIBITS}) == len(EXHIBITS)


@pytest.mark.parametrize("exhibit", REFUSED, ids=lambda e: e.name)
def test_refused(exhibit: museum.Exhibit) -> None:
    assert reading.open_slow(exhibit.data, exhibit.name) == exhibit.refused
    assert reading.open_core(exhibit.data, exhibit.name) == exhibit.refused


@pytest.mark.parametrize("exhibit", GOOD, ids=lambda e: e.name)
def test_good(exhibit: museum.Exhibit) -> None:
    slow = reading.slow(exhibit.data, exhibit.name)
    with reading.core(exhibit.data, exhibit.name) as core:
        agree_on_facts(slow, core)
        for block, ram in enumerate(slow.ram_blocks):
            for page in sample(ram.pages):
                if slow.page_class(block, page) == ABSENT:
                    with pytest.raises(ValueError, match="does not have"):
                        slow.page(block, page)
                    with pytest.raises(ValueError, match="does not have"):
                        core.read_pages(block, page, 1)
                else:
                    assert slow.page(block, page) == core.read_pages(block, page, 1)
        assert slow.verify() == []
        assert core.check(native.Job()) == (0, [])


def agree_on_facts(slow: SlowImage, core: native.Image) -> None:
    info = core.info()
    assert info.uuid == slow.header.uuid
    assert info.pages_per_block == slow.header.pages_per_block
    assert info.canonical_pages == slow.canonical_pages
    assert info.locality_blocks == slow.locality_blocks
    for section in native.Section:
        assert core.section(section) == slow.section(int(section))
    assert len(core.ram_blocks) == len(slow.ram_blocks)
    agree_on_spaces(slow, core)
    for index, (mine, other) in enumerate(
        zip(slow.ram_blocks, core.ram_blocks, strict=True)
    ):
        assert (mine.name, mine.length) == (other.name, other.length)
        assert (mine.page_size, mine.address) == (other.page_size, other.address)
        assert mine.first_leaf == other.first_leaf
        runs = list(core.runs(index))
        assert sum(r.count for r in runs) == mine.pages
        at = 0
        for run in runs:
            assert run.first == at
            at += run.count
            for page in {run.first, run.first + run.count // 2, at - 1}:
                entry = slow.entry(index, page)
                assert entry.page_class == run.page_class
                if entry.page_class == DATA:
                    owner = slow.place(slow.owner(entry.value))
                    assert (owner != (index, page)) == run.shared


def agree_on_spaces(slow: SlowImage, core: native.Image) -> None:
    spaces = core.spaces()
    assert [
        (s.root, int(s.kind), s.first_run, s.run_count, s.pages, s.pages_shared)
        for s in spaces
    ] == [
        (s.root, s.kind, s.first_run, s.run_count, s.pages, s.pages_shared)
        for s in slow.spaces
    ]
    for mine, other in zip(spaces, slow.spaces, strict=True):
        for at, run in enumerate(core.virtual_runs(mine), other.first_run):
            same = slow.run(at)
            assert (run.address, run.pages) == (same.address, same.pages)
            assert slow.place(same.first) == (run.block, run.page)
            for page in {run.page, run.page + run.pages - 1}:
                found = core.mappings(run.block, page)
                assert sorted((m.space, m.address) for m in found) == sorted(
                    slow.mappings(run.block, page)
                )


@pytest.mark.parametrize("exhibit", INSIDE, ids=lambda e: e.name)
def test_broken_inside(exhibit: museum.Exhibit) -> None:
    """Both find it when they look, and no page comes out wrong meanwhile."""
    right = reading.slow(museum.small().seal(), "right")
    slow = reading.slow(exhibit.data, exhibit.name)
    problems = slow.verify()
    assert problems
    with reading.core(exhibit.data, exhibit.name) as core:
        count, found = core.check(native.Job())
        assert (count > 0) != exhibit.python_only
        assert len(found) == min(count, 1000)
        assert all(problem.message for problem in found)
        for page in [*range(16), 20, 100, 101, 102, 511, 512, 519]:
            got = reading.outcome(partial(core.read_pages, 0, page, 1))
            same = reading.outcome(partial(slow.page, 0, page))
            if isinstance(got, PagesaverError):
                assert type(got) is Damaged
                continue
            if not isinstance(same, PagesaverError):
                assert got == same
            # Only a file that is made on purpose can hold other pages.
            if not exhibit.name.startswith(("page-", "entry-", "unit-")):
                assert got == right.page(0, page)


def pages_or_error(data: bytes) -> bytes | str:
    """All pages of small(), read by the core, or the class of the error."""
    try:
        with reading.core(data, "file") as core:
            return b"".join(
                core.read_pages(i, 0, ram.length // 4096)
                for i, ram in enumerate(core.ram_blocks)
            )
    except PagesaverError as error:
        return type(error).__name__


@pytest.mark.parametrize("level", [3, None], ids=["zstd", "none"])
def test_every_truncation_is_refused(level: int | None) -> None:
    data = museum.draft(museum.guest(), level=level).seal()
    rng = random.Random(1)
    lengths = {0, 1, 7, 8, 4095, 4096, 4097, len(data) - 1, len(data) - 128}
    lengths |= {rng.randrange(len(data)) for _ in range(1000)}
    for length in sorted(lengths):
        want = "NotASnapshot" if length == 0 else "Truncated"
        assert pages_or_error(data[:length]) == want, length
        assert reading.open_slow(data[:length], "file") == want, length


@pytest.mark.parametrize("level", [3, None], ids=["zstd", "none"])
def test_flipped_bits_never_change_a_page(level: int | None) -> None:
    data = museum.draft(museum.guest(), level=level).seal()
    right = pages_or_error(data)
    assert isinstance(right, bytes)
    rng = random.Random(2)
    refused = 0
    for _ in range(3000):
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        flipped = museum.flip(data, at, bit)
        got = pages_or_error(flipped)
        if isinstance(got, str):
            refused += 1
            assert got in ("NotASnapshot", "Damaged"), (at, bit)
        else:
            assert got == right, (at, bit)
    assert refused > 1000


def test_flipped_bits_are_found_by_check() -> None:
    data = museum.small().seal()
    rng = random.Random(3)
    for _ in range(300):
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        flipped = museum.flip(data, at, bit)
        if reading.open_core(flipped, "file"):
            assert reading.open_slow(flipped, "file")
            continue
        with reading.core(flipped, "file") as core:
            assert core.check(native.Job())[0] > 0, (at, bit)
        assert reading.slow(flipped, "file").verify(), (at, bit)


def test_compare_by_content() -> None:
    """Blocks of other sizes, stored in another way: the same pages."""
    rams = museum.guest()
    other = museum.guest()
    other[0].pages[3] = museum.text(99)
    other[0].pages[9] = museum.fill(b"\xfe")
    other[0].pages[20] = museum.noise(5)
    with (
        reading.core(museum.draft(rams).seal(), "a") as a,
        reading.core(museum.draft(rams, level=None, per_block=64).seal(), "b") as b,
        reading.core(museum.draft(other, per_block=2).seal(), "c") as c,
    ):
        assert a.compare(0, b, 0, native.Job()) == (0, [])
        assert a.compare(1, b, 1, native.Job()) == (0, [])
        assert a.compare(0, a, 0, native.Job()) == (0, [])
        differ, runs = a.compare(0, c, 0, native.Job())
        assert differ == 3
        assert [(r.first, r.count) for r in runs] == [(3, 1), (9, 1), (20, 1)]
        with pytest.raises(ValueError, match="same length"):
            a.compare(0, b, 1, native.Job())
