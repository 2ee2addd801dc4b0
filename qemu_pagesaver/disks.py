# SPDX-License-Identifier: LGPL-2.1-or-later
"""The disks of a guest: what they are, frozen at a save, given back at a restore.

Memory is worth nothing beside a disk of another instant. So a save records each
file of each disk with a *stamp* (size, time of last write, inode); `check` means
that a restore compares them, `overlay` that the guest's writes go elsewhere from
the instant of the save on, so that what the snapshot refers to stays as it was.

At a save: :func:`inspect`, :func:`require_mode`, and for `overlay`
:func:`prepare_overlays` while the guest runs and :meth:`Overlays.switch` (one
transaction) while it is stopped, before `migrate`. At a restore:
:func:`check_unchanged`, :func:`restore_overlays`, :func:`disk_map`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import shutil
import stat
import subprocess
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from qemu_pagesaver import errors

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable, Mapping, Sequence

MODES = ("overlay", "check", "none")
OVERLAY_FORMAT = "qcow2"

# Formats that can be opened by name below an overlay without further options.
_PLAIN_FORMATS = frozenset(
    ("raw", "qcow2", "qcow", "qed", "vmdk", "vdi", "vpc", "vhdx", "parallels")
)
# A device may use a file's node without a format.
_FORMAT_OF_PROTOCOL = dict.fromkeys(("file", "host_device", "host_cdrom"), "raw")
# As QEMU's path_has_protocol(): a colon before any slash.
_PROTOCOL = re.compile(r"[^/:]*:")
_MAX_LAYERS = 256
_JOB_SECONDS = 300.0
_CHOICES_HINT = "Give --disks none to take care of the disks yourself."


class QmpLike(Protocol):
    """What is needed of :class:`qemu_pagesaver.qmp.Qmp`."""

    @property
    def peer_pid(self) -> int:
        """Process at the other end."""

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None
    ) -> Any:
        """Execute a command and return its value."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One file of a disk: its top, or one of its backing files.

    Attributes:
        filename: Absolute, or as QEMU names what is not a local file.
        format: QEMU's name of it (`raw`, `qcow2`, ..).
        size: Bytes; None where there is nothing to compare (network, device).
        mtime_ns: Time of the last write, likewise.
        inode: Likewise.
    """

    filename: str
    format: str
    size: int | None = None
    mtime_ns: int | None = None
    inode: int | None = None

    def document(self) -> dict[str, Any]:
        """Return it as META has it."""
        return {
            "filename": self.filename,
            "format": self.format,
            "size": self.size,
            "mtime-ns": self.mtime_ns,
            "inode": self.inode,
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Read it from META, which may be hostile."""
        return cls(
            filename=_text(document, "filename"),
            format=_text(document, "format"),
            size=_number(document, "size"),
            mtime_ns=_number(document, "mtime-ns"),
            inode=_number(document, "inode"),
        )


