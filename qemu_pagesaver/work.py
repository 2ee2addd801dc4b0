# SPDX-License-Identifier: LGPL-2.1-or-later
"""Long calls of the C core, run in a thread: watched, and cancelled cleanly."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_INTERVAL = 0.1


async def in_thread(
    call: Callable[[], T],
    *,
    cancel: Callable[[], None],
    watch: Callable[[], None] | None = None,
) -> T:
    """Run ``call`` in a thread and return what it returns.

    Args:
        call: Blocks; runs without the GIL.
        cancel: Makes ``call`` end soon; called when this task is cancelled.
        watch: Called about ten times a second from the event loop's thread,
            and once at the end; for progress.

    It never returns or raises before ``call`` has ended, so that what ``call``
    uses can be closed afterwards.
    """
    task = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        while not task.done():
            await asyncio.wait({task}, timeout=_INTERVAL)
            if watch is not None:
                watch()
    except BaseException:
        cancel()
        while not task.done():
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError:
                continue  # asked for once more; it is on its way
        task.exception()  # seen: the cancellation is what counts
        raise
    return task.result()
