# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one exception tree: each class owns its stable id and its exit code.

    PagesaverError                      10  error
    +-- UsageError                       2  usage
    +-- SnapshotError
    |   +-- NotASnapshot                11  not-a-snapshot
    |   +-- Truncated                   12  truncated
    |   +-- Damaged                     13  damaged
    |   +-- FormatVersionTooNew         14  format-version
    |   +-- UnknownFeature              15  unknown-feature
    |   +-- StreamUnsupported           16  stream-unsupported
    +-- QemuError
    |   +-- QmpUnreachable              20  qmp-unreachable
    |   +-- QemuRefused                 21  qemu-refused
    |   +-- QemuDied                    22  qemu-died
    |   +-- QemuTimeout                 23  qemu-timeout
    |   +-- PeerNonsense                24  peer-nonsense
    |   +-- MigrationFailed             25  migration-failed
    +-- HostError
    |   +-- IoError                     30  io
    |   +-- DiskFull                    31  disk-full
    |   +-- TargetExists                32  target-exists
    |   +-- OutOfMemory                 33  out-of-memory
    +-- MismatchError
    |   +-- MachineMismatch             40  machine-mismatch
    |   +-- DisksChanged                41  disks-changed
    |   +-- UserfaultfdForbidden        42  userfaultfd-forbidden
    |   +-- NeedsTrust                  43  needs-trust
    |   +-- DisksChoiceNeeded           44  disks-choice-needed
    |   +-- CommandLineRefused          45  command-line-refused
    +-- GuestBusy                       50  guest-busy
    +-- NoPager                         51  no-pager
    +-- Interrupted                    130  interrupted

A message is one sentence: what failed and where. ``hint`` says what to do.
Exit codes 1 (the answer is no) and 0 are results and no exceptions.
"""

from __future__ import annotations

import errno


class PagesaverError(Exception):
    """Base of all errors of this package.

    Args:
        message: One sentence that names what failed and where.
        hint: What the user can do about it; may be empty.
    """

    id = "error"
    exit_code = 10
    default_hint = ""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint or self.default_hint

    def document(self) -> dict[str, str]:
        """Return the error as the document of ``--json``."""
        return {"error": self.id, "message": self.message, "hint": self.hint}


class UsageError(PagesaverError):
    """The command or the call was used wrongly."""

    id = "usage"
    exit_code = 2


class SnapshotError(PagesaverError):
    """A snapshot or stream cannot be used."""


class NotASnapshot(SnapshotError):
    """The file is neither a snapshot nor a stream."""

    id = "not-a-snapshot"
    exit_code = 11


class Truncated(SnapshotError):
    """The file or stream ends too early."""

    id = "truncated"
    exit_code = 12
    default_hint = "Use a whole copy of the file."


class Damaged(SnapshotError):
    """A checksum, a bound or a reference is wrong."""

    id = "damaged"
    exit_code = 13
    default_hint = "Use another copy of the file; `check` lists all damage."


class FormatVersionTooNew(SnapshotError):
    """The file was written in a newer format."""

    id = "format-version"
    exit_code = 14
    default_hint = "Use a newer qemu-pagesaver."


class UnknownFeature(SnapshotError):
    """The file needs a feature that this version does not know."""

    id = "unknown-feature"
    exit_code = 15
    default_hint = "Use a newer qemu-pagesaver."


class StreamUnsupported(SnapshotError):
    """A valid QEMU stream with something that cannot be honoured."""

    id = "stream-unsupported"
    exit_code = 16


class QemuError(PagesaverError):
    """Something went wrong between us and QEMU."""


class QmpUnreachable(QemuError):
    """The QMP socket is absent, stale, or somebody else uses it."""

    id = "qmp-unreachable"
    exit_code = 20


class QemuRefused(QemuError):
    """QEMU answered a command with an error."""

    id = "qemu-refused"
    exit_code = 21


class QemuDied(QemuError):
    """QEMU ended or closed a connection that it should have kept."""

    id = "qemu-died"
    exit_code = 22


class QemuTimeout(QemuError):
    """QEMU did not answer in time."""

    id = "qemu-timeout"
    exit_code = 23


class PeerNonsense(QemuError):
    """The other end sent what no QEMU sends."""

    id = "peer-nonsense"
    exit_code = 24


class MigrationFailed(QemuError):
    """QEMU gave a migration up."""

    id = "migration-failed"
    exit_code = 25


class HostError(PagesaverError):
    """The host could not do its part."""


class IoError(HostError):
    """A file could not be read or written."""

    id = "io"
    exit_code = 30


class DiskFull(HostError):
    """No space is left on the device, or a quota or limit is reached."""

    id = "disk-full"
    exit_code = 31
    default_hint = "Free space there, or name another place."


class TargetExists(HostError):
    """The file to be written exists."""

    id = "target-exists"
    exit_code = 32
    default_hint = "Give another name, or remove the file first."


class OutOfMemory(HostError):
    """The host has not enough memory."""

    id = "out-of-memory"
    exit_code = 33


class MismatchError(PagesaverError):
    """What is there is not what the snapshot needs."""


class MachineMismatch(MismatchError):
    """Machine type, RAM blocks or page sizes differ from the snapshot's."""

    id = "machine-mismatch"
    exit_code = 40


class DisksChanged(MismatchError):
    """A disk is missing or not what it was at the save."""

    id = "disks-changed"
    exit_code = 41


class UserfaultfdForbidden(MismatchError):
    """This host does not let QEMU use userfaultfd."""

    id = "userfaultfd-forbidden"
    exit_code = 42
    default_hint = (
        "Allow it with `sysctl vm.unprivileged_userfaultfd=1` or give QEMU's user "
        "access to /dev/userfaultfd; `qemu-pagesaver host-validate` shows more."
    )


class NeedsTrust(MismatchError):
    """The recorded command line would run code or open further files."""

    id = "needs-trust"
    exit_code = 43
    default_hint = "Read it with `info --command-line`, then give --trust."


class DisksChoiceNeeded(MismatchError):
    """A guest with writable disks goes on: what is to become of them?"""

    id = "disks-choice-needed"
    exit_code = 44


class CommandLineRefused(MismatchError):
    """The recorded command line cannot be started again."""

    id = "command-line-refused"
    exit_code = 45
    default_hint = "Give the whole command line after `--`."


class GuestBusy(PagesaverError):
    """Another pager or migration has the guest."""

    id = "guest-busy"
    exit_code = 50


class NoPager(PagesaverError):
    """No running pager has that name."""

    id = "no-pager"
    exit_code = 51


class Interrupted(PagesaverError):
    """The user interrupted; everything is as it was found."""

    id = "interrupted"
    exit_code = 130


def from_os_error(error: OSError, doing: str) -> HostError:
    """Turn an OSError into a HostError whose sentence says what was done."""
    reason = error.strerror or str(error)
    where = f" {error.filename}" if error.filename else ""
    kind = class_for_errno(error.errno or 0)
    return kind(f"{doing}{where}: {reason}")


def class_for_errno(number: int) -> type[HostError]:
    """Return the class of HostError that an errno value belongs to."""
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskFull
    if number == errno.EEXIST:
        return TargetExists
    if number == errno.ENOMEM:
        return OutOfMemory
    return IoError
