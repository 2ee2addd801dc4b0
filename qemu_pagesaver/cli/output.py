# SPDX-License-Identifier: LGPL-2.1-or-later
"""What verbs print: the result on stdout, talk on stderr, events on a pipe.

Strings out of snapshots and from QEMU are hostile: whatever would steer a
terminal is made visible before it is printed.
"""

from __future__ import annotations

import contextlib
import json as jsonlib
import os
import select
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

from qemu_pagesaver import errors

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from rich.console import Console, RenderableType
    from rich.progress import Progress, TaskID
    from rich.table import Table

# Progress is for people and for slow readers: not oftener than this, in seconds.
_EVENT_INTERVAL = 0.1
_LINE_INTERVAL = 2.0
# A supervisor that does not read its pipe must not hold a guest.
_STATUS_TIMEOUT = 5.0
# Where stdout is no terminal there is no width; tables are not to be cut.
_PIPE_WIDTH = 200


class ResultNotTaken(Exception):
    """Who reads stdout has gone."""


def printable(text: str) -> str:
    r"""Return ``text`` on one line, control characters as ``\xNN``."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "replace").decode("ascii")
        for c in text
    )


def _printable_lines(text: str) -> str:
    return "\n".join(
        "\t".join(printable(part) for part in line.split("\t"))
        for line in text.split("\n")
    )


def _json(document: Mapping[str, Any], stream: TextIO) -> str:
    """Return a document, spread over lines where a person will read it."""
    return jsonlib.dumps(document, indent=2 if stream.isatty() else None)


def size(count: int) -> str:
    """Return a size as people read it: ``1.5 GiB``."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:g} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    right: Sequence[int] = (),
    title: str = "",
) -> Table:
    """Return a plain table; columns of numbers are named in ``right``."""
    from rich import box  # noqa: PLC0415 - costs start-up time
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    made = Table(
        box=box.SIMPLE_HEAD if any(columns) else None,
        show_header=any(columns),
        show_edge=False,
        pad_edge=False,
        title=title or None,
        title_justify="left",
    )
    for index, name in enumerate(columns):
        made.add_column(name, justify="right" if index in right else "left")
    for row in rows:
        made.add_row(
            *(
                cell if isinstance(cell, Text) else Text(printable(str(cell)))
                for cell in row
            )
        )
    return made


def properties(pairs: Iterable[tuple[str, object]]) -> Table:
    """Return names and values, one pair a line."""
    return table(("", ""), ((f"{name}:", value) for name, value in pairs))


