# SPDX-License-Identifier: LGPL-2.1-or-later
"""A small synchronous QMP client, so that tests need not trust the product's."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

DEADLINE = 60.0


class QmpError(Exception):
    """QEMU answered with an error."""

    def __init__(self, command: str, error: dict[str, Any]) -> None:
        super().__init__(f"{command}: {error.get('desc')}")
        self.error = error


def connect_unix(path: Path, deadline: float) -> socket.socket:
    """Connect as soon as somebody listens."""
    end = time.monotonic() + deadline
    while True:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(max(0.1, end - time.monotonic()))
            sock.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError, TimeoutError):
            sock.close()
            if time.monotonic() > end:
                raise
            time.sleep(0.01)
        except BaseException:
            sock.close()
            raise
        else:
            return sock


class Qmp:
    """One connection to one monitor socket."""

    def __init__(self, path: Path, deadline: float = DEADLINE) -> None:
        self.events: list[dict[str, Any]] = []
        self._buffer = b""
        self._socket = connect_unix(path, deadline)
        self.greeting = self._read(deadline)
        self.command("qmp_capabilities")

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
        self._socket.close()

    def command(
        self,
        name: str,
        /,
        deadline: float = DEADLINE,
        **arguments: Any,
    ) -> Any:
        """Answer of NAME; in arguments, write '_' for '-'."""
        request: dict[str, Any] = {"execute": name}
        if arguments:
            named = {k.replace("_", "-"): v for k, v in arguments.items()}
            request["arguments"] = named
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        end = time.monotonic() + deadline
        while True:
            message = self._read(end - time.monotonic())
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise QmpError(name, message["error"])
            else:
                return message["return"]

    def hmp(self, line: str) -> str:
        answer = self.command("human-monitor-command", command_line=line)
        assert isinstance(answer, str)
        return answer

    def event(self, name: str, deadline: float = DEADLINE) -> dict[str, Any]:
        """The oldest event NAME that has not been asked for, or the next."""
        end = time.monotonic() + deadline
        while True:
            for position, event in enumerate(self.events):
                if event["event"] == name:
                    return self.events.pop(position)
            self.events.append(self._read(end - time.monotonic()))

    def wait_status(self, *wanted: str, deadline: float = DEADLINE) -> str:
        """Wait until query-status says one of WANTED."""
        return self._poll("query-status", wanted, deadline)

    def wait_migration(self, *wanted: str, deadline: float = DEADLINE) -> str:
        """Wait until query-migrate says one of WANTED ("completed")."""
        return self._poll("query-migrate", wanted or ("completed",), deadline)

    def _poll(self, command: str, wanted: tuple[str, ...], deadline: float) -> str:
        end = time.monotonic() + deadline
        while True:
            answer = self.command(command)
            status = str(answer.get("status"))
            if status in wanted:
                return status
            if time.monotonic() > end or status == "failed":
                raise AssertionError(f"{command}: {answer}, waited for {wanted}")
            time.sleep(0.01)

    def _read(self, deadline: float) -> dict[str, Any]:
        end = time.monotonic() + deadline
        while b"\n" not in self._buffer:
            self._socket.settimeout(max(0.001, end - time.monotonic()))
            data = self._socket.recv(65536)
            if not data:
                raise ConnectionError("QEMU closed the monitor")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        message = json.loads(line)
        assert isinstance(message, dict)
        return message
