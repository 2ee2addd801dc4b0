# SPDX-License-Identifier: LGPL-2.1-or-later
"""Imports point one way: a module imports only from layers above it in LAYERS."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qemu_pagesaver

ROOT = Path(qemu_pagesaver.__file__).parent
PACKAGE = ROOT.name

# A new module needs a place here: as early as what it imports lets it be.
LAYERS = (
    {"errors", "report", "work", "option_string", "_native"},
    {"native", "qmp", "files", "devices", "control", "process", "command_line"},
    {"disks", "image", "image.slow", "migration", "placement", "postcopy", "snapshot"},
    {"memory_map"},
    {"address_spaces", "locality"},
    {"capture", "check", "convert", "guest", "info"},
    {"compare", "delivery", "host_validate"},
    {"save", "restore", "recover"},
    {"cli.output"},
    {"cli.delivery"},
    {
        *("cli.save", "cli.restore", "cli.recover", "cli.status", "cli.finish"),
        *("cli.info", "cli.check", "cli.compare", "cli.map", "cli.convert"),
        "cli.host_validate",
    },
    {"cli"},
    {"__main__"},
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# Names of the package itself that are no modules.
ATTRIBUTES = {"__version__"}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts).removesuffix("__init__").rstrip(".")
        found[name] = path
    return found


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """All imports with their lines, also those inside functions and for types."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            assert node.module
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def own_imports(path: Path) -> Iterator[tuple[str, int]]:
    """Imports of modules of this package, by their names in it."""
    known = {*modules(), "_native"}
    for name, line in imports(path):
        top, _, rest = name.partition(".")
        if top != PACKAGE or rest in ATTRIBUTES:
            continue
        while rest and rest not in known:
            rest = rest.rpartition(".")[0]
        assert rest, f"{path}:{line}: {name} is no module"
        yield rest, line


@pytest.mark.parametrize("name", [name for name in modules() if name])
def test_imports_point_one_way(name: str) -> None:
    assert name in RANK, f"{name} has no place in LAYERS"
    for imported, line in own_imports(modules()[name]):
        assert RANK[imported] < RANK[name], f"{name}:{line} imports {imported}"


def test_gateways() -> None:
    """Each foreign interface has one importer."""
    for name, path in modules().items():
        for imported, line in imports(path):
            where = f"{name}:{line}"
            if f"{imported}.".startswith(f"{PACKAGE}._native."):
                assert name == "native", where
            if f"{imported}.".startswith("qemu.qmp."):
                assert name == "qmp", where
            if imported.startswith("rich"):
                assert name.startswith("cli"), where
            if imported.startswith(f"{PACKAGE}.capture"):
                assert name == "save", where
            if imported.startswith("construct"):
                assert name == "image.slow", where


def test_slow_reader_is_independent() -> None:
    assert {name for name, _ in own_imports(modules()["image.slow"])} <= {"errors"}


def test_library_does_not_print() -> None:
    for name, path in modules().items():
        if name.startswith(("cli", "__main__")):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "print", f"{name}:{node.lineno}"


def test_importing_the_package_needs_no_c_core() -> None:
    """The errors and the names are there; what they stand for comes when used."""
    program = (
        "import sys, qemu_pagesaver, qemu_pagesaver.errors\n"
        "tops = ('qemu', 'rich', 'asyncio')\n"
        "print(*sorted(m for m in sys.modules if m.startswith(tops)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["qemu_pagesaver", "qemu_pagesaver.errors"]


def test_every_file_has_its_licence() -> None:
    for path in modules().values():
        first = path.read_text().partition("\n")[0]
        assert first == "# SPDX-License-Identifier: LGPL-2.1-or-later", path
