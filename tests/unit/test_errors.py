# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

import errno
import re
from collections.abc import Iterator

import pytest

from qemu_pagesaver import errors, native
from qemu_pagesaver._native import lib
from qemu_pagesaver.errors import PagesaverError


def tree(top: type[PagesaverError]) -> Iterator[type[PagesaverError]]:
    yield top
    for each in top.__subclasses__():
        if each.__module__ == errors.__name__:
            yield from tree(each)


ALL = list(tree(PagesaverError))
# Only group others; never raised, so they share their parent's id.
GROUPS = {"SnapshotError", "QemuError", "HostError", "MismatchError"}
OWN = [each for each in ALL if each.__name__ not in GROUPS]


def test_ids_and_exit_codes_are_unique_and_in_range() -> None:
    assert len({each.id for each in OWN}) == len(OWN)
    assert len({each.exit_code for each in OWN}) == len(OWN)
    for each in OWN:
        assert each.exit_code == 2 or 10 <= each.exit_code <= 130, each
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", each.id), each


def test_docstring_draws_the_tree() -> None:
    """Exit codes and ids are an interface; what is written is what is."""
    drawn = dict[str, tuple[int, str]]()
    for line in (errors.__doc__ or "").splitlines():
        found = re.match(r"[ |+-]*(\w+)(?: +(\d+) +([a-z-]+))?$", line)
        if found and hasattr(errors, found[1]):
            drawn[found[1]] = (int(found[2] or 0), found[3] or "")
    assert set(drawn) == {each.__name__ for each in ALL}
    for each in OWN:
        assert drawn[each.__name__] == (each.exit_code, each.id)
    for name in GROUPS:
        assert drawn[name] == (0, "")


@pytest.mark.parametrize("kind", ALL)
def test_messages_hints_documents(kind: type[PagesaverError]) -> None:
    error = kind("it failed")
    assert str(error) == error.message == "it failed"
    assert error.hint == kind.default_hint
    assert kind("it failed", hint="do this").document() == {
        "error": kind.id,
        "message": "it failed",
        "hint": "do this",
    }


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, errors.DiskFull),
        (errno.EDQUOT, errors.DiskFull),
        (errno.EFBIG, errors.DiskFull),
        (errno.EEXIST, errors.TargetExists),
        (errno.ENOMEM, errors.OutOfMemory),
        (errno.EACCES, errors.IoError),
        (errno.EIO, errors.IoError),
    ],
)
def test_os_errors_get_a_class(number: int, kind: type[PagesaverError]) -> None:
    error = errors.from_os_error(OSError(number, "why", "FILE"), "write")
    assert type(error) is kind
    assert error.message == "write FILE: why"


def test_every_status_of_the_core_has_a_class() -> None:
    names = [name for name in dir(lib) if name.startswith("PS_ERR_")]
    assert len(names) == 12
    by_hand = {"PS_ERR_IO", "PS_ERR_ARGUMENT"}
    for name in set(names) - by_hand:
        assert issubclass(native._CLASSES[getattr(lib, name)], PagesaverError)
