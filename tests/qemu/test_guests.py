# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guests and the harness itself, on stock QEMU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Vms
from tests.support import pattern
from tests.support.console import GuestError
from tests.support.pattern import Control, content
from tests.support.qemus import Platform, Qemu
from tests.support.redisclient import VALUE_SIZE, keys_for, value
from tests.support.redisguests import RedisGuests
from tests.support.vm import Vm

KINDS = ("data", "text", "zero", "dup", "unit:1:5a", "unit:8:0123456789abcdef")


def memory_of(vm: Vm, page: int, count: int = 1) -> bytes:
    return vm.physical_memory(pattern.physical(page), count * pattern.PAGE)


def test_pattern_content_is_the_formula(pattern_vm: Vm) -> None:
    guest = pattern_vm.pattern
    assert guest.pages() > 28_000
    for number, kind in enumerate(KINDS):
        guest.fill(7, 100 * number, 100, kind)
        guest.check(7, 100 * number, 100, kind)
        expected = b"".join(
            content(kind, 7, page) for page in range(100 * number, 100 * number + 100)
        )
        assert memory_of(pattern_vm, 100 * number, 100) == expected
    guest.write(9, 50, 10)
    guest.marks(9, 50, 10)
    assert memory_of(pattern_vm, 55) == pattern.marked(content("data", 7, 55), 9, 55)
    with pytest.raises(GuestError, match="page=50 word=511"):
        guest.check(7, 0, 100)
    with pytest.raises(GuestError, match="range"):
        guest.check(7, 0, guest.pages() + 1)


@pytest.mark.parametrize("order", ["random", "seq"])
def test_pattern_touches_distinct_pages(pattern_vm: Vm, order: str) -> None:
    guest = pattern_vm.pattern
    guest.fill(3, 0, 5000)
    touch = guest.touch(1, 0, 5000, 4000, order)
    pages = (
        list(pattern.touch_order(1, 5000, 4000))
        if order == "random"
        else list(range(4000))
    )
    assert len(set(pages)) == touch.n == 4000
    words = (int.from_bytes(content("data", 3, p)[8:12], "little") for p in pages)
    assert touch.sum == sum(words) & 0xFFFFFFFF
    assert touch.p50 <= touch.p90 <= touch.p99 <= touch.max <= touch.total
    assert guest.ticks_per_second() > 1e6


def test_pattern_counts_and_remembers(pattern_vm: Vm) -> None:
    guest = pattern_vm.pattern
    guest.nonce = "c0ffee"
    guest.spin_on(10, 300)
    first = guest.count()
    assert guest.spin_check() > first
    pattern_vm.qmp.command("stop")
    control = Control.parse(pattern_vm.physical_memory(pattern.CONTROL, pattern.PAGE))
    assert (control.nonce, control.spinning) == ("c0ffee", True)
    assert (control.first, control.count) == (10, 300)
    pages = memory_of(pattern_vm, 10, 300)
    for page in range(10, 310):
        at = (page - 10) * pattern.PAGE
        assert control.counter_is_right(page, pages[at : at + pattern.PAGE])
    pattern_vm.qmp.command("cont")
    assert guest.spin_off() >= control.total
    assert guest.nonce == "c0ffee"


def test_pattern_in_another_qemu(qemu: Qemu, vms: Vms, disk_path: Path) -> None:
    first = vms.start(Vm(qemu, "pattern"))
    first.pattern.fill(5, 0, 2000, "text")
    first.save_stream(disk_path / "stream")
    second = vms.start(Vm(qemu, "pattern", incoming=True))
    second.load_stream(disk_path / "stream")
    second.pattern.check(5, 0, 2000, "text")


@pytest.mark.parametrize("memory", [64, 3072])
def test_pattern_memory_sizes(newest_qemu: Qemu, vms: Vms, memory: int) -> None:
    guest = vms.start(Vm(newest_qemu, "pattern", memory=memory)).pattern
    pages = guest.pages()
    assert (memory - 17) * 256 < pages <= (memory - 16) * 256
    guest.fill(1, pages - 10, 10)
    guest.check(1, pages - 10, 10)


def test_pattern_on_q35(newest_qemu: Qemu, vms: Vms) -> None:
    guest = vms.start(Vm(newest_qemu, "pattern", machine="q35")).pattern
    guest.fill(1, 0, 10)
    guest.check(1, 0, 10)


def test_busybox_shell(platform: Platform, vms: Vms) -> None:
    shell = vms.start(Vm(platform.qemu, platform.guest("busybox"))).shell
    assert shell.run("uname -sm") == f"Linux {platform.architecture.name}"
    shell.run("nonce=abc; echo kept > /tmp/file")
    assert shell.run('echo "$nonce" "$(cat /tmp/file)"') == "abc kept"
    assert shell.run("printf 'no newline'") == "no newline"
    with pytest.raises(GuestError, match="status 3"):
        shell.run("(echo out; exit 3)")
    assert shell.run("if", check=False) != ""
    assert "10.0.2.15" in shell.run("ip addr show eth0")
    assert shell.run("dmesg | grep -iE 'oops|BUG:|call trace' | wc -l") == "0"


def test_redis_loaded_and_read_back(
    platform: Platform, vms: Vms, redis_guests: RedisGuests
) -> None:
    megabytes = 20
    guest = platform.guest("redis")
    vm = vms.add(Vm(platform.qemu, guest, memory=512, incoming=True))
    redis_guests.start(vm, megabytes=megabytes)
    keys = keys_for(megabytes)
    with vm.redis() as redis:
        assert redis.dbsize() == keys
        redis.check(range(keys))
        redis.set("a", b"\0\r\n")
        assert redis.get("a") == b"\0\r\n"
        assert redis.get("b") is None
        assert int(redis.info()["used_memory"]) > megabytes << 20
    assert vm.shell.run("python3 -c 'print(6 * 7)'") == "42"
    vm.shell.run("echo changed > /etc/changed && sync")


def test_redis_writable_disk(newest_qemu: Qemu, vms: Vms) -> None:
    vm = vms.start(Vm(newest_qemu, "redis", memory=512, writable_disk=True))
    assert vm.shell.run("test ! -e /etc/changed; echo $?") == "0"
    vm.shell.run("echo changed > /etc/changed && sync")
    assert "/dev/vda / ext4 rw" in vm.shell.run("grep ' / ' /proc/mounts")
    with vm.redis() as redis:
        assert redis.dbsize() == 0


def test_values_are_those_of_before() -> None:
    assert len(value(0)) == VALUE_SIZE
    assert value(5, 1) != value(5, 2) != value(6, 2)
