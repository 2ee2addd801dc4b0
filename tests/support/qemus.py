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


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What guests of one architecture run on, unless a test says otherwise.

    `name` is QEMU's; `suffix` is that of the names of its guests; `serial` is what
    Linux calls the first serial line.
    """

    name: str
    suffix: str
    machine: str
    serial: str
    options: tuple[str, ...] = ()


X86_64 = Architecture(name="x86_64", suffix="", machine="pc", serial="ttyS0")
AARCH64 = Architecture(
    name="aarch64",
    suffix="-arm64",
    machine="virt",
    serial="ttyAMA0",
    # The default of `virt` is a 32-bit one.
    options=("-cpu", "cortex-a57"),
)


@dataclass(frozen=True)
class Qemu:
    """One QEMU version, with its own firmware beside it."""

    version: str
    bin: Path

    @property
    def system(self) -> Path:
        """The one for x86-64, which every version has."""
        return self.bin / "qemu-system-x86_64"

    def system_for(self, architecture: Architecture) -> Path:
        path = self.bin / f"qemu-system-{architecture.name}"
        if not path.exists():
            lacking(f"{path.name} {self.version} is not there: run ci/deps")
        return path

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
class Platform:
    """A QEMU, and an architecture that it has."""

    qemu: Qemu
    architecture: Architecture

    def guest(self, kind: str) -> str:
        """The name of its guest of a kind ("redis", "busybox")."""
        return kind + self.architecture.suffix


@dataclass(frozen=True)
class GuestFiles:
    """A built guest."""

    name: str
    directory: Path

    @property
    def architecture(self) -> Architecture:
        return AARCH64 if self.name.endswith(AARCH64.suffix) else X86_64

    @property
    def kind(self) -> str:
        """Its name without the architecture."""
        return self.name.removesuffix(self.architecture.suffix)

    @property
    def kernel(self) -> Path:
        return self.directory / ("kernel.elf" if self.kind == "pattern" else "vmlinuz")

    @property
    def initrd(self) -> Path | None:
        return None if self.kind == "pattern" else self.directory / "initramfs.gz"

    @property
    def disk(self) -> Path | None:
        return self.directory / "root.img" if self.kind == "redis" else None


def guest_files(name: str) -> GuestFiles:
    directory = cache() / "guests" / name
    if not (directory / "stamp").exists():
        lacking(f"guest {name} is not there: run ci/build-guest {name}")
    return GuestFiles(name, directory)
