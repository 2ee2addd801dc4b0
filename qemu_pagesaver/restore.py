# SPDX-License-Identifier: LGPL-2.1-or-later
"""Restore: a snapshot file becomes a running guest, before its memory is read.

QEMU gets the device state and runs; its memory comes when it is touched, and what
nobody touches in the background. What would fail is looked for before anything
starts. Until the guest runs, whatever fails or is interrupted leaves nothing
behind; afterwards the guest is never lost: it waits, and `recover` goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from qemu_pagesaver import (
    command_line,
    control,
    delivery,
    errors,
    placement,
    postcopy,
)
from qemu_pagesaver import (
    disks as disk_state,
)
from qemu_pagesaver import (
    guest as guest_state,
)
from qemu_pagesaver.delivery import (
    Delivery,
    DeliveryOptions,
    Job,
    Link,
    RestoreResult,
)
from qemu_pagesaver.guest import Guest
from qemu_pagesaver.migration import query_capabilities
from qemu_pagesaver.native import PAGE_SIZE, Section
from qemu_pagesaver.option_string import OptionString
from qemu_pagesaver.report import Report, Silent
from qemu_pagesaver.snapshot import Snapshot

if TYPE_CHECKING:
    from qemu_pagesaver.guest import HostBlock

__all__ = [
    "Delivery",
    "Detached",
    "RestoreOptions",
    "RestoreResult",
    "Target",
    "restore",
    "restore_async",
    "restore_detached",
]

_SNAPSHOT_SUFFIX = ".psnap"
_QMP = "qmp"
_SOCKET_FREE_TIMEOUT = 1.0
_SOCKET_FREE_POLL = 0.05


@dataclass(frozen=True, kw_only=True)
class Target:
    """Which QEMU gets the guest.

    Attributes:
        attach: QMP socket of one that the user started with ``-incoming defer``.
        qmp: Socket on which a QEMU started by us is to have its QMP.
        qemu: Binary to be started, instead of the recorded one.
        args: Whole command line, instead of the recorded one.
        paused: The guest stands still, however it was saved.
        trust: The recorded command line may run code and open further files.
        disk_dir: Where overlays over frozen disks go.
        socket_dir: Where QEMU is to listen for its migration; a directory that
            QEMU's user may write to.
        hostfwd: Forwarded ports (as of ``-netdev user``) instead of the recorded
            ones, whose host side would otherwise be any free port.
    """

    attach: str | None = None
    qmp: str | None = None
    qemu: str | None = None
    args: tuple[str, ...] | None = None
    paused: bool = False
    trust: bool = False
    disk_dir: str | None = None
    socket_dir: str | None = None
    hostfwd: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Check that the values go together.

        Raises:
            UsageError: They do not.
        """
        starts = self.qmp or self.qemu or self.args or self.hostfwd
        if self.attach is not None and starts:
            raise errors.UsageError(
                "--attach uses a QEMU that runs; --qmp, --qemu, --hostfwd and `--` "
                "start one"
            )
        if self.args is not None and self.hostfwd:
            raise errors.UsageError("say forwarded ports in the command line itself")
        if self.args is not None and self.qemu:
            raise errors.UsageError("--qemu and a command line exclude each other")


class RestoreOptions(DeliveryOptions, total=False):
    """Options of :func:`restore`: the fields of :class:`Target` and of ``Delivery``."""

    qmp: str | None
    qemu: str | None
    args: Sequence[str] | None
    attach: str | None
    paused: bool
    trust: bool
    disk_dir: str | None
    socket_dir: str | None
    hostfwd: Sequence[str] | None


def restore(
    file: str | os.PathLike[str],
    *,
    report: Report | None = None,
    **options: Unpack[RestoreOptions],
) -> RestoreResult:
    """Synchronous :func:`restore_async`; the first Ctrl-C loads the rest."""
    return asyncio.run(restore_async(file, report=report, **options))


