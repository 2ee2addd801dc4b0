# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files that exist only whole, and spool files that never have a name."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Self

from qemu_pagesaver import errors

if TYPE_CHECKING:
    from collections.abc import Iterator

# How O_TMPFILE says that a file system does not know it.
_NO_TMPFILE = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT}
_RENAME_NOREPLACE = 1
# What renameat2() says where the kernel or the file system lacks it.
_NO_RENAME_FLAG = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}
_MEMORY_FILE_SYSTEMS = {"tmpfs", "ramfs", "hugetlbfs"}


class AtomicFile:
    """A new file, mode 0600, that gets its name when it is whole.

    Until :meth:`commit` it has no name at all, so that even SIGKILL leaves
    nothing; where the file system cannot do that, a temporary name in the same
    directory. An existing file is never replaced.

    Args:
        path: The name it is to get.

    Attributes:
        path: Likewise.
        fd: Open for reading and writing, at offset 0.

    Raises:
        TargetExists: The name is taken, now or at :meth:`commit`.
        IoError: The directory cannot be written to.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open it, empty."""
        self.path = Path(path)
        self.fd = -1
        self._directory = -1
        self._temporary: str | None = None
        if not self.path.name:
            raise errors.IoError(f"write {path}: that is no name for a file")
        try:
            if os.path.lexists(self.path):
                raise errors.TargetExists(f"write {self.path}: it exists")
            self._directory = os.open(
                self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
            )
            self._open()
        except OSError as error:
            self.discard()
            reason = error.strerror or str(error)
            kind = errors.class_for_errno(error.errno or 0)
            raise kind(f"write {self.path}: {reason}") from error

    def _open(self) -> None:
        if Path("/proc/self/fd").exists():
            try:
                self.fd = os.open(
                    ".",
                    os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC,
                    0o600,
                    dir_fd=self._directory,
                )
            except OSError as error:
                if error.errno not in _NO_TMPFILE:
                    raise
            else:
                return
        # Not longer than a name may be, whatever the final name.
        name = f".{self.path.name[:200]}.{secrets.token_hex(6)}.tmp"
        self.fd = os.open(
            name,
            os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC,
            0o600,
            dir_fd=self._directory,
        )
        self._temporary = name

    def sync(self) -> None:
        """Bring it to the disk: the slow part of :meth:`commit`, for a thread."""
        try:
            os.fsync(self.fd)
        except OSError as error:
            raise errors.from_os_error(error, f"write {self.path}") from error

    def commit(self) -> None:
        """Bring it to the disk, give it its name and close it."""
        try:
            os.fsync(self.fd)
            if self._temporary is None:
                # dir_fd makes Python call linkat() with AT_SYMLINK_FOLLOW.
                os.link(
                    f"/proc/self/fd/{self.fd}",
                    self.path.name,
                    dst_dir_fd=self._directory,
                    follow_symlinks=True,
                )
            else:
                _rename(self._directory, self._temporary, self.path.name)
                self._temporary = None
            os.fsync(self._directory)
        except OSError as error:
            reason = error.strerror or str(error)
            kind = errors.class_for_errno(error.errno or 0)
            raise kind(f"write {self.path}: {reason}") from error
        finally:
            self.discard()

    def discard(self) -> None:
        """Forget it, unless it is committed; harmless when called again."""
        if self._temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary, dir_fd=self._directory)
            self._temporary = None
        for name in ("fd", "_directory"):
            fd = getattr(self, name)
            setattr(self, name, -1)
            if fd >= 0:
                os.close(fd)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Discard it, unless it is committed."""
        self.discard()


def _rename(directory: int, old: str, new: str) -> None:
    """Rename within a directory; EEXIST rather than replacing."""
    libc = ctypes.CDLL(None, use_errno=True)
    call = getattr(libc, "renameat2", None)
    if call is not None:
        code = call(
            directory, os.fsencode(old), directory, os.fsencode(new), _RENAME_NOREPLACE
        )
        if code == 0:
            return
        number = ctypes.get_errno()
        if number not in _NO_RENAME_FLAG:
            raise OSError(number, os.strerror(number))
    os.link(old, new, src_dir_fd=directory, dst_dir_fd=directory)
    os.unlink(old, dir_fd=directory)


def spool_directory(
    directory: str | os.PathLike[str] | None,
    *,
    beside: str | os.PathLike[str],
    need: int,
) -> Path:
    """Return where to spool, checked for space.

    Args:
        directory: The place that the user named, or None: the directory of
            ``beside``, whose file system must hold the result anyway.
        beside: The file to be written in the end.
        need: Bytes that will be spooled at most; 0: not known.

    Raises:
        DiskFull: Not so much is free there.
        IoError: It is no directory that can be written to.
    """
    place = Path(directory) if directory is not None else Path(beside).parent
    try:
        space = os.statvfs(place)
    except OSError as error:
        raise errors.from_os_error(error, "spool into") from error
    free = space.f_bavail * space.f_frsize
    if free < need:
        raise errors.DiskFull(
            f"spool into {place}: {need} bytes may be needed, {free} are free",
            hint="Name another directory with --spool-dir.",
        )
    return place


@contextlib.contextmanager
def spool_file(directory: str | os.PathLike[str]) -> Iterator[int]:
    """Open an empty file without a name in ``directory``; yields its descriptor."""
    try:
        fd = _open_spool(directory)
    except OSError as error:
        reason = error.strerror or str(error)
        kind = errors.class_for_errno(error.errno or 0)
        raise kind(
            f"spool into {os.fspath(directory)}: {reason}",
            hint="Name another directory with --spool-dir.",
        ) from error
    try:
        yield fd
    finally:
        os.close(fd)


def _open_spool(directory: str | os.PathLike[str]) -> int:
    flags = os.O_RDWR | os.O_EXCL | os.O_CLOEXEC
    try:
        return os.open(directory, flags | os.O_TMPFILE, 0o600)
    except OSError as error:
        if error.errno not in _NO_TMPFILE or not Path(directory).is_dir():
            raise
    path = Path(directory) / f".qemu-pagesaver-{secrets.token_hex(6)}.spool"
    fd = os.open(path, flags | os.O_CREAT, 0o600)
    try:
        path.unlink()
    except OSError:
        os.close(fd)
        raise
    return fd


def file_system(path: str | os.PathLike[str]) -> str:
    """Return the type of the file system of ``path`` ("ext4"), or ""."""
    device = Path(path).stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            left, _, right = line.partition(" - ")
            if left.split()[2] == wanted and right:
                return right.split()[0]
    return ""


def is_memory(path: str | os.PathLike[str]) -> bool:
    """Say whether what is written there stays in memory (a tmpfs)."""
    return file_system(path) in _MEMORY_FILE_SYSTEMS
