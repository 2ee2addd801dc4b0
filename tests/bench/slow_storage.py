# SPDX-License-Identifier: LGPL-2.1-or-later
"""Storage that answers after 1 ms and gives 200 MB/s: a FUSE file system.

`python -m tests.bench.slow_storage DIRECTORY MOUNTPOINT` shows one directory,
read-only, until it gets SIGTERM or its parent ends; `mounted()` runs that. Each read
request waits for the latency, which requests that are under way at the same time
share, and then for the link, which they do not.

The page cache lies above it, as it does above a disk (no direct_io): what comes next
is read ahead, and what was read once is not read again. It is forgotten when a file
is opened (no keep_cache), and the benchmark drops it before each run.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import page_cache
from .figures import Table

LATENCY = 0.001  # seconds
RATE = 200e6  # bytes/s
THREADS = 64
_DEADLINE = 10.0
_PR_SET_PDEATHSIG = 1
_ATTRIBUTES = ("st_mode", "st_nlink", "st_size", "st_uid", "st_gid", "st_mtime_ns")


class Link:
    """What all requests share: bytes pass one after the other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free_at = 0.0

    def pass_through(self, size: int, arrived: float) -> None:
        """Return when a request that arrived then would have its answer."""
        with self._lock:
            begin = max(arrived + LATENCY, self._free_at)
            self._free_at = done = begin + size / RATE
        while (left := done - time.monotonic()) > 0:
            time.sleep(left)


class SlowDirectory:
    """Read-only operations on one directory, as mfusepy calls them."""

    use_ns = True

    def __init__(self, root: str) -> None:
        self._root = root
        self._link = Link()

    def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
        found = os.fstat(fh) if fh is not None else os.lstat(self._root + path)
        return {n.removesuffix("_ns"): getattr(found, n) for n in _ATTRIBUTES}

    def readdir(self, path: str, _fh: int) -> list[str]:
        return [".", "..", *os.listdir(self._root + path)]  # noqa: PTH208

    def open(self, path: str, flags: int) -> int:
        return os.open(self._root + path, (flags & ~os.O_DIRECT) | os.O_CLOEXEC)

    def read(self, _path: str, size: int, offset: int, fh: int) -> bytes:
        arrived = time.monotonic()
        data = os.pread(fh, size, offset)
        self._link.pass_through(len(data), arrived)
        return data

    def release(self, _path: str, fh: int) -> int:
        os.close(fh)
        return 0


def serve(directory: str, mountpoint: str) -> None:
    """Serve until SIGTERM; whoever started us may be killed, too."""
    from mfusepy import FUSE

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # Sleeps of a millisecond must not end 50 us late; threads inherit it.
    Path("/proc/self/timerslack_ns").write_text("1000")
    FUSE(
        SlowDirectory(directory),
        mountpoint,
        foreground=True,
        ro=True,
        fsname="slow-storage",
        max_threads=THREADS,
        max_idle_threads=THREADS,
    )


@contextlib.contextmanager
def mounted(directory: Path) -> Iterator[Path]:
    """Mount what shows DIRECTORY slowly; it is undone whatever happens."""
    place = Path(tempfile.mkdtemp(prefix="psslow-", dir="/var/tmp"))
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.bench.slow_storage", str(directory), str(place)],
        # There may be libfuse 2 as well.
        env={**os.environ, "FUSE_LIBRARY_NAME": "fuse3"},
        stdin=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + _DEADLINE
        while not place.is_mount():
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{place} cannot be mounted")
            time.sleep(0.01)
        yield place
    finally:
        # Lazily: a contender that failed may have a file open.
        umount = ["umount", "--quiet", "--lazy", str(place)]
        subprocess.run(umount, check=False)
        try:
            process.wait(_DEADLINE)  # it ends when nobody can see it any more
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        place.rmdir()


def why_not() -> str:
    """Return what is lacking here; "" if nothing is."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "no access to /dev/fuse"
    if os.geteuid() != 0:
        return "only root may drop the page cache"
    return ""


# --------------------------------------------------------------- self-check


def self_check(mount: Path, name: str) -> Table:
    """Measure what NAME in the mounted directory is read like."""
    table = Table(
        "The slow storage itself",
        f"Made to answer after {LATENCY * 1e3:g} ms and to give {RATE / 1e6:g} MB/s. "
        "The first rows go past the page cache (O_DIRECT), the last as QEMU reads.",
    )
    file = mount / name
    for size, at_once, count in ((4096, 1, 200), (4096, 16, 1600), (1 << 17, 16, 400)):
        seconds = _read_randomly(file, size, at_once, count)
        table.add(
            f"{size >> 10} KiB at random, {at_once} at once",
            each_ms=seconds / count * at_once * 1e3,
            MB_per_s=count * size / seconds / 1e6,
        )
    page_cache.drop()
    buffer = bytearray(1 << 15)  # QEMU's
    done, start = 0, time.monotonic()
    with file.open("rb", buffering=0) as data:
        while done < 100e6 and (got := data.readinto(buffer)):
            done += got
    seconds = time.monotonic() - start
    table.add("32 KiB in order, buffered", MB_per_s=done / seconds / 1e6)
    return table


def _read_randomly(file: Path, size: int, at_once: int, count: int) -> float:
    """Return the seconds of COUNT reads by AT_ONCE threads."""
    rng = random.Random(size + at_once)
    places = [rng.randrange(file.stat().st_size // size) * size for _ in range(count)]
    fd = os.open(file, os.O_RDONLY | os.O_DIRECT)

    def read_every(first: int) -> None:
        with mmap.mmap(-1, size) as buffer:  # aligned, as O_DIRECT wants it
            for place in places[first::at_once]:
                os.preadv(fd, [buffer], place)

    try:
        with ThreadPoolExecutor(at_once) as pool:
            start = time.monotonic()
            list(pool.map(read_every, range(at_once)))
            return time.monotonic() - start
    finally:
        os.close(fd)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2])