async def restore_async(
    file: str | os.PathLike[str],
    *,
    report: Report | None = None,
    **options: Unpack[RestoreOptions],
) -> RestoreResult:
    """Restore a guest and stay until all of it is loaded, or QEMU ends.

    Options are the fields of :class:`Target` and :class:`Delivery`. ``report`` gets
    the events ``started``, ``running``, ``progress`` and ``complete``.

    Raises:
        SnapshotError: The file is none, or is damaged.
        MismatchError: Machine, memory, disks or rights do not fit.
        QemuError: QEMU refused, died or did not answer.
    """
    given: dict[str, Any] = dict(options)
    for name in ("args", "hostfwd"):
        if given.get(name) is not None:
            given[name] = tuple(given[name])
    which = {f.name: given.pop(f.name) for f in fields(Target) if f.name in given}
    return await _restore(file, Target(**which), Delivery(**given), report or Silent())


async def _restore(
    file: str | os.PathLike[str], target: Target, options: Delivery, report: Report
) -> RestoreResult:
    started = time.monotonic()
    with Snapshot.open(file) as snapshot, delivery.trace_file(options) as trace:
        report.event("started", snapshot=str(snapshot.path), uuid=snapshot.uuid)
        package = _check_snapshot(snapshot)
        measured = asyncio.ensure_future(_worth_placing(options))
        try:
            async with _guest(snapshot, target, report) as (guest, sockets):
                answered = time.monotonic()
                with contextlib.ExitStack() as stack:
                    return await _bring_up(
                        guest,
                        snapshot,
                        package=package,
                        target=target,
                        options=options,
                        trace=trace,
                        report=report,
                        started=started,
                        answered=answered,
                        measured=measured,
                        sockets=sockets,
                        stack=stack,
                    )
        finally:
            measured.cancel()
            await asyncio.gather(measured, return_exceptions=True)


async def _worth_placing(options: Delivery) -> bool:
    if options.place == "off":
        return False
    return await asyncio.to_thread(placement.is_worth_it)


def _check_snapshot(snapshot: Snapshot) -> bytes:
    """Refuse a file that cannot be restored; returns the packaged device state.

    Raises:
        SnapshotError: Says why.
    """
    if snapshot.info.pages_absent:
        raise errors.StreamUnsupported(
            f"{snapshot.path} lacks {snapshot.info.pages_absent} pages: they were in "
            "memory shared with another process",
            hint="Save the guest without x-ignore-shared.",
        )
    package = postcopy.package(snapshot.image.section(Section.DEVICES))
    if len(package) < 32:
        raise errors.Damaged(f"{snapshot.path} has no device state")
    return package


# -------------------------------------------------------------- which QEMU


@contextlib.asynccontextmanager
async def _guest(
    snapshot: Snapshot, target: Target, report: Report
) -> AsyncIterator[tuple[Guest, dict[str, str]]]:
    """Start or find the QEMU; yields it, and where its sockets are now."""
    if target.attach is not None:
        async with guest_state.attach(target.attach) as guest:
            await _require_waiting(guest)
            if _is_paused(snapshot, target):
                # While it waits this only says that it is not to run afterwards.
                await guest.qmp.execute("stop")
            yield guest, {}
        return
    if not guest_state.userfaultfd_allowed():
        raise errors.UserfaultfdForbidden("this user may not use userfaultfd")
    if target.qmp is not None:
        await _require_free(target.qmp)
    _note_room(snapshot, report)
    directory = control.make_guest_directory()
    overlays: dict[str, str] = {}
    ran = False
    try:
        overlays = _overlays(snapshot, target, report)
        argv, sockets = _command(snapshot, target, directory, overlays, report)
        async with guest_state.start(argv, directory=directory, report=report) as guest:
            try:
                yield guest, sockets
            finally:
                ran = guest.ran
    finally:
        if not ran:
            shutil.rmtree(directory, ignore_errors=True)
            _remove(overlays)


async def _require_free(path: str) -> None:
    """Refuse a QMP socket on which somebody listens, unless he is just ending.

    Raises:
        TargetExists: Somebody does.
    """
    # Ends a QEMU that a killed restore has left behind before its guest ran.
    control.list_guests()
    deadline = time.monotonic() + _SOCKET_FREE_TIMEOUT
    while guest_state.listens(path):
        if time.monotonic() > deadline:
            raise errors.TargetExists(
                f"QMP socket {path}: a process listens there already",
                hint="Name another socket, or end the QEMU that has it.",
            )
        await asyncio.sleep(_SOCKET_FREE_POLL)


