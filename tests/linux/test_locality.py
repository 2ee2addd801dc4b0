# SPDX-License-Identifier: LGPL-2.1-or-later
"""Address spaces that are found are the guest's processes, page by page."""

from __future__ import annotations

import base64
import json
import shlex
import subprocess
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import qemu_pagesaver
from qemu_pagesaver import memory_map
from qemu_pagesaver.check import check
from qemu_pagesaver.native import PAGE_SIZE, Image, Space, SpaceKind
from qemu_pagesaver.snapshot import Snapshot
from tests.conftest import Vms
from tests.support.qemus import Qemu
from tests.support.vm import Vm

# Prints {pid: [[virtual page, frame], ..]} of all processes that have memory of their
# own, but for itself: it ends before the save.
LISTING = """
import base64, json, os, struct, zlib
found = {}
for pid in filter(str.isdigit, os.listdir("/proc")):
    if int(pid) == os.getpid():
        continue
    pages = []
    with open(f"/proc/{pid}/pagemap", "rb", 0) as table:
        for line in open(f"/proc/{pid}/maps"):
            first, end = (int(x, 16) >> 12 for x in line.split()[0].split("-"))
            if first >> 51:
                continue
            table.seek(first * 8)
            data = table.read((end - first) * 8)
            for at, (entry,) in enumerate(struct.iter_unpack("<Q", data)):
                if entry >> 63:
                    pages.append((first + at, entry & (1 << 55) - 1))
    if pages:
        found[pid] = pages
print(base64.b64encode(zlib.compress(json.dumps(found).encode())).decode())
"""

# Processes that come and go, so that there are tables of dead ones to be fooled by.
CHURN = """
import os, time
for turn in range(12):
    if os.fork() == 0:
        os.setsid()
        for number in (0, 1, 2):
            os.dup2(os.open("/dev/null", os.O_RDWR), number)
        kept = [os.urandom(4096) for _ in range(100)]
        if turn % 3 == 0:
            time.sleep(100000)
        os._exit(0)
time.sleep(1)
"""


def run_python(vm: Vm, program: str) -> str:
    text = base64.b64encode(program.encode()).decode()
    code = f"import base64; exec(base64.b64decode({text!r}))"
    return vm.shell.run(f"python3 -c {shlex.quote(code)}", deadline=120)


def processes(vm: Vm) -> dict[str, set[tuple[int, int]]]:
    """What every process maps: (virtual page, frame)."""
    listed = json.loads(zlib.decompress(base64.b64decode(run_python(vm, LISTING))))
    return {pid: {(v, f) for v, f in pages} for pid, pages in listed.items()}


def frames(snapshot: Snapshot) -> dict[tuple[int, int], int]:
    """Guest-physical frame by (RAM block, page) of each region's first page."""
    return {
        (region.block.index, region.first): (region.address or 0) // PAGE_SIZE
        for region in memory_map.main_memory(snapshot)
    }


def mapped(
    image: Image, space: Space, starts: dict[tuple[int, int], int]
) -> set[tuple[int, int]]:
    found = set()
    for run in image.virtual_runs(space):
        block, first = max(s for s in starts if s <= (run.block, run.page))
        assert block == run.block
        frame = starts[block, first] + run.page - first
        page = run.address // PAGE_SIZE
        found |= {(page + i, frame + i) for i in range(run.pages)}
    return found


GUESTS = (
    ("redis", "pc", 512),
    ("redis", "q35", 512),
    ("redis", "pc", 6 * 1024),
    ("redis-arm64", "virt", 512),
    ("redis-arm64", "virt", 6 * 1024),
)


@pytest.mark.parametrize("guest", GUESTS, ids=lambda g: "-".join(map(str, g)))
def test_spaces_are_the_processes(
    newest_qemu: Qemu, vms: Vms, disk_path: Path, guest: tuple[str, str, int]
) -> None:
    name, machine, memory = guest
    vm = vms.start(Vm(newest_qemu, name, memory=memory, machine=machine))
    check_spaces(vm, disk_path / "guest.psnap")


def test_paired_tables_of_five_levels(
    newest_qemu: Qemu, vms: Vms, disk_path: Path
) -> None:
    """Page-table isolation doubles every top table; a process counts once."""
    vm = Vm(newest_qemu, "redis", memory=512, append="pti=on", extra=("-cpu", "max"))
    vms.start(vm)
    locality = check_spaces(vm, disk_path / "guest.psnap")
    assert locality["mode"] == "x86-64, 5 levels"
    assert locality["candidates"]["pairs"] == locality["candidates"]["live"]


def check_spaces(vm: Vm, file: Path) -> Mapping[str, Any]:
    run_python(vm, CHURN)
    expected = processes(vm)
    qemu_pagesaver.save(vm.qmp_path, file, disks="none")
    assert check(file).ok
    with qemu_pagesaver.open(file) as snapshot:
        starts = frames(snapshot)
        spaces = snapshot.image.spaces()
        users = {
            space.index: mapped(snapshot.image, space, starts)
            for space in spaces
            if space.kind is SpaceKind.USER
        }
        locality = snapshot.meta.locality
    assert len(expected) >= 6  # redis, the shells, four kept children
    missing, matched = [], set()
    for pid, pages in expected.items():
        best = max(users, key=lambda index: len(users[index] & pages))
        # Runs hold pages of zeros only between others, and a process that ran on
        # meanwhile has moved a little.
        if len(users[best] & pages) < 0.9 * len(users[best]):
            missing.append(pid)
        matched.add(best)
    assert not missing
    assert set(users) == matched, "a space that is no process"
    assert len(matched) == len(expected)
    assert any(space.kind is SpaceKind.KERNEL for space in spaces)
    assert locality is not None
    assert locality["note"] is None
    assert locality["candidates"]["dead"] > 0  # they were told apart
    placed = locality["placed"]
    known = placed["user"] + placed["page-cache"] + placed["kernel"]
    live = sum(placed.values()) - placed["free"]
    print(f"{len(expected)} processes, {locality}")
    assert known > 0.75 * live  # a small guest: much of it is slab
    show(file, len(spaces))
    return locality


def show(file: Path, count: int) -> None:
    """The verbs that people look with."""

    def verb(*words: str) -> dict[str, object]:
        command = [sys.executable, "-m", "qemu_pagesaver", *words, str(file), "--json"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        document: dict[str, object] = json.loads(done.stdout)
        return document

    listed = verb("map", "--spaces")["spaces"]
    assert isinstance(listed, list)
    assert len(listed) == count
    assert str(verb("info")["neighbours"]).startswith("guest-virtual")
    with qemu_pagesaver.open(file) as snapshot:
        image = snapshot.image
        space = max(image.spaces(), key=lambda s: s.pages - s.pages_shared)
        run = next(run for run in image.virtual_runs(space) if run.pages > 2)
        region = max(
            (r for r in memory_map.main_memory(snapshot) if r.first <= run.page),
            key=lambda r: r.first,
        )
        address = (region.address or 0) + (run.page + 1 - region.first) * PAGE_SIZE
    page = verb("map", "--page", hex(address))
    assert page["ram-block"] == region.block.name
    assert page["page"] == run.page + 1
    mappings = page["mappings"]
    assert isinstance(mappings, list)
    (here,) = [m for m in mappings if m["address"] == run.address + PAGE_SIZE]
    assert here["space"] == space.index
    assert [run.address, region.block.name, run.page] in here["neighbours"]
    assert [run.address + 2 * PAGE_SIZE, region.block.name, run.page + 2] in here[
        "neighbours"
    ]
