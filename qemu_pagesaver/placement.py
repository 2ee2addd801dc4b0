# SPDX-License-Identifier: LGPL-2.1-or-later
"""Threads where faults are cheapest: all that a fault wakes on one CPU.

A fault on the stream is four wake-ups (vCPU, QEMU's fault thread, the pager, QEMU's
listen thread, the vCPU again) and little work. On virtual machines waking a thread
on an idle CPU costs ten times a wake-up on the same one; then it pays that they
share a CPU while nothing but faults is served. It does not pay where
other vCPUs want that CPU, nor where background loading keeps the threads busy. So:
measured first, one vCPU only, undone for good once the background is at work.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from qemu_pagesaver import native

# Waking on the same CPU must cost less than this share of waking on another one.
_WORTH = 0.5
# Of 4096-byte pages each second: from here on threads are busy, not waiting.
BUSY_PAGES_PER_SECOND = 8192

# QEMU 9.0 and later; before. The kernel keeps 15 bytes of a name.
_FAULT_THREADS = {"mig/dst/fault", "fault-default", "postcopy/fault"}
_LISTEN_THREADS = {"mig/dst/listen", "postcopy/listen"}
_PREEMPT_THREADS = {"mig/dst/preempt", "fault-fast"}


def is_worth_it() -> bool:
    """Measure whether sharing a CPU makes wake-ups cheap here; takes some ms."""
    if len(os.sched_getaffinity(0)) < 2:
        return False
    same, other = native.measure_wakeups()
    return 0 < same < other * _WORTH


def threads(pid: int) -> dict[int, str]:
    """Return the threads of a process: id and name."""
    found = {}
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found[int(task.name)] = (task / "comm").read_text().rstrip("\n")
    return found


def fault_path(named: dict[int, str]) -> list[int] | None:
    """Return the threads of QEMU that a fault of its only vCPU wakes.

    None where there is more than one vCPU, or threads have no names
    (``-name NAME,debug-threads=on`` gives them).
    """
    cpus = [tid for tid, name in named.items() if name.startswith("CPU ")]
    faults = [tid for tid, name in named.items() if name in _FAULT_THREADS]
    listens = [tid for tid, name in named.items() if name in _LISTEN_THREADS]
    urgent = [tid for tid, name in named.items() if name in _PREEMPT_THREADS]
    if len(cpus) != 1 or len(faults) != 1 or len(listens) != 1:
        return None
    return cpus + faults + listens + urgent


def _last_cpu(tid: int) -> int:
    """Return the CPU on which a thread ran last (field 39 of stat)."""
    text = Path(f"/proc/{tid}/stat").read_text()
    return int(text.rpartition(")")[2].split()[36])


@dataclass
class Placement:
    """The threads of one guest and its pager, put on one CPU.

    Args:
        pid: QEMU.

    Attributes:
        cpu: Where they were put; None: they were not.
        over: It was undone, or is not to be: nothing is placed any more.
    """

    pid: int
    _found: dict[int, set[int]] = field(default_factory=dict)
    cpu: int | None = None
    over: bool = False

    def apply(self, pager_thread: int) -> bool:
        """Put them on the CPU of the vCPU; says whether that was done."""
        path = fault_path(threads(self.pid))
        if self.over or path is None or not pager_thread:
            self.over = True
            return False
        try:
            found = {tid: os.sched_getaffinity(tid) for tid in [*path, pager_thread]}
            allowed = set.intersection(*found.values())
            cpu = _last_cpu(path[0])
            if not allowed:
                return False
            cpu = cpu if cpu in allowed else min(allowed)
            self._found = found
            for tid in found:
                os.sched_setaffinity(tid, {cpu})
        except OSError:
            # A thread has ended, or is not ours to move.
            self.undo()
            return False
        self.cpu = cpu
        return True

    def undo(self) -> None:
        """Give every thread the CPUs that it was found with, for good."""
        self.over = True
        found, self._found = self._found, {}
        for tid, cpus in found.items():
            with contextlib.suppress(OSError):
                os.sched_setaffinity(tid, cpus)
