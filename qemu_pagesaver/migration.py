# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU's migration as seen over QMP: its state, and settings put back after use.

What QEMU calls states, capabilities and parameters is in ``qapi/migration.json``
of its source.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from qemu_pagesaver import errors

if TYPE_CHECKING:
    from qemu_pagesaver.qmp import Qmp

T = TypeVar("T")

# States in which a migration ends; any other but none means that one is active.
ENDED = frozenset({"none", "completed", "failed", "cancelled"})
# Postcopy that lost its source: the guest waits for `recover`.
LOST_SOURCE = frozenset(
    {"postcopy-paused", "postcopy-recover-setup", "postcopy-recover"}
)
# As libvirt has it: the largest number of bytes/s that is whole MiB. Not 0, whose
# meaning has changed between versions.
UNLIMITED_BANDWIDTH = (2**63 - 1) >> 20 << 20
LONGEST_DOWNTIME_MS = 2_000_000

_PUT_BACK_DEADLINE = 5.0


@dataclass(frozen=True, kw_only=True)
class Migration:
    """What ``query-migrate`` says.

    Attributes:
        status: QEMU's word; ``none`` if there was no migration yet.
        error: Why it failed; empty if it did not, or QEMU does not say.
        blocked_reasons: Why this guest cannot migrate at all.
        details: The whole answer.
    """

    status: str
    error: str
    blocked_reasons: tuple[str, ...]
    details: Mapping[str, Any]

    @property
    def active(self) -> bool:
        """Whether a migration has begun and has not ended."""
        return self.status not in ENDED

    @property
    def lost_source(self) -> bool:
        """Whether a postcopy waits for a new source."""
        return self.status in LOST_SOURCE


async def query_migrate(qmp: Qmp) -> Migration:
    """Ask for the state of the migration, incoming or outgoing."""
    answer = await qmp.execute("query-migrate")
    return Migration(
        status=str(answer.get("status", "none")),
        error=str(answer.get("error-desc", "")),
        blocked_reasons=tuple(answer.get("blocked-reasons", ())),
        details=answer,
    )


async def query_capabilities(qmp: Qmp) -> dict[str, bool]:
    """Return every migration capability that this QEMU knows."""
    answer = await qmp.execute("query-migrate-capabilities")
    return {entry["capability"]: bool(entry["state"]) for entry in answer}


@contextlib.asynccontextmanager
async def migration_settings(
    qmp: Qmp,
    *,
    capabilities: Mapping[str, bool],
    parameters: Mapping[str, object],
) -> AsyncIterator[None]:
    """Set capabilities and parameters, and put back what was found.

    They stay set after a migration, so the next one, perhaps a manager's, would
    have them. They are put back on failure and cancellation too; the migration
    must have ended by then. Only what differs is touched. A capability that
    QEMU does not know is as good as off.

    Raises:
        QemuRefused: QEMU lacks a capability or refuses a value.
    """
    found_capabilities = await query_capabilities(qmp)
    found_parameters = await qmp.execute("query-migrate-parameters")
    missing = [
        name
        for name, on in capabilities.items()
        if on and name not in found_capabilities
    ]
    if missing:
        raise errors.QemuRefused(
            f"this QEMU has no migration capability {', '.join(sorted(missing))}"
        )
    changed_capabilities = {
        name: on
        for name, on in capabilities.items()
        if found_capabilities.get(name, False) != on
    }
    changed_parameters = {
        name: value
        for name, value in parameters.items()
        if found_parameters.get(name) != value
    }
    old_capabilities = {name: not on for name, on in changed_capabilities.items()}
    old_parameters = {
        name: found_parameters[name]
        for name in changed_parameters
        if name in found_parameters
    }
    try:
        await _set(qmp, changed_capabilities, changed_parameters)
        yield
    except BaseException:
        # The error under way says more than one of putting things back.
        with contextlib.suppress(errors.QemuError):
            await to_the_end(_put_back(qmp, old_capabilities, old_parameters))
        raise
    await to_the_end(_put_back(qmp, old_capabilities, old_parameters))


async def to_the_end(work: Awaitable[T]) -> T:
    """Await ``work`` to its end even if this task is cancelled meanwhile.

    For putting things back: a second Ctrl-C must not leave half of it. The
    cancellation is raised afterwards.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.done():
                break
            cancelled = error
        except BaseException:  # noqa: S110 - result() raises it below
            pass
    if cancelled is not None:
        if not task.cancelled():
            task.exception()
        raise cancelled
    return task.result()


async def _set(
    qmp: Qmp, capabilities: Mapping[str, bool], parameters: Mapping[str, object]
) -> None:
    if capabilities:
        await qmp.execute(
            "migrate-set-capabilities",
            {
                "capabilities": [
                    {"capability": name, "state": on}
                    for name, on in capabilities.items()
                ]
            },
            timeout=_PUT_BACK_DEADLINE,
        )
    if parameters:
        await qmp.execute(
            "migrate-set-parameters", parameters, timeout=_PUT_BACK_DEADLINE
        )


async def _put_back(
    qmp: Qmp, capabilities: Mapping[str, bool], parameters: Mapping[str, object]
) -> None:
    if qmp.closed:
        return
    # Parameters first: their old values may need the capabilities of now.
    try:
        await _set(qmp, {}, parameters)
    finally:
        await _set(qmp, capabilities, {})
