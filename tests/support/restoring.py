# SPDX-License-Identifier: LGPL-2.1-or-later
"""`qemu-pagesaver restore` and `recover` as processes: followed, killed, tidied."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .console import PatternConsole
from .qmp import Qmp

DEADLINE = 60.0
SEED = 7
# What the guest of `fill` holds: first page, pages, kind.
FILLED = ((0, 6000, "data"), (6000, 2000, "unit:4:01020304"), (8000, 500, "dup"))
NONCE = "kept-in-memory"


def fill(console: PatternConsole) -> None:
    """Give the guest something to remember."""
    console.nonce = NONCE
    for first, count, kind in FILLED:
        console.fill(SEED, first, count, kind)


def check(console: PatternConsole, *, untouched: int = 8000) -> None:
    """The guest finds its memory right, page by page, zeros included."""
    assert console.nonce == NONCE
    for first, count, kind in FILLED:
        console.check(SEED, first, count, kind)
    first = sum(FILLED[-1][:2])
    console.check(SEED, first, untouched, "zero")


def cli(
    *arguments: str | Path, runtime: Path, timeout: float = DEADLINE
) -> subprocess.CompletedProcess[str]:
    """Run a verb to its end."""
    return subprocess.run(
        [sys.executable, "-m", "qemu_pagesaver", *map(str, arguments)],
        env=environment(runtime),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def environment(runtime: Path) -> dict[str, str]:
    return {**os.environ, "QEMU_PAGESAVER_RUNTIME_DIR": str(runtime)}


class Restoring:
    """One `restore` or `recover` under way; ends its QEMU and itself."""

    def __init__(
        self,
        verb: str,
        *arguments: str | Path,
        runtime: Path,
        command: Sequence[str] = (),
    ) -> None:
        reading, writing = os.pipe()
        self._events = os.fdopen(reading)
        self._owns_guest = verb == "restore"
        self.running: dict[str, Any] | None = None
        self._console: PatternConsole | None = None
        line = ["--json", "--status-fd", str(writing), verb, *map(str, arguments)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qemu_pagesaver", *line]
            + (["--", *command] if command else []),
            env=environment(runtime),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=(writing,),
        )
        os.close(writing)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._console is not None:
            self._console.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        self._events.close()
        self.kill_guest()

    def event(self, name: str) -> dict[str, Any]:
        """Wait for an event; fails if the process ends without it."""
        for line in self._events:
            document: dict[str, Any] = json.loads(line)
            if document["event"] == name:
                if name == "running":
                    self.running = document
                return document
        _, err = self.process.communicate()
        raise AssertionError(f"ended without {name!r}: {err}")

    def wait_running(self) -> Self:
        self.event("running")
        return self

    @property
    def pid(self) -> int:
        """QEMU's."""
        assert self.running is not None, "not running"
        return int(self.running["pid"])

    @property
    def serial_path(self) -> Path:
        """The serial line's socket, wherever it was moved to."""
        assert self.running is not None, "not running"
        (path,) = self.running["sockets"].values()
        return Path(path)

    @property
    def console(self) -> PatternConsole:
        """The serial line of the pattern guest."""
        if self._console is None:
            self._console = PatternConsole(self.serial_path)
        return self._console

    @property
    def qmp_path(self) -> Path:
        assert self.running is not None, "not running"
        return Path(self.running["qmp"])

    def qmp(self) -> Qmp:
        """The user's own QMP socket, which is free at all times."""
        return Qmp(self.qmp_path)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self, timeout: float = DEADLINE) -> tuple[int, dict[str, Any], str]:
        """Wait for the end: exit code, document (or error's), stderr."""
        out, err = self.process.communicate(timeout=timeout)
        document: dict[str, Any] = {}
        if out:
            document = json.loads(out)
        elif "{" in err:
            document = json.loads(err[err.index("{") :])
        return self.process.returncode, document, err

    def finish(self) -> dict[str, Any]:
        """Wait for the end, which is a good one."""
        code, document, err = self.end()
        assert code == 0, err
        return document

    def kill_guest(self) -> None:
        if self.running is not None and self._owns_guest:
            kill(self.pid)
            self.running = None


def kill(pid: int) -> None:
    """End a process that need not be our child, and see it gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    wait_gone(pid)


def wait_gone(pid: int, deadline: float = DEADLINE) -> None:
    """Wait until a process has ended; a zombie has."""
    end = time.monotonic() + deadline
    while is_alive(pid):
        assert time.monotonic() < end, f"process {pid} still runs"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"