def _remove(files: Mapping[str, str]) -> None:
    for name in files.values():
        Path(name).unlink(missing_ok=True)


def _is_paused(snapshot: Snapshot, target: Target) -> bool:
    return target.paused or snapshot.meta.run_state == "paused"


async def _require_waiting(guest: Guest) -> None:
    """Refuse a QEMU that does not wait for a guest.

    Raises:
        GuestBusy: It has one.
    """
    state = (await guest.qmp.execute("query-status"))["status"]
    if state == "inmigrate":
        answer = await guest.qmp.execute("query-migrate")
        if answer.get("status", "none") == "none":
            return
        state = f"{state}, migration {answer['status']}"
    known = control.find_record(guest.pid)
    if known is not None:
        who = f"pager {known.record.pager}" if known.served else "a pager that is gone"
        raise errors.GuestBusy(
            f"QEMU (pid {guest.pid}) has a guest of {who} already",
            hint=f"See `status {guest.pid}`.",
        )
    raise errors.GuestBusy(
        f"QEMU (pid {guest.pid}) does not wait for a guest: it is {state!r}",
        hint="Start it with -incoming defer.",
    )


def _note_room(snapshot: Snapshot, report: Report) -> None:
    """Say when the guest's pages will not fit into memory once all are loaded."""
    info = snapshot.info
    need = (info.pages_fill + info.pages_data) * PAGE_SIZE
    values = {}
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            values[name] = int(rest.split()[0]) * 1024
        if need > values["MemAvailable"] + values["SwapFree"]:
            report.note(
                f"the guest needs {need >> 20} MiB once all is loaded, and this host "
                f"has {values['MemAvailable'] >> 20} MiB available"
            )


# ---------------------------------------------------------- the command line


def _disks(snapshot: Snapshot) -> list[disk_state.Disk]:
    return disk_state.from_documents([dict(disk) for disk in snapshot.meta.disks])


def _overlays(snapshot: Snapshot, target: Target, report: Report) -> dict[str, str]:
    """Check the disks, and make an overlay for each that was frozen."""
    disks = _disks(snapshot)
    for note in disk_state.check_unchanged(disks):
        report.note(note)
    if target.args is not None:
        # The user's own command line names the disks that it wants.
        return {}
    place = target.disk_dir or str(snapshot.path.parent)
    made = disk_state.restore_overlays(disks, place, qemu=target.qemu)
    for frozen, overlay in made.items():
        report.note(f"{frozen}: the guest writes to {overlay}")
    return made


def _command(
    snapshot: Snapshot,
    target: Target,
    directory: Path,
    overlays: Mapping[str, str],
    report: Report,
) -> tuple[list[str], dict[str, str]]:
    """Return the command line to start, and where its sockets are now."""
    qmp = target.qmp or str(directory / _QMP)
    control.check_socket_path(qmp)
    paused = _is_paused(snapshot, target)
    if target.args is not None:
        return _given_command(target.args, qmp, paused=paused), {}
    meta = snapshot.meta
    if meta.command_line is None:
        raise errors.CommandLineRefused(
            f"{snapshot.path} has no command line: QEMU's process was not to be seen "
            "when it was saved, or it was converted from a stream"
        )
    if meta.hotplugged:
        names = ", ".join(
            str(device.get("id", "?")) if isinstance(device, dict) else str(device)
            for device in meta.hotplugged
        )
        raise errors.CommandLineRefused(
            f"the recorded command line lacks devices that were plugged in later: "
            f"{names}",
            hint="Give a command line that has them after `--`.",
        )
    disks = _disks(snapshot)
    plan = command_line.plan(
        list(meta.command_line),
        qmp_socket=qmp,
        run_dir=directory,
        qemu=target.qemu,
        machine=snapshot.machine,
        cwd=meta.working_directory,
        hostfwd=target.hostfwd,
        disk_map=disk_state.disk_map(disks, overlays),
        known_files=disk_state.known_files(disks),
        trust=target.trust,
        paused=paused,
    )
    for change in plan.changes:
        report.detail(change)
    return list(plan.argv), dict(plan.sockets)