@dataclass(frozen=True, kw_only=True)
class Disk:
    """One disk with its medium, as an object of META's `disks`.

    Attributes:
        node: Node name of its top at the save (may be QEMU's own, `#block1`).
        device: Its `-drive` id; empty for `-blockdev`.
        qdev: Id or QOM path of the device that has it.
        read_only: The guest cannot write to it.
        kind: `file`, `device` (a host's block device), `network`, `temporary` (a
            file that QEMU has open and that has no name: `-snapshot`) or
            `descriptor` (passed to QEMU by its parent).
        mode: What a restore does: one of MODES.
        virtual_size: Bytes that the guest sees.
        encrypted: QEMU decrypts it.
        direct: QEMU bypasses the host's page cache (`cache=none`).
        no_flush: QEMU ignores flushes (`cache=unsafe`).
        layers: Its files, the top first.
    """

    node: str
    device: str = ""
    qdev: str = ""
    read_only: bool
    kind: str = "file"
    mode: str = "check"
    virtual_size: int = 0
    encrypted: bool = False
    direct: bool = False
    no_flush: bool = False
    layers: tuple[Layer, ...]

    @property
    def filename(self) -> str:
        """The file at the top."""
        return self.layers[0].filename

    @property
    def format(self) -> str:
        """The format of the file at the top."""
        return self.layers[0].format

    @property
    def name(self) -> str:
        """The name of the disk in a sentence."""
        label = self.device or self.qdev or self.node
        return f"{label} ({self.filename})"

    def document(self) -> dict[str, Any]:
        """Return it as META has it."""
        return {
            "node": self.node,
            "device": self.device,
            "qdev": self.qdev,
            **self.layers[0].document(),
            "read-only": self.read_only,
            "kind": self.kind,
            "mode": self.mode,
            "backing": [layer.document() for layer in self.layers[1:]],
        }

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self:
        """Read it from META, which may be hostile.

        Raises:
            Damaged: It is no object of `disks`.
        """
        if not isinstance(document, dict):
            raise errors.Damaged("META: an entry of disks is no object")
        backing = document.get("backing", [])
        if not isinstance(backing, list) or len(backing) > _MAX_LAYERS:
            raise errors.Damaged("META: backing of a disk is no list")
        layers = [document, *backing]
        if not all(isinstance(layer, dict) for layer in layers):
            raise errors.Damaged("META: backing of a disk has what is no object")
        mode = _text(document, "mode", "check")
        if mode not in MODES:
            raise errors.Damaged(f"META: mode {mode!r} of a disk is not known")
        return cls(
            node=_text(document, "node", ""),
            device=_text(document, "device", ""),
            qdev=_text(document, "qdev", ""),
            # Whatever is not clearly read-only is protected as a writable disk.
            read_only=document.get("read-only") is True,
            kind=_text(document, "kind", "file"),
            mode=mode,
            layers=tuple(Layer.from_document(layer) for layer in layers),
        )


def from_documents(documents: object) -> list[Disk]:
    """Read META's `disks`; None or absent: no disks."""
    if documents is None:
        return []
    if not isinstance(documents, list | tuple):
        raise errors.Damaged("META: disks is no list")
    return [Disk.from_document(document) for document in documents]


