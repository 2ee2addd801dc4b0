# SPDX-License-Identifier: LGPL-2.1-or-later
"""The QEMU versions and guests that ci/deps and ci/build-guest left in the cache."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import pytest

VERSIONS = ("7.2", "10.0")
NEWEST = VERSIONS[-1]


def cache() -> Path:
    default = Path.home() / ".cache" / "qemu-pagesaver"
    return Path(os.environ.get("QEMU_PAGESAVER_CACHE", default))


def lacking(what: str) -> NoReturn:
    """Skip, or fail where everything is required (CI)."""
    if os.environ.get("QEMU_PAGESAVER_REQUIRE") == "1":
        pytest.fail(what)
    pytest.skip(what)


@dataclass(frozen=True)
class Qemu:
    """One QEMU version, with its own firmware beside it."""

    version: str
    bin: Path

    @property
    def system(self) -> Path:
        return self.bin / "qemu-system-x86_64"

    @property
    def img(self) -> Path:
        return self.bin / "qemu-img"


def available() -> dict[str, Qemu]:
    found = {v: Qemu(v, cache() / "qemu" / v / "bin") for v in VERSIONS}
    return {v: qemu for v, qemu in found.items() if qemu.system.exists()}


def get(version: str = NEWEST) -> Qemu:
    qemu = available().get(version)
    if qemu is None:
        lacking(f"QEMU {version} is not there: run ci/deps")
    return qemu


@dataclass(frozen=True)
class GuestFiles:
    """A built guest."""

    name: str
    directory: Path

    @property
    def kernel(self) -> Path:
        return self.directory / ("kernel.elf" if self.name == "pattern" else "vmlinuz")

    @property
    def initrd(self) -> Path | None:
        return None if self.name == "pattern" else self.directory / "initramfs.gz"

    @property
    def disk(self) -> Path | None:
        return self.directory / "root.img" if self.name == "redis" else None


def guest_files(name: str) -> GuestFiles:
    directory = cache() / "guests" / name
    if not (directory / "stamp").exists():
        lacking(f"guest {name} is not there: run ci/build-guest {name}")
    return GuestFiles(name, directory)
