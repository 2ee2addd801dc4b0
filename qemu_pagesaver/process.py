# SPDX-License-Identifier: LGPL-2.1-or-later
"""The QEMU process on this host behind a QMP socket: which one it is, and facts of it.

All of it is read from /proc (proc(5)).
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from qemu_pagesaver import errors

# qemu-system-x86_64, qemu-kvm, kvm; with what a packager puts around it.
_QEMU_NAME = re.compile(r"\A\.?(?:qemu|kvm)\b|\bqemu-(?:system|kvm)")
_PID_HINT = "Name QEMU's process with --pid."


def find_qemu(socket_path: str, *, peer: int, pid: int | None) -> int | None:
    """Return the QEMU process that serves a QMP socket, verified.

    Args:
        socket_path: The QMP socket.
        peer: The process that called ``listen()`` on it.
        pid: The process that the user names, or None: the peer.

    Returns:
        None if it is in another pid namespace and was not named.

    Raises:
        UsageError: It is no QEMU, or has not this socket.
    """
    chosen = peer if pid is None else pid
    if chosen <= 0:
        return None
    name = binary_name(chosen)
    if name is None or not _QEMU_NAME.search(name):
        what = f"is {name}, no QEMU" if name else "does not exist"
        if pid is None:
            raise errors.UsageError(
                f"QMP socket {socket_path}: the process that opened it (pid {chosen}) "
                f"{what}",
                hint=_PID_HINT,
            )
        raise errors.UsageError(f"--pid {chosen}: that process {what}", hint=_PID_HINT)
    if pid is not None and pid != peer and _holds_socket(pid, socket_path) is False:
        raise errors.UsageError(
            f"--pid {pid}: that QEMU does not have the QMP socket {socket_path}",
            hint=_PID_HINT,
        )
    return chosen


def binary_name(pid: int) -> str | None:
    """Return the file name of a process's program; None: no such process."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/exe").readlink().name.removesuffix(" (deleted)")
    # Another user's process: its command line is readable nevertheless.
    with contextlib.suppress(OSError):
        first = Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0]
        return os.fsdecode(os.path.basename(first)) or None  # noqa: PTH119 - bytes
    return None


def resident_bytes(pid: int) -> int | None:
    """Return the memory of a process that is in RAM or swap; None: not known."""
    with contextlib.suppress(OSError, ValueError):
        text = Path(f"/proc/{pid}/status").read_text()
        sizes = dict(
            re.findall(r"^(VmRSS|VmSwap|HugetlbPages):\s+(\d+) kB$", text, re.M)
        )
        return sum(int(size) for size in sizes.values()) * 1024 or None
    return None


def _holds_socket(pid: int, path: str) -> bool | None:
    """Say whether a process has a unix socket of that name; None: unknown."""
    try:
        rows = [line.split(None, 7) for line in _lines("/proc/net/unix")[1:]]
        names = {row[6]: row[7] for row in rows if len(row) == 8}
        absolute = os.path.realpath(path)
        inodes = {i for i, name in names.items() if os.path.realpath(name) == absolute}
        if not inodes:
            # The name is as it was given to bind(): perhaps relative to there.
            name = os.path.basename(path)  # noqa: PTH119 - a string of /proc
            inodes = {
                i
                for i, n in names.items()
                if not n.startswith("/") and n.rpartition("/")[2] == name
            }
        if not inodes:
            return None
        targets = set()
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                targets.add(str(entry.readlink()))
    except OSError:
        return None
    return any(f"socket:[{inode}]" in targets for inode in inodes)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