def _text(document: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = document.get(key, default)
    if not isinstance(value, str) or "\0" in value or len(value) > 1 << 16:
        raise errors.Damaged(f"META: {key} of a disk is no usable text")
    return value


def _number(document: Mapping[str, Any], key: str) -> int | None:
    value = document.get(key)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise errors.Damaged(f"META: {key} of a disk is no number")
    return value


# ---------------------------------------------------------------- at the save


async def inspect(qmp: QmpLike, *, pid: int | None = None) -> list[Disk]:
    """Return every disk that has a medium, with its files and their stamps.

    Args:
        qmp: Connection to QEMU.
        pid: QEMU's process where a manager owns the socket.

    Raises:
        DisksChanged: QEMU has another file open than the one of that name.
    """
    reply = await qmp.execute("query-block")
    process = qmp.peer_pid if pid is None else pid
    directory = _working_directory(process)
    opened = _open_files(process)
    return [
        _stamped(_disk(entry, directory), opened)
        for entry in reply
        if entry.get("inserted")
    ]


def restamp(disks: Iterable[Disk]) -> list[Disk]:
    """Return the disks with the stamps that their files have now.

    A stamp holds once QEMU writes no more: after :meth:`Overlays.switch`, or when a
    migration has completed and the guest was not continued.
    """
    return [_stamped(disk, None) for disk in disks]


def needs_choice(disks: Iterable[Disk]) -> list[Disk]:
    """Return the disks that a guest that goes on would write to."""
    return [disk for disk in disks if not disk.read_only]


def with_mode(disks: Iterable[Disk], mode: str) -> list[Disk]:
    """Return the disks with another mode; a read-only one needs no overlay."""
    return [
        replace(disk, mode="check" if mode == "overlay" and disk.read_only else mode)
        for disk in disks
    ]


def require_mode(
    disks: Iterable[Disk], mode: str, *, directory: str | os.PathLike[str] | None = None
) -> None:
    """Raise unless every writable disk can be saved in that way.

    Raises:
        DisksChoiceNeeded: Names the disk and why.
    """
    if mode == "none":
        return
    for disk in needs_choice(disks):
        why = ""
        if disk.kind == "temporary":
            why = "is a temporary file (-snapshot) that ends with QEMU"
        elif disk.kind == "descriptor":
            why = "was passed to QEMU as an open descriptor and has no name"
        elif mode == "check":
            continue
        elif disk.kind == "network":
            why = "is not a local file; --disks overlay cannot put one over it"
        elif disk.encrypted:
            why = "is encrypted; an overlay would hold its content in clear"
        elif disk.format not in _PLAIN_FORMATS:
            why = f"has {disk.format} on top, which an overlay would be put over"
        elif disk.kind == "device" and directory is None:
            why = "is a device: name a directory for its overlay"
        if why:
            raise errors.DisksChoiceNeeded(
                f"disk {disk.name} {why}", hint=_CHOICES_HINT
            )


@dataclass(frozen=True, kw_only=True)
class Overlay:
    """An overlay over one disk of a running guest."""

    disk: Disk
    filename: str
    node: str

    @property
    def file_node(self) -> str:
        """Node name of the file below the overlay's format."""
        return self.node + "-f"


class Overlays:
    """Overlays over all writable disks of a guest; see :func:`prepare_overlays`.

    Attributes:
        made: One for each writable disk.
        switched: The guest writes to them.
    """

    def __init__(self, qmp: QmpLike) -> None:
        """Begin with none; see :func:`prepare_overlays`."""
        self._qmp = qmp
        self.made: tuple[Overlay, ...] = ()
        self.switched = False

    async def switch(self) -> None:
        """Let the guest write to the overlays: one transaction, all or none.

        The guest should be stopped, and `migrate` not yet have begun: afterwards
        QEMU has given its disks away.
        """
        if self.made:
            await self._qmp.execute(
                "transaction",
                {
                    "actions": [
                        {
                            "type": "blockdev-snapshot",
                            "data": {"node": made.disk.node, "overlay": made.node},
                        }
                        for made in self.made
                    ]
                },
            )
        self.switched = True

    def frozen(self, disks: Iterable[Disk]) -> list[Disk]:
        """Return all disks as META is to record them: stamped, with their mode."""
        return restamp(with_mode(disks, "overlay"))

    async def undo(self) -> tuple[str, ...]:
        """Take everything back: what the guest has written goes into its disks.

        QEMU must own its disks: before 10.0 it refuses between the end of a migration
        and `cont`. Called again this goes on where it stopped.

        Returns:
            Files of overlays that could not be removed; they are no longer used.
        """
        left = []
        while self.made:
            made = self.made[-1]
            if self.switched:
                await self._commit(made)
            for node in (made.node, made.file_node):
                # Absent where it was never added.
                with contextlib.suppress(errors.QemuRefused):
                    await self._qmp.execute("blockdev-del", {"node-name": node})
            self.made = self.made[:-1]
            if not _removed(made.filename):
                left.append(made.filename)
        self.switched = False
        return tuple(left)

    async def _add(self, overlay: Overlay) -> None:
        disk = overlay.disk
        self.made = (*self.made, overlay)
        await _create(
            self._qmp, {"driver": "file", "filename": overlay.filename, "size": 0}
        )
        cache = {"direct": disk.direct, "no-flush": disk.no_flush}
        await self._qmp.execute(
            "blockdev-add",
            {
                "driver": "file",
                "node-name": overlay.file_node,
                "filename": overlay.filename,
                "cache": cache,
                "discard": "unmap",
            },
        )
        await _create(
            self._qmp,
            {
                "driver": OVERLAY_FORMAT,
                "file": overlay.file_node,
                "size": disk.virtual_size,
                "backing-file": disk.filename,
                "backing-fmt": disk.format,
            },
        )
        await self._qmp.execute(
            "blockdev-add",
            {
                "driver": OVERLAY_FORMAT,
                "node-name": overlay.node,
                "file": overlay.file_node,
                "backing": None,
                "cache": cache,
                "discard": "unmap",
            },
        )

    async def _commit(self, overlay: Overlay) -> None:
        """Write an overlay back into its disk and let the guest use that again."""
        job = f"{overlay.node}-commit"
        arguments = {
            "job-id": job,
            "device": overlay.node,
            "base-node": overlay.disk.node,
            "auto-dismiss": False,
        }
        try:
            await self._qmp.execute("block-commit", arguments)
        except errors.QemuRefused as error:
            # After a migration QEMU has given its disks away until `cont`; since
            # 10.0 it can be told to take them back.
            try:
                await self._qmp.execute("blockdev-set-active", {"active": True})
            except errors.QemuRefused:
                raise error from None
            await self._qmp.execute("block-commit", arguments)
        await _wait_for_job(self._qmp, job)


async def prepare_overlays(
    qmp: QmpLike,
    disks: Iterable[Disk],
    *,
    directory: str | os.PathLike[str] | None = None,
) -> Overlays:
    """Make an overlay for every writable disk, while the guest goes on unchanged.

    Nothing changes for the guest until :meth:`Overlays.switch`.

    Args:
        qmp: Connection to QEMU.
        disks: As :func:`inspect` returned them.
        directory: Where the overlays go; None: beside each disk. QEMU makes them,
            so its user must be able to write there.

    Raises:
        DisksChoiceNeeded: A disk cannot have one.
        QemuRefused: QEMU could not make one; nothing is left behind.
    """
    writable = needs_choice(disks)
    require_mode(writable, "overlay", directory=directory)
    overlays = Overlays(qmp)
    try:
        for disk in writable:
            token = secrets.token_hex(4)
            overlay = Overlay(
                disk=disk,
                filename=str(_overlay_path(disk, directory, token)),
                node=f"pagesaver-{token}",
            )
            await overlays._add(overlay)
    except BaseException:
        await _finish(overlays.undo())
        raise
    return overlays


async def make_overlays(
    qmp: QmpLike,
    disks: Iterable[Disk],
    *,
    directory: str | os.PathLike[str] | None = None,
) -> Overlays:
    """Prepare overlays and switch to them; see :func:`prepare_overlays`."""
    overlays = await prepare_overlays(qmp, disks, directory=directory)
    try:
        await overlays.switch()
    except BaseException:
        await _finish(overlays.undo())
        raise
    return overlays


def _removed(name: str) -> bool:
    try:
        Path(name).unlink(missing_ok=True)
    except OSError:
        return False
    return True


async def _finish(work: Coroutine[object, object, object]) -> None:
    """Await cleaning up to its end, also when the task is cancelled again."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait({task})
    # The first failure is what the user is told; this one would hide it.
    task.exception()


async def _create(qmp: QmpLike, options: Mapping[str, object]) -> None:
    job = f"pagesaver-{secrets.token_hex(4)}"
    await qmp.execute("blockdev-create", {"job-id": job, "options": options})
    await _wait_for_job(qmp, job)


async def _wait_for_job(qmp: QmpLike, job: str) -> None:
    """Wait until a job that is not dismissed by itself has done its work."""
    pause = 0.001
    deadline = asyncio.get_running_loop().time() + _JOB_SECONDS
    completing = False
    while True:
        jobs = await qmp.execute("query-jobs")
        state = next((entry for entry in jobs if entry["id"] == job), None)
        if state is None:
            return
        if state["status"] == "concluded":
            await qmp.execute("job-dismiss", {"id": job})
            if "error" in state:
                raise errors.QemuRefused(f"QEMU's {state['type']}: {state['error']}")
            return
        if state["status"] == "ready" and not completing:
            await qmp.execute("job-complete", {"id": job})
            completing = True
        if asyncio.get_running_loop().time() > deadline:
            raise errors.QemuTimeout(f"QEMU's {state['type']} does not end")
        await asyncio.sleep(pause)
        pause = min(2 * pause, 0.1)


def _disk(entry: Mapping[str, Any], directory: str | None) -> Disk:
    """Turn one entry of query-block into a Disk without stamps."""
    inserted = entry["inserted"]
    image = inserted["image"]
    cache = inserted.get("cache", {})
    layers: list[Layer] = []
    node = image
    while node and len(layers) < _MAX_LAYERS:
        layers.append(
            Layer(
                filename=_absolute(_file_of(node["filename"]), directory),
                format=_FORMAT_OF_PROTOCOL.get(node["format"], node["format"]),
            )
        )
        node = node.get("backing-image")
    return Disk(
        node=inserted["node-name"],
        device=entry.get("device", ""),
        qdev=entry.get("qdev", ""),
        read_only=inserted["ro"],
        kind=_kind(layers[0].filename),
        virtual_size=image["virtual-size"],
        encrypted=inserted.get("encrypted", False),
        direct=cache.get("direct", False),
        no_flush=cache.get("no-flush", False),
        layers=tuple(layers),
    )


def _file_of(name: str) -> str:
    """Return the file that QEMU's name of a node means, if it is a local file.

    QEMU names a node in JSON when a plain name would not say all.
    """
    if not name.startswith("json:"):
        return name.removeprefix("file:")
    try:
        node = json.loads(name.removeprefix("json:"))
    except (ValueError, RecursionError):
        return name
    while isinstance(node, dict) and isinstance(node.get("file"), dict):
        node = node["file"]
    if isinstance(node, dict) and isinstance(node.get("filename"), str):
        return str(node["filename"]).removeprefix("file:")
    return name


def _absolute(name: str, directory: str | None) -> str:
    if name.startswith("/") or _PROTOCOL.match(name):
        return name
    if directory is None:
        raise errors.IoError(
            f"disk {name}: its name is relative to QEMU's working directory, which "
            "cannot be read",
            hint="Run as the user of QEMU, or start QEMU with absolute names.",
        )
    return os.path.normpath(Path(directory) / name)


def _kind(filename: str) -> str:
    if filename.startswith("/dev/fdset/"):
        return "descriptor"
    return "file" if filename.startswith("/") else "network"


def _stamped(disk: Disk, opened: set[tuple[int, int]] | None) -> Disk:
    """Return a disk with the stamps of its files, and the kind that they have."""
    if disk.kind in ("network", "descriptor"):
        return disk
    kind = disk.kind
    layers: list[Layer] = []
    for number, layer in enumerate(disk.layers):
        if not layer.filename.startswith("/"):
            layers.append(layer)
            continue
        try:
            found = Path(layer.filename).stat()
        except OSError as error:
            if number == 0:
                kind = "temporary"
                layers.append(layer)
                continue
            raise errors.DisksChanged(
                f"disk {disk.name}: {layer.filename}: {error.strerror}"
            ) from error
        if stat.S_ISREG(found.st_mode):
            if opened is not None and (found.st_dev, found.st_ino) not in opened:
                raise errors.DisksChanged(
                    f"disk {disk.name}: QEMU has another file open than the one that "
                    f"is called {layer.filename} now",
                    hint=_CHOICES_HINT,
                )
            layers.append(
                replace(
                    layer,
                    size=found.st_size,
                    mtime_ns=found.st_mtime_ns,
                    inode=found.st_ino,
                )
            )
        else:
            kind = "device" if number == 0 else kind
            layers.append(layer)
    return replace(disk, kind=kind, layers=tuple(layers))


def _working_directory(pid: int) -> str | None:
    try:
        return str(Path(f"/proc/{pid}/cwd").readlink())
    except OSError:
        return None


def _open_files(pid: int) -> set[tuple[int, int]] | None:
    """Return device and inode of what a process has open; None: not allowed."""
    found = set()
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                status = link.stat()
                found.add((status.st_dev, status.st_ino))
    except OSError:
        return None
    return found


# ------------------------------------------------------------- at the restore


def check_unchanged(disks: Iterable[Disk]) -> list[str]:
    """Compare every file of every disk with its stamp.

    Returns:
        One sentence for each disk that has nothing to compare.

    Raises:
        DisksChanged: Names every disk that differs, and in what.
    """
    notes = []
    changes = []
    for disk in disks:
        if disk.mode == "none":
            continue
        for layer in disk.layers:
            if layer.size is None or layer.mtime_ns is None or layer.inode is None:
                notes.append(
                    f"disk {disk.name}: {layer.filename} is no local file; it was "
                    "not checked for changes"
                )
                continue
            change = _change(layer)
            if change:
                changes.append(f"disk {disk.name}: {change}")
    if changes:
        raise errors.DisksChanged(
            "; ".join(changes),
            hint="Put back the files that the disks had at the save.",
        )
    return notes


def _change(layer: Layer) -> str:
    try:
        found = Path(layer.filename).stat()
    except FileNotFoundError:
        return f"{layer.filename} is missing"
    except OSError as error:
        return f"{layer.filename}: {error.strerror}"
    for what, then, now in (
        ("size", layer.size, found.st_size),
        ("time of last write (ns)", layer.mtime_ns, found.st_mtime_ns),
        ("inode", layer.inode, found.st_ino),
    ):
        if then != now:
            return f"{layer.filename} has changed: its {what} was {then} and is {now}"
    return ""


def restore_overlays(
    disks: Iterable[Disk],
    directory: str | os.PathLike[str],
    *,
    qemu: str | os.PathLike[str] | None = None,
) -> dict[str, str]:
    """Make a new overlay over each writable disk that was frozen at the save.

    The frozen files are not written to. Disks of other modes, and those that the
    guest only reads, are used as they are.

    Args:
        disks: As recorded; :func:`check_unchanged` has accepted them.
        directory: Where the overlays go.
        qemu: The QEMU binary; the `qemu-img` beside it is preferred.

    Returns:
        Frozen file -> overlay: all the files that were made.

    Raises:
        HostError: One could not be made; none is left behind.
    """
    made: dict[str, str] = {}
    try:
        for disk in disks:
            if disk.mode == "overlay" and not disk.read_only:
                path = _overlay_path(disk, directory, secrets.token_hex(4))
                made[disk.filename] = str(path)
                _qemu_img_create(disk, path, qemu_img(qemu))
    except BaseException:
        for name in made.values():
            Path(name).unlink(missing_ok=True)
        raise
    return made


def disk_map(disks: Sequence[Disk], overlays: Mapping[str, str]) -> dict[str, str]:
    """Return which file is to take the place of which on the command line.

    A guest that was saved before runs on an overlay, while its command line still
    names what lies below: that name stands for the disk too, unless it is the
    top of a disk itself or lies below two of them.

    Args:
        disks: As recorded.
        overlays: What :func:`restore_overlays` returned.
    """
    tops = {disk.filename for disk in disks}
    below = Counter(layer.filename for disk in disks for layer in disk.layers[1:])
    result = dict(overlays)
    for disk in disks:
        target = overlays.get(disk.filename, disk.filename)
        is_overlay = target != disk.filename or disk.format == OVERLAY_FORMAT
        for layer in disk.layers[1:]:
            name = layer.filename
            if is_overlay and name not in tops and below[name] == 1:
                result[name] = target
    return result


def known_files(disks: Iterable[Disk]) -> frozenset[str]:
    """Return the files that the recorded command line may open without --trust.

    Only those whose stamps a restore compares: an attacker can write any name
    into a snapshot, but not know size, time and inode of a file of the victim.
    """
    return frozenset(
        layer.filename
        for disk in disks
        if disk.mode != "none"
        for layer in disk.layers
        if layer.size is not None
        and layer.mtime_ns is not None
        and layer.inode is not None
    )


def qemu_img(qemu: str | os.PathLike[str] | None = None) -> str:
    """Return the path of `qemu-img`: the one beside ``qemu``, or that of PATH."""
    if qemu is not None:
        beside = Path(qemu).parent / "qemu-img"
        if "/" in os.fspath(qemu) and os.access(beside, os.X_OK):
            return str(beside)
    found = shutil.which("qemu-img")
    if found is None:
        raise errors.IoError(
            "qemu-img is not there, neither beside QEMU nor in PATH",
            hint="Install it (Debian: qemu-utils); overlays are made with it.",
        )
    return found


def _qemu_img_create(disk: Disk, path: Path, program: str) -> None:
    if disk.format not in _PLAIN_FORMATS or not disk.filename.startswith("/"):
        raise errors.CommandLineRefused(
            f"disk {disk.name}: no overlay can be put over format {disk.format!r}"
        )
    arguments = [program, "create", "-q", "-f", OVERLAY_FORMAT]
    arguments += ["-b", disk.filename, "-F", disk.format, "--", str(path)]
    if path.exists():
        raise errors.TargetExists(f"make overlay {path}: it exists")
    try:
        done = subprocess.run(
            arguments, capture_output=True, text=True, timeout=60, check=False
        )
    except OSError as error:
        raise errors.from_os_error(error, f"make overlay {path} with") from error
    except subprocess.TimeoutExpired as error:
        raise errors.IoError(f"make overlay {path}: qemu-img hangs") from error
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        reason = lines[-1] if lines else f"qemu-img ended with {done.returncode}"
        kind = errors.DiskFull if "No space left" in reason else errors.IoError
        raise kind(f"make overlay {path}: {reason}")


def _overlay_path(
    disk: Disk, directory: str | os.PathLike[str] | None, token: str
) -> Path:
    base = Path(disk.filename)
    place = base.parent if directory is None else Path(directory).absolute()
    # Not longer than a name may be, and the token that saves before added goes.
    stem = re.sub(r"\.[0-9a-f]{8}$", "", base.stem)[:200]
    return place / f"{stem}.{token}.{OVERLAY_FORMAT}"
