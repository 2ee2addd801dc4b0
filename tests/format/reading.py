# SPDX-License-Identifier: LGPL-2.1-or-later
"""Both readers on files that are in memory."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from qemu_pagesaver import native
from qemu_pagesaver.errors import PagesaverError
from qemu_pagesaver.image.slow import SlowImage

T = TypeVar("T")


@contextmanager
def core(data: bytes, name: str) -> Iterator[native.Image]:
    """Open with the C core."""
    fd = os.memfd_create(name)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        with native.Image(fd, name=name) as image:
            yield image
    finally:
        os.close(fd)


def slow(data: bytes, name: str) -> SlowImage:
    """Open with the Python reader."""
    return SlowImage(io.BytesIO(data), name=name)


def outcome(call: Callable[[], T]) -> T | PagesaverError:
    """Return the result, or the error."""
    try:
        return call()
    except PagesaverError as error:
        return error


def kind(error: object, name: str) -> str | None:
    """Return the class of an error, which must name the file; None if it is none."""
    if not isinstance(error, PagesaverError):
        return None
    assert error.message.startswith(f"{name}: ")
    assert "\n" not in error.message
    return type(error).__name__


def open_core(data: bytes, name: str) -> str | None:
    """Return the class of the error with which the core refuses a file."""

    def attempt() -> None:
        with core(data, name):
            pass

    return kind(outcome(attempt), name)


def open_slow(data: bytes, name: str) -> str | None:
    """Return the class of the error with which slow.py refuses a file."""
    return kind(outcome(lambda: slow(data, name)), name)
