# SPDX-License-Identifier: LGPL-2.1-or-later
"""Restore after restore, some with the pager killed on the way: none is lost."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

import qemu_pagesaver
from tests.support import qemus
from tests.support.qemus import Qemu
from tests.support.restoring import Restoring, check, fill
from tests.support.vm import Vm

# One of so many has its pager killed with SIGKILL.
KILLED_EVERY = 10


def soak(qemu: Qemu, directory: Path, rounds: int) -> None:
    file, runtime = directory / "guest.psnap", directory / "r"
    runtime.mkdir(mode=0o700)
    with Vm(qemu, "pattern") as vm:
        fill(vm.start().pattern)
        qemu_pagesaver.save(str(vm.qmp_path), file)
    rng = random.Random(11)
    shares = []
    for turn in range(rounds):
        killed = turn % KILLED_EVERY == 0
        options = ("--background", "24M") if killed else ()
        with Restoring(
            *("restore", file, "--qmp", directory / f"q{turn}"),
            *("--qemu", qemu.system, *options),
            runtime=runtime,
        ) as restoring:
            restoring.wait_running()
            if killed:
                restoring.console.check(7, 0, rng.randrange(1, 500))
                time.sleep(rng.random())
                restoring.process.kill()
                restoring.process.wait()
                with Restoring(
                    *("recover", file, "--attach", restoring.qmp_path),
                    runtime=runtime,
                ) as recovering:
                    received = recovering.event("running")["pages-received"]
                    recovering.running = None  # the guest lives on
                    assert recovering.finish()["complete"]
                shares.append(received / 8500)
            else:
                assert restoring.finish()["complete"]
            check(restoring.console)
    print("share of pages received when killed:", [round(s, 2) for s in shares])
    assert [x.name for x in runtime.iterdir() if "guest-" not in x.name] == []


def test_soak(newest_qemu: Qemu, disk_path: Path) -> None:
    soak(newest_qemu, disk_path, 10)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("version", qemus.VERSIONS)
def test_long_soak(version: str, disk_path: Path) -> None:
    soak(qemus.get(version), disk_path, 200)