def _given_command(args: Sequence[str], qmp: str, *, paused: bool) -> list[str]:
    """Complete a command line of the user's own."""
    if not args:
        raise errors.UsageError("the command line after `--` is empty")
    binary = shutil.which(args[0])
    if binary is None:
        raise errors.UsageError(f"{args[0]} is not there, or cannot be executed")
    argv = [binary, *args[1:]]
    names = [arg.lstrip("-") if arg.startswith("-") else "" for arg in argv]
    if "daemonize" in names:
        raise errors.UsageError(
            "-daemonize: QEMU would leave its starter", hint="Use --detach instead."
        )
    if "incoming" in names:
        at = names.index("incoming")
        if argv[at + 1 : at + 2] != ["defer"]:
            raise errors.UsageError("only `-incoming defer` can receive a snapshot")
    else:
        argv += ["-incoming", "defer"]
    if paused and "S" not in names:
        argv.append("-S")
    if not any(qmp in arg for arg in argv):
        path = qmp.replace(",", ",,")
        argv += [
            "-chardev",
            f"socket,id={command_line.QMP_ID},path={path},server=on,wait=off",
            "-mon",
            f"chardev={command_line.QMP_ID},mode=control",
        ]
    return argv


# ------------------------------------------------------------- bringing it up


async def _bring_up(
    guest: Guest,
    snapshot: Snapshot,
    *,
    package: bytes,
    target: Target,
    options: Delivery,
    trace: int,
    report: Report,
    started: float,
    answered: float,
    measured: asyncio.Future[bool],
    sockets: dict[str, str],
    stack: contextlib.ExitStack,
) -> RestoreResult:
    """Be the source of the migration until the pager can be, then serve."""
    paused = _is_paused(snapshot, target)
    _, found, known = await asyncio.gather(
        _check_machine(guest, snapshot),
        guest_state.ram_blocks(guest.qmp),
        query_capabilities(guest.qmp),
    )
    where = f"QEMU (pid {guest.pid})"
    blocks = delivery.match_blocks(snapshot.image.ram_blocks, found, where=where)
    preempt = options.wants_preempt
    old = await delivery.set_capabilities(guest, known, preempt=preempt)
    async with _undo_capabilities(guest, old), _link(guest, target, preempt) as link:
        key = stack.enter_context(control.guest_lock(guest.pid))
        await _open(link, snapshot, blocks, found)
        record = control.Record(
            pid=guest.pid,
            started=int(key.partition("-")[2]),
            name=_name(snapshot, target),
            snapshot=control.real_path(snapshot.path),
            uuid=snapshot.uuid,
            pager=os.getpid(),
            since=time.time(),
            qmp=_user_qmp(target, guest),
            control=guest.qmp_path,
            preempt=preempt,
            page_sizes=[block.page_size for block in blocks],
            capabilities=old,
            directory="" if guest.directory is None else str(guest.directory),
        )
        control.write_record(record)
        if guest.directory is not None:
            control.own_guest_directory(guest.directory, key)
        pager = delivery.make_pager(snapshot, link, blocks, options, guest, trace=trace)
        pager.send_first(package)
        job = Job(
            guest=guest,
            snapshot=snapshot,
            link=link,
            record=record,
            pager=pager,
            options=options,
            report=report,
            started=started,
            answered=answered,
            paused=paused,
            place=measured,
            sockets=sockets,
        )
        try:
            return await delivery.serve(job)
        except BaseException:
            if not guest.ran:
                control.remove_record(record)
            raise


@contextlib.asynccontextmanager
async def _undo_capabilities(guest: Guest, old: dict[str, bool]) -> AsyncIterator[None]:
    """Put capabilities back if it fails before the guest runs."""
    try:
        yield
    except BaseException:
        if not guest.ran and not guest.spawned and not guest.watch.ended(0.2):
            with contextlib.suppress(errors.PagesaverError):
                await delivery.write_capabilities(guest, old)
        raise


