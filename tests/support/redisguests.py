# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guests with a loaded redis: booted and loaded once, then from a kept stream.

Loading 600 MB takes the better part of a minute, so QEMU's own stream of the loaded
guest is kept in the cache, under a name that changes with all it was made from.
"""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from pathlib import Path

from . import redisclient
from .qemus import Qemu, cache, guest_files
from .redisclient import keys_for
from .vm import Vm

MEMORY = 2048
MEGABYTES = 600


class RedisGuests:
    """Streams of loaded guests, by QEMU, machine, memory and megabytes of values."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory or cache() / "streams"

    def stream(
        self,
        qemu: Qemu,
        *,
        machine: str = "pc",
        memory: int = MEMORY,
        megabytes: int = MEGABYTES,
    ) -> Path:
        """QEMU's own stream of such a guest, saved running; seed 1, all keys."""
        name = f"redis-{qemu.version}-{machine}-{memory}M-{megabytes}"
        path = self._directory / f"{name}-{_origin(qemu)}"
        if not path.exists():
            self._directory.mkdir(parents=True, exist_ok=True)
            for stale in self._directory.glob(f"{name}-*"):
                stale.unlink()
            with (
                tempfile.TemporaryDirectory(dir=self._directory) as temporary,
                Vm(qemu, "redis", machine=machine, memory=memory) as vm,
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
            vm.qemu, machine=vm.machine, memory=vm.memory, megabytes=megabytes
        )
        vm.start().load_stream(stream)
        return vm


def _origin(qemu: Qemu) -> str:
    """Changes with the guest, the values, the command line and the QEMU build."""
    digest = hashlib.sha256()
    for path in (
        guest_files("redis").directory / "stamp",
        Path(redisclient.__file__),
        Path(__file__).with_name("vm.py"),
    ):
        digest.update(path.read_bytes())
    version = [str(qemu.system), "--version"]
    digest.update(subprocess.run(version, check=True, capture_output=True).stdout)
    return digest.hexdigest()[:12]
