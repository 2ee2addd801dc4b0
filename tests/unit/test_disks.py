# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks as META has them: read, compared, mapped; without QEMU."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from qemu_pagesaver import disks, errors
from qemu_pagesaver.disks import Disk, Layer


def layer(path: Path, kind: str = "qcow2") -> Layer:
    status = path.stat()
    return Layer(
        filename=str(path),
        format=kind,
        size=status.st_size,
        mtime_ns=status.st_mtime_ns,
        inode=status.st_ino,
    )


@pytest.fixture
def chain(tmp_path: Path) -> Disk:
    """A disk of two files."""
    for name in ("top", "base"):
        (tmp_path / name).write_bytes(b"x" * 100)
    layers = (layer(tmp_path / "top"), layer(tmp_path / "base", "raw"))
    return Disk(node="n", device="virtio0", read_only=False, layers=layers)


def disk(*names: str, **options: Any) -> Disk:
    layers = tuple(
        Layer(filename=name, format="qcow2", size=1, mtime_ns=1, inode=1)
        for name in names
    )
    return Disk(node="n", read_only=False, layers=layers, **options)


def test_documents_round_trip(chain: Disk) -> None:
    (again,) = disks.from_documents([chain.document()])
    assert again == chain
    assert chain.document()["mtime-ns"] == chain.layers[0].mtime_ns
    assert chain.document()["backing"][0]["format"] == "raw"
    assert disks.from_documents(None) == []


@pytest.mark.parametrize(
    "change",
    [
        {"filename": 1},
        {"filename": "a\0b"},
        {"filename": None},
        {"format": []},
        {"size": "1"},
        {"size": True},
        {"mode": "erase"},
        {"backing": {}},
        {"backing": [1]},
        {"backing": [{}]},
        {"backing": [{"filename": "x", "format": "raw"}] * 1000},
        {"kind": 3},
    ],
    ids=str,
)
def test_hostile_documents(chain: Disk, change: dict[str, object]) -> None:
    with pytest.raises(errors.Damaged, match="META"):
        disks.from_documents([chain.document() | change])


@pytest.mark.parametrize("documents", [{}, 1, "x", [1], [None]], ids=str)
def test_what_is_no_list_of_disks(documents: object) -> None:
    with pytest.raises(errors.Damaged):
        disks.from_documents(documents)


def test_a_disk_is_writable_unless_it_says_otherwise(chain: Disk) -> None:
    document = chain.document()
    for value in (None, 1, "yes"):
        (found,) = disks.from_documents([document | {"read-only": value}])
        assert not found.read_only


def test_unchanged(chain: Disk) -> None:
    assert disks.check_unchanged([chain]) == []


@pytest.mark.parametrize("name", ["top", "base"])
@pytest.mark.parametrize("change", ["size", "last write", "inode", "missing"])
def test_every_change_is_named(
    chain: Disk, tmp_path: Path, name: str, change: str
) -> None:
    path = tmp_path / name
    if change == "size":
        path.write_bytes(b"x" * 101)
    elif change == "last write":
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    elif change == "inode":
        shutil.copy2(path, tmp_path / "copy")
        (tmp_path / "copy").rename(path)
    else:
        path.unlink()
    with pytest.raises(errors.DisksChanged) as caught:
        disks.check_unchanged([chain])
    assert "virtio0" in caught.value.message
    assert str(path) in caught.value.message
    assert change in caught.value.message
    assert disks.check_unchanged(disks.with_mode([chain], "none")) == []


def test_what_cannot_be_compared_is_told() -> None:
    network = Disk(
        node="n",
        device="d",
        read_only=True,
        layers=(Layer(filename="nbd://host/x", format="raw"),),
    )
    (note,) = disks.check_unchanged([network])
    assert "nbd://host/x" in note
    assert disks.known_files([network]) == frozenset()


def test_only_proved_files_are_known(chain: Disk) -> None:
    names = {each.filename for each in chain.layers}
    assert disks.known_files([chain]) == names
    assert disks.known_files(disks.with_mode([chain], "none")) == frozenset()


def test_read_only_disks_need_no_overlay(chain: Disk) -> None:
    both = [chain, disk("/cd")]
    both[1] = Disk(node="c", read_only=True, layers=both[1].layers)
    assert [each.mode for each in disks.with_mode(both, "overlay")] == [
        "overlay",
        "check",
    ]
    assert disks.needs_choice(both) == [chain]


@pytest.mark.parametrize(
    ("options", "mode", "why"),
    [
        ({"kind": "temporary"}, "check", "-snapshot"),
        ({"kind": "descriptor"}, "check", "descriptor"),
        ({"kind": "network"}, "overlay", "not a local file"),
        ({"kind": "device"}, "overlay", "directory"),
        ({"encrypted": True}, "overlay", "encrypted"),
    ],
    ids=str,
)
def test_modes_that_a_disk_cannot_have(
    options: dict[str, Any], mode: str, why: str
) -> None:
    with pytest.raises(errors.DisksChoiceNeeded, match=why):
        disks.require_mode([disk("/a", **options)], mode)
    disks.require_mode([disk("/a", **options)], "none")


def test_disk_map_names_what_the_command_line_may_have() -> None:
    a = disk("/a.2", "/a.1", "/a", mode="overlay")
    assert disks.disk_map([a], {"/a.2": "/new"}) == {
        "/a.2": "/new",
        "/a.1": "/new",
        "/a": "/new",
    }
    # Not frozen: the guest ran on an overlay all the same.
    assert disks.disk_map([a], {}) == {"/a.1": "/a.2", "/a": "/a.2"}


def test_disk_map_leaves_shared_files_alone() -> None:
    a, b = disk("/a", "/golden"), disk("/b", "/golden")
    assert disks.disk_map([a, b], {"/a": "/x", "/b": "/y"}) == {"/a": "/x", "/b": "/y"}
    golden = disk("/golden")
    assert disks.disk_map([a, golden], {"/a": "/x"}) == {"/a": "/x"}


def test_hostile_names_and_formats_get_no_overlay(tmp_path: Path) -> None:
    for bad in (
        Disk(node="n", read_only=False, mode="overlay",
             layers=(Layer(filename="/x", format="raw,x=y"),)),
        Disk(node="n", read_only=False, mode="overlay",
             layers=(Layer(filename="nbd://h/x", format="raw"),)),
        Disk(node="n", read_only=False, mode="overlay",
             layers=(Layer(filename="json:{}", format="raw"),)),
    ):  # fmt: skip
        with pytest.raises(errors.PagesaverError):
            disks.restore_overlays([bad], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_qemu_img_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(errors.IoError, match="qemu-img"):
        disks.qemu_img("/nowhere/qemu-system-x86_64")
