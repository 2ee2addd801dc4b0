# SPDX-License-Identifier: LGPL-2.1-or-later
"""How the library tells its caller what it is doing, without printing."""

from __future__ import annotations

from typing import Protocol


class Report(Protocol):
    """What a caller may pass to follow long work; called from one thread."""

    def event(self, name: str, **fields: object) -> None:
        """Take an event: started, running, complete, failed (design.md)."""

    def progress(self, stage: str, done: int, total: int) -> None:
        """Take progress in bytes; ``total`` is 0 while it is not known."""

    def note(self, text: str) -> None:
        """Take a sentence that a user should see on stderr."""

    def detail(self, text: str) -> None:
        """Take a sentence for ``-v``."""


class Silent:
    """A Report that drops everything."""

    def event(self, name: str, **fields: object) -> None:
        """Drop it."""

    def progress(self, stage: str, done: int, total: int) -> None:
        """Drop it."""

    def note(self, text: str) -> None:
        """Drop it."""

    def detail(self, text: str) -> None:
        """Drop it."""
