# SPDX-License-Identifier: LGPL-2.1-or-later
"""Check a snapshot: all of it, the C core's part and what Python decodes."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qemu_pagesaver import errors
from qemu_pagesaver.native import Job, Problem
from qemu_pagesaver.report import Report, Silent
from qemu_pagesaver.snapshot import Snapshot
from qemu_pagesaver.work import in_thread

if TYPE_CHECKING:
    from collections.abc import Iterator

_PROBLEMS_AT_MOST = 1000


@dataclass(frozen=True, kw_only=True)
class Checked:
    """``count`` problems in all, the first of them listed."""

    ok: bool
    count: int
    problems: tuple[Problem, ...]


def check(path: str | os.PathLike[str], *, report: Report | None = None) -> Checked:
    """Check a snapshot; see :func:`check_async`."""
    return asyncio.run(check_async(path, report=report))


async def check_async(
    path: str | os.PathLike[str], *, report: Report | None = None
) -> Checked:
    """Check a snapshot file.

    A file whose index is too damaged to be opened has that as its one problem.

    Raises:
        NotASnapshot, FormatVersionTooNew, UnknownFeature: It cannot be judged.
        HostError: It cannot be read.
    """
    report = report or Silent()
    try:
        snapshot = Snapshot.open(path)
    except (errors.Damaged, errors.Truncated) as error:
        problem = Problem(message=error.message, offset=None)
        return Checked(ok=False, count=1, problems=(problem,))
    with snapshot:
        return await _check(snapshot, report)


async def _check(snapshot: Snapshot, report: Report) -> Checked:
    job = Job()
    count, found = await in_thread(
        lambda: snapshot.image.check(job, at_most=_PROBLEMS_AT_MOST),
        cancel=job.cancel,
        watch=lambda: report.progress("checking", job.done, job.total),
    )
    if not count:
        # Of damaged sections the core has said all there is to say.
        found = list(_decoded(snapshot))
        count = len(found)
    return Checked(ok=not count, count=count, problems=tuple(found))


def _decoded(snapshot: Snapshot) -> Iterator[Problem]:
    for what in ("meta", "machine", "devices"):
        try:
            getattr(snapshot, what)
        except errors.SnapshotError as error:
            yield Problem(message=error.message, offset=None)
