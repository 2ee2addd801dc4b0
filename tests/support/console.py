# SPDX-License-Identifier: LGPL-2.1-or-later
"""The serial line of a guest: a shell, or the line protocol of `pattern`.

A console is bound to a socket, not to a guest: make a new one on the serial
socket of the QEMU that a guest was restored in and go on.
"""

from __future__ import annotations

import re
import secrets
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from .qmp import connect_unix

DEADLINE = 60.0


class GuestError(AssertionError):
    """The guest answered that something is wrong, or not at all."""


class Console:
    """Bytes to and from a serial socket, each wait with a deadline."""

    ready: re.Pattern[str]

    def __init__(self, path: Path, deadline: float = DEADLINE) -> None:
        self.path = path
        self.transcript = ""
        self._unread = ""
        self._socket = connect_unix(path, deadline)

    def close(self) -> None:
        self._socket.close()

    def send(self, text: str) -> None:
        self._socket.settimeout(DEADLINE)
        self._socket.sendall(text.encode())

    def expect(self, pattern: re.Pattern[str], deadline: float) -> re.Match[str]:
        """Read until PATTERN; what came before it is match.string[:match.start()]."""
        end = time.monotonic() + deadline
        while not (match := pattern.search(self._unread)):
            self._socket.settimeout(max(0.001, end - time.monotonic()))
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                data = b""
                problem = f"no {pattern.pattern!r} within {deadline} s"
            else:
                problem = "QEMU closed the serial line"
            if not data:
                raise GuestError(f"{problem}; serial: {self.transcript[-2000:]!r}")
            text = data.decode(errors="replace")
            self.transcript += text
            self._unread += text
        self._unread = self._unread[match.end() :]
        return match

    def wait_ready(self, deadline: float = DEADLINE) -> re.Match[str]:
        """Wait for the guest's own word, once after its boot."""
        return self.expect(self.ready, deadline)


class ShellConsole(Console):
    """The root shell of a Linux guest."""

    ready = re.compile(r"guest: ready\n")

    def run(
        self, command: str, *, deadline: float = DEADLINE, check: bool = True
    ) -> str:
        """Run one line; its output (both streams), without the last newline.

        Shell variables last from one command to the next. CHECK: a status other
        than 0 is a GuestError.
        """
        if "\n" in command:
            raise ValueError("one line")
        mark = secrets.token_hex(6)
        quoted = shlex.quote(command)
        self.send(f'command eval {quoted} 2>&1; echo "@@{mark} $?"\n')
        match = self.expect(re.compile(rf"@@{mark} (\d+)\n"), deadline)
        output = match.string[: match.start()].removesuffix("\n")
        if check and match[1] != "0":
            raise GuestError(f"{command!r}: status {match[1]}: {output}")
        return output


@dataclass(frozen=True)
class Touch:
    """Time of first loads, in ticks of the guest's TSC."""

    n: int
    p50: int
    p90: int
    p99: int
    max: int
    total: int
    elapsed: int
    sum: int


class PatternConsole(Console):
    """The guest of tests/guests/pattern/kernel.c; formulas in pattern.py."""

    ready = re.compile(r"pattern: ready (\d+)\n")
    _line = re.compile(r"([^\n]*)\n")

    def ask(self, line: str, deadline: float = DEADLINE) -> dict[str, str]:
        """Carry out one command; the fields of its answer."""
        self.send(line + "\n")
        answer = self.expect(self._line, deadline)[1]
        if not answer.startswith("ok"):
            raise GuestError(f"{line!r}: {answer}")
        return dict(word.split("=", 1) for word in answer.split()[1:])

    def pages(self) -> int:
        """Pages of the arena, which begins at 16 MiB."""
        return int(self.ask("pages?")["pages"])

    def fill(self, seed: int, first: int, count: int, kind: str = "data") -> None:
        self.ask(f"fill {seed} {first} {count} {kind}", DEADLINE + count / 1000)

    def check(self, seed: int, first: int, count: int, kind: str = "data") -> None:
        """GuestError names the first page that is wrong."""
        self.ask(f"check {seed} {first} {count} {kind}", DEADLINE + count / 1000)

    def write(self, mark: int, first: int, count: int) -> None:
        """Dirty pages: the last word of each becomes mark + page."""
        self.ask(f"write {mark} {first} {count}")

    def marks(self, mark: int, first: int, count: int) -> None:
        self.ask(f"marks {mark} {first} {count}")

    def touch(
        self, seed: int, first: int, count: int, n: int, order: str = "random"
    ) -> Touch:
        """Load one word of N of the COUNT pages from FIRST ("random", "seq")."""
        answer = self.ask(f"touch {seed} {first} {count} {order} {n}", 4 * DEADLINE)
        return Touch(**{name: int(value) for name, value in answer.items()})

    def ticks_per_second(self, over: float = 0.2) -> float:
        """Calibrate the guest's TSC against our clock."""
        best: list[tuple[float, float, int]] = []
        for wait in (0.0, over):
            time.sleep(wait)
            samples = []
            for _ in range(5):
                before = time.monotonic()
                tsc = int(self.ask("tsc")["tsc"])
                after = time.monotonic()
                samples.append((after - before, (before + after) / 2, tsc))
            best.append(min(samples))
        return (best[1][2] - best[0][2]) / (best[1][1] - best[0][1])

    @property
    def nonce(self) -> str:
        return self.ask("nonce?").get("nonce", "")

    @nonce.setter
    def nonce(self, value: str) -> None:
        self.ask(f"nonce {value}")

    def spin_on(self, first: int, count: int) -> None:
        """Begin to count in COUNT pages, round and round."""
        self.ask(f"spin on {first} {count}")

    def spin_off(self) -> int:
        return int(self.ask("spin off")["count"])

    def spin_check(self) -> int:
        """The guest finds its counters consistent; the count."""
        return int(self.ask("spin check")["count"])

    def count(self) -> int:
        return int(self.ask("count?")["count"])
