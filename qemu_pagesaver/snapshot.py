# SPDX-License-Identifier: LGPL-2.1-or-later
"""An open snapshot: the file, its image, and META as an object."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from qemu_pagesaver import devices as device_state
from qemu_pagesaver import errors
from qemu_pagesaver.native import (
    NO_COMPRESSION,
    Image,
    ImageInfo,
    RamBlock,
    Section,
)

MAGIC = b"\x89PSNAP\r\n"
STREAM_MAGIC = b"QEVM"
LIBVIRT_MAGIC = b"LibvirtQemud"
DEFAULT_COMPRESSION = "zstd:3"
_ZSTD_LEVELS = range(1, 20)


def zstd_level(compression: str) -> int:
    """Return the level that ``none``, ``zstd`` or ``zstd:LEVEL`` means."""
    name, colon, level = compression.partition(":")
    if name == "none" and not colon:
        return NO_COMPRESSION
    if name == "zstd" and not colon:
        return 3
    if name == "zstd" and level.isdecimal() and int(level) in _ZSTD_LEVELS:
        return int(level)
    raise errors.UsageError(
        f"compression {compression!r} is not known",
        hint="none, zstd, or zstd:LEVEL with a level from 1 to 19.",
    )


@dataclass(frozen=True, kw_only=True)
class Meta:
    """Section META (FORMAT.md); what is not known is None or empty.

    ``run_state`` is "running" or "paused": what the guest was, whatever the
    stream says. ``pause`` and ``duration`` are seconds.
    """

    created: str | None = None
    creator: str | None = None
    machine: str | None = None
    qemu_version: str | None = None
    architecture: str | None = None
    run_state: str | None = None
    command_line: tuple[str, ...] | None = None
    working_directory: str | None = None
    qemu_binary: str | None = None
    capabilities: tuple[str, ...] = ()
    disks: tuple[Mapping[str, Any], ...] = ()
    hotplugged: tuple[Any, ...] = ()
    compression: str | None = None
    pause: float | None = None
    duration: float | None = None
    locality: Mapping[str, Any] | None = None
    unknown: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str) -> Self:
        """Read META; ``name`` is what errors call the file.

        Raises:
            Damaged: It is no JSON object, or a value has a wrong type.
        """
        if not data:
            return cls()
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            raise errors.Damaged(f"{name}: META is no JSON object")
        known: dict[str, Any] = {}
        for each in fields(cls):
            key = each.name.replace("_", "-")
            if each.name == "unknown" or document.get(key) is None:
                document.pop(key, None)
                continue
            known[each.name] = _checked(key, document.pop(key), str(each.type), name)
        return cls(**known, unknown=document)

    def to_bytes(self) -> bytes:
        """Return META as it stands in a file."""
        document = dict(self.unknown)
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name != "unknown" and value is not None:
                document[each.name.replace("_", "-")] = value
        return json.dumps(document, default=dict).encode()


def _checked(key: str, value: object, kind: str, name: str) -> object:
    """Return a value of META if it has its field's type."""
    fits: bool
    if kind.startswith("tuple"):
        inner = (
            str
            if kind.startswith("tuple[str")
            else dict
            if "Mapping" in kind
            else object
        )
        fits = isinstance(value, list) and all(isinstance(v, inner) for v in value)
        value = tuple(value) if isinstance(value, list) else value
    elif kind.startswith("Mapping"):
        fits = isinstance(value, dict)
    elif kind.startswith("float"):
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    else:
        fits = isinstance(value, str)
    if not fits:
        raise errors.Damaged(f"{name}: META has a wrong value of {key!r}")
    return value


class Snapshot:
    """A snapshot file, open for reading; made by :func:`open_snapshot`.

    Attributes:
        path: The file; for messages.
        fd: Its descriptor.
        image: Its pages and sections.
        info: What header and index say.
    """

    def __init__(self, fd: int, *, path: Path) -> None:
        """Take a descriptor over; it is closed with the snapshot."""
        self.path = path
        self.fd = fd
        self.image = Image(fd, name=str(path))
        self.info: ImageInfo = self.image.info()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Open a snapshot file; the same as :func:`open_snapshot`."""
        fd = open_regular(path)
        try:
            return cls.of_descriptor(fd, path=path)
        finally:
            os.close(fd)

    @classmethod
    def of_descriptor(cls, fd: int, *, path: str | os.PathLike[str]) -> Self:
        """Open the snapshot behind a descriptor, which stays the caller's."""
        own = os.dup(fd)
        try:
            return cls(own, path=Path(path))
        except BaseException:
            os.close(own)
            raise

    @cached_property
    def meta(self) -> Meta:
        """Section META."""
        return Meta.from_bytes(self.image.section(Section.META), name=str(self.path))

    @cached_property
    def devices(self) -> tuple[device_state.Device, ...]:
        """The device sections, taken apart."""
        try:
            return device_state.decode(
                self.image.section(Section.DESCRIPTION),
                self.image.section(Section.DEVICES),
                footers=self.info.stream.footers,
            )
        except errors.Damaged as error:
            raise errors.Damaged(f"{self.path}: {error.message}") from error

    @cached_property
    def machine(self) -> str | None:
        """The exact machine type, from the stream; None where it did not say."""
        configuration = self.image.section(Section.CONFIGURATION)
        if not configuration:
            return self.meta.machine
        return device_state.machine_name(configuration)

    @property
    def ram_blocks(self) -> tuple[RamBlock, ...]:
        """The RAM blocks, in the order of the stream."""
        return self.image.ram_blocks

    @property
    def uuid(self) -> str:
        """The file's uuid, as people write it."""
        return _uuid(self.info.uuid)

    @property
    def parent(self) -> str | None:
        """Uuid of the parent, or None."""
        return _uuid(self.info.parent) if any(self.info.parent) else None

    def close(self) -> None:
        """Close it; harmless when called again."""
        if self.fd >= 0:
            self.image.close()
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


def open_snapshot(path: str | os.PathLike[str]) -> Snapshot:
    """Open a snapshot file.

    Raises:
        SnapshotError: It is none, is damaged, or needs a newer version.
        IoError: It cannot be read.
    """
    return Snapshot.open(path)


def _uuid(data: bytes) -> str:
    text = data.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a regular file for reading; a FIFO must not make us wait."""
    name = os.fspath(path)
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise errors.from_os_error(error, "open") from error
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        os.close(fd)
        raise errors.NotASnapshot(f"{name}: not a file that can hold a snapshot")
    return fd


def head(fd: int, length: int = 128) -> bytes:
    """Return the first bytes of an open file, for its magic."""
    return os.pread(fd, length, 0)
