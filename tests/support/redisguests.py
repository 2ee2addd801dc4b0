# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests with a loaded redis: booted and loaded once, then from a kept stream.

Loading 600 MB takes the better part of a minute, so QEMU's own stream of the loaded
guest is kept in the cache, under a name that changes with all it was made from.
"""

from __future__ import annotations

import hashlib
import secrets
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from . import redisclient
from .console import ShellConsole
from .qemus import GuestFiles, Qemu, cache, guest_files
from .redisclient import RedisClient, keys_for
from .vm import Vm

MEMORY = 2048
MEGABYTES = 600


class RedisGuests:
    """Streams of loaded guests, by all that makes them different."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory or cache() / "streams"

    def stream(
        self,
        qemu: Qemu,
        guest: str = "redis",
        *,
        machine: str | None = None,
        memory: int = MEMORY,
        megabytes: int = MEGABYTES,
    ) -> Path:
        """QEMU's own stream of such a guest, saved running; seed 1, all keys."""
        files = guest_files(guest)
        machine = machine or files.architecture.machine
        name = f"{guest}-{qemu.version}-{machine}-{memory}M-{megabytes}"
        path = self._directory / f"{name}-{_origin(qemu, files)}"
        if not path.exists():
            self._directory.mkdir(parents=True, exist_ok=True)
            for stale in self._directory.glob(f"{name}-*"):
                stale.unlink()
            with (
                tempfile.TemporaryDirectory(dir=self._directory) as temporary,
                Vm(qemu, guest, machine=machine, memory=memory) as vm,
            ):
                vm.start()
                with vm.redis() as redis:
                    redis.load(keys_for(megabytes))
                vm.save_stream(Path(temporary) / "stream")
                (Path(temporary) / "stream").rename(path)
        return path

    def start(self, vm: Vm, megabytes: int = MEGABYTES) -> Vm:
        """Bring VM (made with incoming=True) to life with a loaded redis."""
        stream = self.stream(
            vm.qemu,
            vm.guest,
            machine=vm.machine,
            memory=vm.memory,
            megabytes=megabytes,
        )
        vm.start().load_stream(stream)
        return vm


@dataclass(frozen=True)
class Remembered:
    """What only the memory of one boot of a guest knows."""

    nonce: str
    booted: str
    keys: int

    def prove(self, redis: RedisClient, shell: ShellConsole) -> None:
        """The nonce, the boot id, every key, and a kernel that saw nothing."""
        assert redis.get("nonce") == self.nonce.encode()
        assert redis.dbsize() == self.keys + 1
        redis.check(range(self.keys))
        assert shell.run(_BOOT_ID) == self.booted
        log = shell.run("dmesg")
        for word in ("BUG", "Oops", "Call Trace", "Call trace", "corrupt", "segfault"):
            assert word not in log, log[-3000:]
        assert "I/O error" not in log, log[-3000:]


_BOOT_ID = "cat /proc/sys/kernel/random/boot_id"


def remember(redis: RedisClient, shell: ShellConsole) -> Remembered:
    """Give a guest, which has loaded keys, a nonce."""
    made = Remembered(secrets.token_hex(16), shell.run(_BOOT_ID), redis.dbsize())
    redis.set("nonce", made.nonce)
    return made


def _origin(qemu: Qemu, files: GuestFiles) -> str:
    """Changes with the guest, the values, the command line and the QEMU build."""
    digest = hashlib.sha256()
    for path in (
        files.directory / "stamp",
        Path(redisclient.__file__),
        Path(__file__).with_name("vm.py"),
    ):
        digest.update(path.read_bytes())
    version = [str(qemu.system_for(files.architecture)), "--version"]
    digest.update(subprocess.run(version, check=True, capture_output=True).stdout)
    return digest.hexdigest()[:12]
