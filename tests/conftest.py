# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fixtures by stage of life: qemu, vms, then guests that are ready."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support import qemus
from tests.support.qemus import AARCH64, X86_64, Platform, Qemu
from tests.support.redisguests import RedisGuests
from tests.support.vm import Vm, private_directory


def pytest_sessionstart() -> None:
    """Children can be interrupted, also where a shell started us with `&`."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(params=qemus.VERSIONS, ids=lambda v: f"qemu-{v}")
def qemu(request: pytest.FixtureRequest) -> Qemu:
    """Each QEMU version in turn."""
    return qemus.get(request.param)


@pytest.fixture
def newest_qemu() -> Qemu:
    return qemus.get(qemus.NEWEST)


@pytest.fixture(
    params=[
        *((version, X86_64) for version in qemus.VERSIONS),
        (qemus.NEWEST, AARCH64),
    ],
    ids=lambda param: f"qemu-{param[0]}-{param[1].name}",
)
def platform(request: pytest.FixtureRequest) -> Platform:
    """Each QEMU version with x86-64 guests, the newest also with aarch64 ones."""
    version, architecture = request.param
    return Platform(qemus.get(version), architecture)


@pytest.fixture
def disk_path() -> Iterator[Path]:
    """A directory on disk with a short name, gone afterwards."""
    directory = private_directory()
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def runtime(disk_path: Path) -> Path:
    """A run-time directory of its own."""
    path = disk_path / "r"
    path.mkdir(mode=0o700)
    return path


class Vms:
    """Guests that end with the test."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def add(self, vm: Vm) -> Vm:
        return self._stack.enter_context(vm)

    def start(self, vm: Vm) -> Vm:
        return self.add(vm).start()


@pytest.fixture
def vms() -> Iterator[Vms]:
    with ExitStack() as stack:
        yield Vms(stack)


@pytest.fixture
def pattern_vm(qemu: Qemu, vms: Vms) -> Vm:
    """The pattern guest, 128 MiB, at its ready line."""
    return vms.start(Vm(qemu, "pattern"))


@pytest.fixture(scope="session")
def redis_guests() -> RedisGuests:
    """Guests with a loaded redis, prepared once and kept."""
    return RedisGuests()
