# SPDX-License-Identifier: LGPL-2.1-or-later
"""Warm and cold storage."""

from __future__ import annotations

import os
from pathlib import Path


def drop() -> None:
    """Make every later file read come from the disk; needs root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def warm(path: Path) -> None:
    """Read a file once, so that the page cache has it."""
    buffer = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
