# SPDX-License-Identifier: LGPL-2.1-or-later
"""Save QEMU guests page by page; run them again before their memory is read.

``save`` and ``restore`` are for plain synchronous code, ``save_async`` and
``restore_async`` for code that has an event loop; ``open`` reads a snapshot. All
failures are :class:`PagesaverError` of :mod:`qemu_pagesaver.errors`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from qemu_pagesaver import errors
from qemu_pagesaver.errors import PagesaverError

if TYPE_CHECKING:
    from qemu_pagesaver.recover import recover, recover_async
    from qemu_pagesaver.restore import restore, restore_async
    from qemu_pagesaver.save import SaveResult, save, save_async
    from qemu_pagesaver.snapshot import open_snapshot as open  # noqa: A004 - as gzip.open

__all__ = [
    "PagesaverError",
    "SaveResult",
    "__version__",
    "errors",
    "open",
    "recover",
    "recover_async",
    "restore",
    "restore_async",
    "save",
    "save_async",
]

__version__ = "0.1.0"

# Imported when first used: the errors alone must not need the C core, and
# `status` must not pay for what `save` needs.
_LAZY = {
    "SaveResult": ("save", "SaveResult"),
    "open": ("snapshot", "open_snapshot"),
    "recover": ("recover", "recover"),
    "recover_async": ("recover", "recover_async"),
    "restore": ("restore", "restore"),
    "restore_async": ("restore", "restore_async"),
    "save": ("save", "save"),
    "save_async": ("save", "save_async"),
}


class _Package(ModuleType):
    """This module: ``save`` is the function, whoever has imported the module."""

    def __setattr__(self, name: str, value: object) -> None:
        # The import system sets a submodule as an attribute of its package.
        if not (name in _LAZY and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> object:
        try:
            module, attribute = _LAZY[name]
        except KeyError:
            raise AttributeError(
                f"module {__name__!r} has no attribute {name!r}"
            ) from None
        found: object = getattr(import_module(f"{__name__}.{module}"), attribute)
        setattr(self, name, found)
        return found


sys.modules[__name__].__class__ = _Package
