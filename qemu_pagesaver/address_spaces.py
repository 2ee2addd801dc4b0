# SPDX-License-Identifier: LGPL-2.1-or-later
"""A snapshot's address spaces and single pages, as ``map`` shows them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qemu_pagesaver import errors, memory_map
from qemu_pagesaver.native import PAGE_SIZE, PageClass

if TYPE_CHECKING:
    from qemu_pagesaver.native import Mapping, Space
    from qemu_pagesaver.snapshot import Snapshot

# Neighbours that are shown on either side of a page.
_NEIGHBOURS = 8
_CLASS_BITS = 0xF
_VALUE_SHIFT = 16
_MAPPINGS = 1024
_MORE = f"there may be more than these {_MAPPINGS} mappings"
_NO_SPACES = "its neighbours are those in physical memory"


def spaces(snapshot: Snapshot) -> list[dict[str, Any]]:
    """List the address spaces: user ones first, then the kernel's."""
    return [_space(space) for space in snapshot.image.spaces()]


def _space(space: Space) -> dict[str, Any]:
    return {
        "index": space.index,
        "kind": space.kind.name.lower(),
        "root": space.root,
        "pages": space.pages,
        "exclusive": space.pages - space.pages_shared,
        "shared": space.pages_shared,
        "bytes": space.pages * PAGE_SIZE,
        "runs": space.run_count,
    }


def page(snapshot: Snapshot, address: int) -> dict[str, Any]:
    """Tell all that is known of the page at a guest-physical address.

    Raises:
        UsageError: There is no RAM, or nothing tells where it is.
    """
    block, number = _place(snapshot, address)
    (entry,) = snapshot.image.entries(block, number, 1)
    page_class = PageClass(entry & _CLASS_BITS)
    found = snapshot.image.mappings(block, number, at_most=_MAPPINGS)
    return {
        "address": address - address % PAGE_SIZE,
        "ram-block": snapshot.ram_blocks[block].name,
        "page": number,
        "class": page_class.name.lower(),
        "canonical-page": entry >> _VALUE_SHIFT
        if page_class is PageClass.DATA
        else None,
        "mappings": [
            {
                "space": mapping.space,
                "address": mapping.address,
                "neighbours": _neighbours(snapshot, mapping),
            }
            for mapping in found
        ],
        "note": _NO_SPACES
        if not snapshot.image.space_count
        else _MORE
        if len(found) == _MAPPINGS
        else None,
    }


def _place(snapshot: Snapshot, address: int) -> tuple[int, int]:
    regions = memory_map.main_memory(snapshot)
    for region in regions:
        assert region.address is not None  # noqa: S101 - main memory has one
        offset = address - region.address
        if 0 <= offset < region.pages * PAGE_SIZE:
            return region.block.index, region.first + offset // PAGE_SIZE
    known = ", ".join(
        f"{region.address:#x} to {region.address + region.pages * PAGE_SIZE:#x}"
        for region in regions
        if region.address is not None
    )
    raise errors.UsageError(
        f"{snapshot.path} has no memory at guest-physical {address:#x}",
        hint=f"It has {known}."
        if known
        else "Nothing tells where this machine has its memory.",
    )


def _neighbours(snapshot: Snapshot, mapping: Mapping) -> list[list[Any]]:
    """List [guest-virtual address, RAM block, page] around a mapping, in order."""
    space = snapshot.image.space(mapping.space)
    names = [block.name for block in snapshot.ram_blocks]
    around: list[list[Any]] = []
    for step in (-1, 1):
        at, run = mapping.run, snapshot.image.virtual_run(mapping.run)
        address = mapping.address
        side: list[list[Any]] = []
        while len(side) < _NEIGHBOURS:
            address += step * PAGE_SIZE
            index = (address - run.address) // PAGE_SIZE
            if not 0 <= index < run.pages:
                at += step
                if not space.first_run <= at < space.first_run + space.run_count:
                    break
                run = snapshot.image.virtual_run(at)
                index = (address - run.address) // PAGE_SIZE
                if not 0 <= index < run.pages:
                    break  # a hole
            side.append([address, names[run.block], run.page + index])
        around += side[::-1] if step < 0 else side
    return around