async def _check_machine(guest: Guest, snapshot: Snapshot) -> None:
    """Refuse another machine type, as QEMU would, but with a guest that lives.

    Raises:
        MachineMismatch: It is another.
    """
    wanted = snapshot.machine
    try:
        kind = await guest.qmp.execute(
            "qom-get", {"path": "/machine", "property": "type"}
        )
    except errors.QemuRefused:
        return
    found = str(kind).removesuffix("-machine")
    if wanted and found != wanted:
        raise errors.MachineMismatch(
            f"the snapshot is of machine {wanted}, and QEMU (pid {guest.pid}) is a "
            f"{found}",
            hint=f"Start it with -machine {wanted}.",
        )


@contextlib.asynccontextmanager
async def _link(guest: Guest, target: Target, preempt: bool) -> AsyncIterator[Link]:
    path = delivery.migration_socket(target.socket_dir, guest)
    path.unlink(missing_ok=True)
    try:
        await guest.qmp.execute("migrate-incoming", {"uri": f"unix:{path}"})
        async with delivery.connect(guest, path, preempt=preempt) as link:
            path.unlink(missing_ok=True)
            guest.follow(control.socket_pid(link.main))
            yield link
    finally:
        path.unlink(missing_ok=True)


async def _open(
    link: Link,
    snapshot: Snapshot,
    blocks: Sequence[postcopy.Block],
    found: Sequence[HostBlock],
) -> None:
    """Say everything up to the moment when QEMU may listen, and wait for it."""
    doing = "when the snapshot's RAM blocks were announced"
    link.expect_blocks({block.name: block.length for block in blocks})
    await link.send(
        postcopy.opening(
            stream=snapshot.info.stream,
            configuration=snapshot.image.section(Section.CONFIGURATION),
            blocks=blocks,
            page_sizes=[block.page_size for block in found],
            host_page_size=os.sysconf("SC_PAGE_SIZE"),
        ),
        doing,
    )
    await link.receive(postcopy.Reply.PONG, postcopy.PING_READY, doing)


def _user_qmp(target: Target, guest: Guest) -> str:
    """Return the QMP socket that is the user's."""
    if guest.directory is None or target.qmp is not None:
        return control.absolute(target.attach or target.qmp or "")
    return str(guest.directory / _QMP)


def _name(snapshot: Snapshot, target: Target) -> str:
    """Return what the guest is called: by -name, or like its file."""
    argv = list(target.args or snapshot.meta.command_line or ())
    for at, arg in enumerate(argv[:-1]):
        if arg in ("-name", "--name"):
            with contextlib.suppress(ValueError):
                name = OptionString.parse(argv[at + 1], implied="guest").get("guest")
                if name:
                    return name
    return snapshot.path.name.removesuffix(_SNAPSHOT_SUFFIX)


# ------------------------------------------------------------------ detached


@dataclass(frozen=True, kw_only=True)
class Detached:
    """A restore that goes on in a process of its own.

    Attributes:
        pager: That process.
        running: The fields of the event ``running``.
    """

    pager: int
    running: Mapping[str, Any]

    def document(self) -> dict[str, Any]:
        """Return the document of ``--json``."""
        return {"pager-pid": self.pager, **self.running}


def restore_detached(
    file: str | os.PathLike[str],
    target: Target,
    options: Delivery,
    *,
    status_file: str | os.PathLike[str] | None = None,
    report: Report | None = None,
) -> Detached:
    """Restore, return when the guest runs, and leave a pager that ends by itself.

    Args:
        file: The snapshot.
        target: Which QEMU.
        options: How pages are brought.
        status_file: Where the document goes at the end.
        report: Gets the child's events until the guest runs.

    Raises:
        PagesaverError: What the child failed with, before the guest ran.
    """
    report = report or Silent()
    order = {
        "file": control.absolute(file),
        "target": _absolute(target),
        "options": asdict(_absolute_trace(options)),
        "status-file": None if status_file is None else control.absolute(status_file),
    }
    reading, writing = os.pipe2(os.O_CLOEXEC)
    code = "from qemu_pagesaver.restore import _detached; _detached()"
    try:
        # -P: a package in the working directory must not be taken for ours.
        child = subprocess.Popen(
            [sys.executable, "-P", "-c", code, "restore", str(file)],
            stdin=subprocess.PIPE,
            stdout=writing,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
    finally:
        os.close(writing)
    with os.fdopen(reading, "rb") as events:
        try:
            assert child.stdin is not None  # noqa: S101 - it is a pipe
            with contextlib.suppress(BrokenPipeError), child.stdin as stdin:
                stdin.write(json.dumps(order).encode())
            return _follow_child(events, child.pid, report)
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)
            child.wait()
            raise
        finally:
            # Its end is nobody's to wait for; without a status Popen would complain.
            if child.poll() is None:
                child.returncode = 0


