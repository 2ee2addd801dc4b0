# SPDX-License-Identifier: LGPL-2.1-or-later
"""`save` without QEMU: what is refused, found out and said."""

from __future__ import annotations

import asyncio
import importlib
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import qemu_pagesaver
from qemu_pagesaver import errors, process
from qemu_pagesaver.capture import Pause
from qemu_pagesaver.disks import Disk, Layer
from qemu_pagesaver.qmp import Qmp
from qemu_pagesaver.save import (
    PageCounts,
    SaveResult,
    _disk_mode,
    _plugged,
    _require_saveable,
)
from tests.unit.test_qmp import FakeQemu

DISK = Disk(
    node="#block1",
    device="disk0",
    read_only=False,
    layers=(Layer(filename="/d/root.qcow2", format="qcow2"),),
)


def test_the_package_has_functions_whoever_imported_modules() -> None:
    importlib.import_module("qemu_pagesaver.save")
    assert callable(qemu_pagesaver.save)
    assert callable(qemu_pagesaver.open)
    with pytest.raises(AttributeError, match="teleport"):
        qemu_pagesaver.teleport  # type: ignore[attr-defined]  # noqa: B018


def test_errors_do_not_need_the_core() -> None:
    code = (
        "import sys; sys.modules['qemu_pagesaver._native'] = None\n"
        "import qemu_pagesaver; print(qemu_pagesaver.errors.DiskFull.exit_code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True
    )
    assert done.stdout == "31\n"


def test_document_has_the_keys_that_are_promised() -> None:
    result = SaveResult(
        snapshot="a.psnap",
        bytes=5,
        pages=PageCounts(zero=1, fill=2, data=3, shared=4),
        downtime=0.5,
        pause=Pause(total=0.5, stop=0.1, overlay=0.1, drain=0.2, resume=0.1),
        duration=2.0,
        uuid="u",
        run_state="running",
        disks=(),
        notes=("n",),
    )
    document = result.document()
    assert document["pages"] == {"zero": 1, "fill": 2, "data": 3, "shared": 4}
    assert {"snapshot", "bytes", "downtime", "duration"} <= set(document)
    assert sum(document["pause"].values()) == pytest.approx(document["downtime"])


@pytest.mark.parametrize(
    ("disks", "wanted", "quitting", "expected"),
    [
        ([], None, False, "check"),
        ([DISK], None, True, "check"),
        ([DISK], "none", False, "none"),
        ([DISK], "overlay", False, "overlay"),
        ([DISK], "check", False, "check"),
        ([DISK], None, False, None),
    ],
)
def test_choice_for_the_disks(
    disks: list[Disk], wanted: str | None, quitting: bool, expected: str | None
) -> None:
    if expected is not None:
        assert _disk_mode(disks, wanted, quitting=quitting) == expected
        return
    with pytest.raises(errors.DisksChoiceNeeded, match=r"root\.qcow2") as caught:
        _disk_mode(disks, wanted, quitting=quitting)
    assert all(word in caught.value.hint for word in ("overlay", "check", "none"))


def test_states_and_devices(tmp_path: Path) -> None:
    async def main() -> None:
        qemu = FakeQemu(tmp_path / "qmp")
        qemu.answers["qom-list"] = [
            {"name": "type", "type": "string"},
            {"name": "net0", "type": "child<virtio-net-pci>"},
            {"name": "late", "type": "child<virtio-rng-pci>"},
        ]
        async with qemu.serve(), await Qmp.connect(qemu.path) as qmp:
            for state in ("running", "paused", "prelaunch", "io-error"):
                _require_saveable(qmp, state)
            for state in ("postmigrate", "suspended", "inmigrate", "colo"):
                with pytest.raises(errors.GuestBusy, match=state):
                    _require_saveable(qmp, state)
            arguments = [
                *("qemu", "-device", "virtio-net-pci,id=net0"),
                *("-device", '{"driver": "e1000", "id": "gone"}', "-device", "vga"),
            ]
            assert await _plugged(qmp, arguments) == (
                [{"id": "late", "driver": "virtio-rng-pci"}],
                ["gone"],
            )

    asyncio.run(main())


def test_process_behind_the_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "qmp")
    assert process.find_qemu(path, peer=0, pid=None) is None
    with pytest.raises(errors.UsageError, match="no QEMU") as caught:
        process.find_qemu(path, peer=os.getpid(), pid=None)
    assert "--pid" in caught.value.hint
    with pytest.raises(errors.UsageError, match="does not exist"):
        process.find_qemu(path, peer=1, pid=2**22 + 1)


def test_a_process_holds_its_sockets(tmp_path: Path) -> None:
    path = tmp_path / f"qmp-{os.getpid()}"  # no other socket has that name
    assert process._holds_socket(os.getpid(), str(path)) is None
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        assert process._holds_socket(os.getpid(), str(path)) is True
        assert process._holds_socket(os.getppid(), str(path)) is False


def test_facts_of_a_process() -> None:
    name = process.binary_name(os.getpid())
    assert name is not None
    assert name.startswith("python")
    assert (process.resident_bytes(os.getpid()) or 0) > 1 << 20
    assert process.binary_name(2**22 + 1) is None
    assert process.resident_bytes(2**22 + 1) is None
