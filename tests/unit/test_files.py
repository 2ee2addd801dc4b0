# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from qemu_pagesaver import errors, files
from qemu_pagesaver.files import AtomicFile

KINDS = pytest.mark.parametrize("named", [False, True], ids=["nameless", "named"])


@pytest.fixture
def kind(monkeypatch: pytest.MonkeyPatch, *, named: bool) -> None:
    """With NAMED, a file system that knows no O_TMPFILE."""
    real = os.open

    def refuse(path: str, flags: int, *args: int, **more: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, *args, **more)

    if named:
        monkeypatch.setattr(os, "open", refuse)


@KINDS
@pytest.mark.usefixtures("kind")
def test_it_has_its_name_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with AtomicFile(target) as new:
        os.write(new.fd, b"whole")
        assert not target.exists()
        new.sync()
        new.commit()
    assert target.read_bytes() == b"whole"
    assert target.stat().st_mode & 0o7777 == 0o600
    assert list(tmp_path.iterdir()) == [target]


@KINDS
@pytest.mark.usefixtures("kind")
def test_nothing_is_left_without_commit(tmp_path: Path) -> None:
    def interrupted() -> None:
        with AtomicFile(tmp_path / "target") as new:
            os.write(new.fd, b"part")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    before = len(list(Path("/proc/self/fd").iterdir()))
    AtomicFile(tmp_path / "target").discard()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@KINDS
@pytest.mark.usefixtures("kind")
def test_an_existing_file_is_never_replaced(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with AtomicFile(target) as new:
        os.write(new.fd, b"new")
        target.write_bytes(b"old")  # meanwhile, by somebody else
        with pytest.raises(errors.TargetExists, match="target"):
            new.commit()
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]
    with pytest.raises(errors.TargetExists):
        AtomicFile(target)
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(errors.TargetExists):
        AtomicFile(tmp_path / "dangling")


@KINDS
@pytest.mark.usefixtures("kind")
def test_long_names(tmp_path: Path) -> None:
    with AtomicFile(tmp_path / ("x" * 255)) as new:
        new.commit()
    assert len(list(tmp_path.iterdir())) == 1


def test_what_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "no" / "target", tmp_path / "file" / "target", Path("/")):
        with pytest.raises(errors.IoError):
            AtomicFile(path)
    with pytest.raises(errors.IoError):
        AtomicFile("/proc/target")
    with pytest.raises(errors.IoError):
        AtomicFile("")


@KINDS
@pytest.mark.usefixtures("kind")
def test_spool_files_have_no_name(tmp_path: Path) -> None:
    with files.spool_file(tmp_path) as fd:
        os.write(fd, b"spooled")
        assert os.pread(fd, 7, 0) == b"spooled"
        assert os.fstat(fd).st_nlink == 0
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(fd)


def test_spool_directories_are_checked(tmp_path: Path) -> None:
    beside = tmp_path / "target"
    assert files.spool_directory(None, beside=beside, need=1) == tmp_path
    assert files.spool_directory("/var/tmp", beside=beside, need=0) == Path("/var/tmp")
    with pytest.raises(errors.DiskFull, match=str(tmp_path)) as full:
        files.spool_directory(None, beside=beside, need=1 << 62)
    assert "--spool-dir" in full.value.hint
    with pytest.raises(errors.IoError):
        files.spool_directory(tmp_path / "no", beside=beside, need=0)
    with pytest.raises(errors.IoError), files.spool_file(tmp_path / "no"):
        pass


def test_file_systems() -> None:
    assert files.file_system("/proc") == "proc"
    assert files.is_memory("/dev/shm")
    assert not files.is_memory("/proc")
