# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a snapshot says of itself, as the document of ``info --json``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qemu_pagesaver import devices as device_state
from qemu_pagesaver import errors
from qemu_pagesaver.snapshot import Snapshot, open_snapshot

if TYPE_CHECKING:
    from qemu_pagesaver.native import RamBlock

__all__ = ["describe", "open_snapshot"]


def describe(snapshot: Snapshot) -> dict[str, Any]:
    """Return the document: kebab-case keys, sizes in bytes, times in seconds."""
    info, meta = snapshot.info, snapshot.meta
    document: dict[str, Any] = {
        "file": str(snapshot.path),
        "format-version": info.format_version,
        "uuid": snapshot.uuid,
        "parent": snapshot.parent,
        "created": meta.created,
        "creator": meta.creator,
        "machine": snapshot.machine,
        "qemu-version": meta.qemu_version,
        "architecture": meta.architecture or _architecture(snapshot),
        "run-state": meta.run_state,
        "ram-blocks": [_block(block) for block in snapshot.image.ram_blocks],
        "ram-bytes": sum(block.length for block in snapshot.image.ram_blocks),
        "pages": {
            "zero": info.pages_zero,
            "fill": info.pages_fill,
            "data": info.canonical_pages,
            "shared": info.pages_data - info.canonical_pages,
            "absent": info.pages_absent,
        },
        "bytes": info.file_bytes,
        "index-bytes": info.index_bytes,
        "working-set": None,
        "compression": meta.compression,
        "locality-blocks": info.locality_blocks,
        "pages-per-block": info.pages_per_block,
        "capabilities": list(meta.capabilities),
        "disks": [dict(disk) for disk in meta.disks],
        "hotplugged": list(meta.hotplugged),
        "pause": meta.pause,
        "duration": meta.duration,
        "locality": None if meta.locality is None else dict(meta.locality),
        "neighbours": neighbours(snapshot),
    }
    document["devices"] = _devices(snapshot)
    return document


def neighbours(snapshot: Snapshot) -> str:
    """Say in a clause where prefetch looks for the neighbours of a page, and why."""
    spaces = snapshot.image.space_count
    if spaces:
        return f"guest-virtual, by {spaces} address spaces"
    found = snapshot.meta.locality or {}
    why = found.get("note") or "the file does not tell address spaces"
    return f"physical: {why}"


def _block(block: RamBlock) -> dict[str, Any]:
    return {
        "name": block.name,
        "bytes": block.length,
        "page-size": block.page_size,
        "address": block.address,
        "pages": {
            "zero": block.pages_zero,
            "fill": block.pages_fill,
            "stored": block.pages_data,  # data and shared ones
            "absent": block.pages_absent,
        },
    }


def _architecture(snapshot: Snapshot) -> str | None:
    try:
        return device_state.architecture(snapshot.devices)
    except errors.Damaged:
        return None


def _devices(snapshot: Snapshot) -> list[dict[str, Any]] | None:
    """List the device sections; None where they cannot be told apart.

    That is not reason enough to keep silent about everything else: `check` says
    whether the file is damaged.
    """
    try:
        found = snapshot.devices
    except errors.Damaged:
        return None
    return [
        {
            "name": device.name,
            "instance": device.instance,
            "version": device.version,
            "bytes": len(device.data),
        }
        for device in found
    ]
