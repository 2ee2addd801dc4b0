# SPDX-License-Identifier: LGPL-2.1-or-later
"""A Debian guest with redis: saved, restored on demand, and it is the same guest."""

from __future__ import annotations

from pathlib import Path

import pytest

import qemu_pagesaver
from qemu_pagesaver.compare import compare
from qemu_pagesaver.convert import convert
from tests.conftest import Vms
from tests.support.qemus import Platform, Qemu
from tests.support.redisclient import keys_for
from tests.support.redisguests import RedisGuests, Remembered, remember
from tests.support.vm import Vm

MEMORY = 512
MEGABYTES = 60


def prove(vm: Vm, memory: Remembered) -> None:
    with vm.redis() as redis:
        memory.prove(redis, vm.shell)


def waiting(platform: Platform) -> Vm:
    return Vm(platform.qemu, platform.guest("redis"), memory=MEMORY, incoming=True)


def test_saved_and_restored(
    platform: Platform, vms: Vms, redis_guests: RedisGuests, disk_path: Path
) -> None:
    snapshot = disk_path / "guest.psnap"
    vm = vms.add(waiting(platform))
    redis_guests.start(vm, MEGABYTES)
    with vm.redis() as redis:
        memory = remember(redis, vm.shell)
    assert memory.keys == keys_for(MEGABYTES)
    saved = qemu_pagesaver.save(vm.qmp_path, snapshot, disks="none")
    assert saved.pages.data > keys_for(MEGABYTES) * 1024 // 4096 // 2
    # The guest that was saved goes on as if nothing had been.
    prove(vm, memory)
    vm.close()

    # On demand: it runs and answers before its memory is there.
    vm = vms.start(waiting(platform))
    restored = qemu_pagesaver.restore(snapshot, attach=str(vm.qmp_path))
    assert restored.complete
    prove(vm, memory)
    vm.close()

    # All loaded while it stands still: memory is the snapshot's, page by page.
    vm = vms.start(waiting(platform))
    restored = qemu_pagesaver.restore(snapshot, attach=str(vm.qmp_path), paused=True)
    assert restored.complete
    again = disk_path / "again.psnap"
    qemu_pagesaver.save(vm.qmp_path, again, disks="none")
    comparison = compare(snapshot, again, devices=False)
    assert comparison.equal, comparison
    vm.qmp.command("cont")
    prove(vm, memory)


@pytest.mark.parametrize("guest", ["redis", "redis-arm64"])
def test_converted_there_and_back(
    newest_qemu: Qemu,
    vms: Vms,
    redis_guests: RedisGuests,
    disk_path: Path,
    guest: str,
) -> None:
    """No lock-in: stock QEMU runs what `convert` makes, and pages stay the same."""
    original = redis_guests.stream(
        newest_qemu, guest, memory=MEMORY, megabytes=MEGABYTES
    )
    snapshot, stream = disk_path / "guest.psnap", disk_path / "guest.stream"
    convert(original, snapshot)
    convert(snapshot, stream)
    assert compare(original, stream).equal
    vm = vms.start(Vm(newest_qemu, guest, memory=MEMORY, incoming=True))
    vm.load_stream(stream)
    count = keys_for(MEGABYTES)
    with vm.redis() as redis:
        assert redis.dbsize() == count
        redis.check(range(count))


@pytest.mark.long
def test_other_version_reads_the_snapshot(
    vms: Vms, redis_guests: RedisGuests, disk_path: Path
) -> None:
    """Saved by 7.2, restored by 10.0: the machine of the stream has both."""
    from tests.support import qemus

    old, new = (qemus.get(version) for version in qemus.VERSIONS)
    machine = "pc-i440fx-7.2"
    original = redis_guests.stream(
        old, machine=machine, memory=MEMORY, megabytes=MEGABYTES
    )
    snapshot = disk_path / "guest.psnap"
    convert(original, snapshot)
    vm = Vm(new, "redis", memory=MEMORY, machine=machine, incoming=True)
    vms.start(vm)
    assert qemu_pagesaver.restore(snapshot, attach=str(vm.qmp_path)).complete
    with vm.redis() as redis:
        redis.check(range(keys_for(MEGABYTES)))