def _absolute_trace(options: Delivery) -> Delivery:
    """The child that stays has another working directory."""
    if options.trace is None:
        return options
    return replace(options, trace=control.absolute(options.trace))


def _absolute(target: Target) -> dict[str, Any]:
    """Return a target for a process with another working directory."""
    document = asdict(target)
    for name in ("attach", "qmp", "disk_dir", "socket_dir"):
        if document[name]:
            document[name] = control.absolute(document[name])
    if target.qemu and "/" in target.qemu:
        document["qemu"] = control.absolute(target.qemu)
    return document


def _follow_child(events: Iterable[bytes], pid: int, report: Report) -> Detached:
    for line in events:
        document = json.loads(line)
        name = document.pop("event")
        if name == "failed":
            raise _error_of(document)
        if name == "note":
            report.note(document["text"])
        elif name == "detail":
            report.detail(document["text"])
        else:
            report.event(name, **document)
        if name == "running":
            return Detached(pager=pid, running=_kebab(document))
    raise errors.PagesaverError(
        f"the detached process (pid {pid}) ended without a word"
    )


def _error_of(document: Mapping[str, Any]) -> errors.PagesaverError:
    """Return the error that a document is of."""
    kinds = [errors.PagesaverError]
    for kind in kinds:
        if kind.id == document["error"] and kind is not errors.PagesaverError:
            break
        kinds += kind.__subclasses__()
    else:
        kind = errors.PagesaverError
    return kind(document["message"], hint=document["hint"])


def _kebab(document: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("_", "-"): value for key, value in document.items()}


class _Pipe:
    """A Report into a pipe, until the guest runs; nobody listens afterwards."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def _write(self, document: Mapping[str, object]) -> None:
        if self._fd < 0:
            return
        try:
            os.write(self._fd, json.dumps(document, default=str).encode() + b"\n")
        except OSError:
            self.close()

    def close(self) -> None:
        if self._fd >= 0:
            null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            os.dup2(null, self._fd)
            os.close(null)
            self._fd = -1

    def event(self, name: str, **fields: object) -> None:
        self._write({"event": name, **fields})
        if name == "running":
            self.close()

    def progress(self, stage: str, done: int, total: int) -> None:
        pass

    def note(self, text: str) -> None:
        self._write({"event": "note", "text": text})

    def detail(self, text: str) -> None:
        self._write({"event": "detail", "text": text})


def _detached() -> None:
    """Be the child of :func:`restore_detached`: order on stdin, events on stdout."""
    order = json.load(sys.stdin)
    pipe = _Pipe(1)
    status_file = order["status-file"]
    target = dict(order["target"])
    for name in ("args", "hostfwd"):
        if target[name] is not None:
            target[name] = tuple(target[name])
    try:
        result = asyncio.run(
            _restore(
                order["file"], Target(**target), Delivery(**order["options"]), pipe
            )
        )
    except KeyboardInterrupt:
        document: dict[str, Any] = errors.Interrupted("interrupted").document()
    except errors.PagesaverError as error:
        document = error.document()
    except Exception as error:
        kind = type(error).__name__
        document = errors.PagesaverError(f"internal error: {kind}: {error}").document()
    else:
        _write_status(status_file, result.document())
        return
    pipe.event("failed", **document)
    _write_status(status_file, document)
    sys.exit(1)


def _write_status(path: str | None, document: Mapping[str, Any]) -> None:
    if path is None:
        return
    temporary = f"{path}.{os.getpid()}"
    with contextlib.suppress(OSError):
        Path(temporary).write_text(json.dumps(document, indent=2) + "\n")
        Path(temporary).rename(path)