class Output:
    """Implements :class:`qemu_pagesaver.report.Report` for a command line.

    Args:
        json: The result and errors are JSON documents.

    Attributes:
        json: Likewise.
        verbosity: How many ``-v``; -1 with ``-q``.
    """

    def __init__(self, *, json: bool = False) -> None:
        """Begin without progress and events; see :meth:`configure`."""
        self.json = json
        self.verbosity = 0
        self._show_progress = False
        self._status_fd: int | None = None
        self._failed = False
        self._last_event = 0.0
        self._last_line = 0.0
        self._stage = ""
        self._bars: Progress | None = None
        self._bar: TaskID | None = None

    def configure(
        self, *, verbosity: int, progress: bool, status_fd: int | None
    ) -> None:
        """Take the global options."""
        self.verbosity = verbosity
        self._show_progress = verbosity >= 0 and (progress or sys.stderr.isatty())
        if status_fd is not None:
            try:
                os.fstat(status_fd)
                os.write(status_fd, b"")
            except (OSError, OverflowError):
                raise errors.UsageError(
                    f"--status-fd {status_fd}: no descriptor that can be written to"
                ) from None
            self._status_fd = status_fd

    # ------------------------------------------------------------- Report

    def event(self, name: str, **fields: object) -> None:
        """Write an event to ``--status-fd``."""
        self._failed = self._failed or name == "failed"
        self._write_event(name, fields, wait=_STATUS_TIMEOUT)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Show progress and write it as an event; both not too often."""
        now = time.monotonic()
        last = bool(total) and done >= total
        if last or stage != self._stage or now - self._last_event >= _EVENT_INTERVAL:
            self._last_event = now
            fields = {"stage": stage, "done": done, "total": total}
            self._write_event("progress", fields, wait=_STATUS_TIMEOUT if last else 0)
        if self._show_progress:
            if sys.stderr.isatty():
                self._draw(stage, done, total)
            else:
                self._line(stage, done, total, now, last=last)
        self._stage = stage

    def note(self, text: str) -> None:
        """Print a sentence on stderr, unless ``-q``."""
        if self.verbosity >= 0:
            self._talk(text)

    def detail(self, text: str) -> None:
        """Print a sentence on stderr under ``-v``."""
        if self.verbosity >= 1:
            self._talk(text)

    # ------------------------------------------------------------- results

    def result(self, document: Mapping[str, Any], text: str | RenderableType) -> None:
        """Print the one result: the document under ``--json``, else the text."""
        self._stop_bars()
        try:
            if self.json:
                print(_json(document, sys.stdout))
            elif isinstance(text, str):
                print(_printable_lines(text))
            else:
                self.console().print(text)
            sys.stdout.flush()
        except OSError as error:
            # Python would flush again at its end, and complain.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):
                raise ResultNotTaken from None
            raise errors.from_os_error(error, "write the result to stdout") from error

    def console(self) -> Console:
        """Return a console on stdout, for its width and its colours."""
        from rich.console import Console  # noqa: PLC0415 - costs start-up time

        tty = sys.stdout.isatty()
        given = os.environ.get("COLUMNS", "")
        width = None if tty or given.isdigit() else _PIPE_WIDTH
        return Console(
            file=sys.stdout, width=width, highlight=False, emoji=False, markup=False
        )

    def failure(self, error: errors.PagesaverError) -> int:
        """Print an error on stderr and return its exit code."""
        self._stop_bars()
        document = error.document()
        if not self._failed:
            self.event("failed", **document)
        with contextlib.suppress(OSError):
            if self.json:
                print(_json(document, sys.stderr), file=sys.stderr)
            else:
                line = f"qemu-pagesaver: {error.message}".rstrip(".")
                print(_printable_lines(f"{line}."), file=sys.stderr)
                if error.hint:
                    print(_printable_lines(error.hint), file=sys.stderr)
            sys.stderr.flush()
        return error.exit_code

    def close(self) -> None:
        """Take the progress off the screen."""
        self._stop_bars()

    # ------------------------------------------------------------- inside

    def _write_event(
        self, name: str, fields: Mapping[str, object], *, wait: float
    ) -> None:
        if self._status_fd is None:
            return
        document = {"event": name, "time": time.time()}
        document |= {key.replace("_", "-"): value for key, value in fields.items()}
        line = jsonlib.dumps(document, default=str).encode() + b"\n"
        poll = select.poll()
        poll.register(self._status_fd, select.POLLOUT)
        try:
            while line:
                if not poll.poll(wait * 1000):
                    if wait:
                        self._status_fd = None
                    return
                # What poll() promises is room for PIPE_BUF bytes.
                sent = os.write(self._status_fd, line[: select.PIPE_BUF])
                line = line[sent:]
                wait = _STATUS_TIMEOUT
        except OSError:
            self._status_fd = None

    def _talk(self, text: str) -> None:
        text = _printable_lines(text)
        with contextlib.suppress(OSError):
            if self._bars is not None:
                self._bars.console.print(text, markup=False, highlight=False)
            else:
                print(text, file=sys.stderr, flush=True)

    def _draw(self, stage: str, done: int, total: int) -> None:
        if self._bars is None:
            self._bars = _make_bars()
            self._bars.start()
        if stage != self._stage or self._bar is None:
            if self._bar is not None:
                self._bars.remove_task(self._bar)
            self._bar = self._bars.add_task(printable(stage), total=total or None)
        self._bars.update(self._bar, completed=done, total=total or None)

    def _line(
        self, stage: str, done: int, total: int, now: float, *, last: bool
    ) -> None:
        if not last and stage == self._stage and now - self._last_line < _LINE_INTERVAL:
            return
        self._last_line = now
        share = f" ({100 * done // total} %)" if total else ""
        self._talk(f"{stage}: {size(done)}{share}")

    def _stop_bars(self) -> None:
        if self._bars is not None:
            with contextlib.suppress(OSError):
                self._bars.stop()
            self._bars = None
            self._bar = None


def _make_bars() -> Progress:
    from rich.console import Console  # noqa: PLC0415 - costs start-up time
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        console=Console(file=sys.stderr, highlight=False, emoji=False),
        transient=True,
    )
