# SPDX-License-Identifier: LGPL-2.1-or-later
"""The recorded command line: what of it is recorded, and how it is started again.

A recorded command line is data from a file that may be hostile. Nothing of it is
executed as it stands: :func:`plan` takes it apart by :data:`OPTIONS`, the one
table of what a restore does with each option, and puts together another. The
guest is the same; what would collide with the first guest, which may still run,
is moved; what runs code or opens host files beyond the recorded disks needs trust.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from qemu_pagesaver import errors
from qemu_pagesaver.option_string import OptionString, escape

MARKER = "<secret-not-recorded>"
QMP_ID = "pagesaver-qmp"
OVERLAY_FORMAT = "qcow2"

# Bounds of what is accepted from a file; Linux bounds one argument by 128 KiB.
MAX_ARGUMENTS = 4096
MAX_ARGUMENT = 1 << 16
MAX_TOTAL = 1 << 20
# sockaddr_un.sun_path with its NUL.
_MAX_SOCKET_PATH = 107


class Fate(StrEnum):
    """What a restore does with an option."""

    KEEP = "kept"
    REWRITE = "rewritten"
    DROP = "left out"
    TRUST = "needs `--trust`"
    REFUSE = "refused"


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option of QEMU.

    Attributes:
        name: Without its dash; empty for a bare disk image.
        argument: Whether it takes one.
        fate: What a restore does with it at first sight.
        details: The rest, for the table of COMMAND-LINE.md.
        handler: Method of the planner; empty: the fate says all.
    """

    name: str
    argument: bool
    fate: Fate
    details: str
    handler: str = ""


def _options() -> dict[str, Option]:
    table: dict[str, Option] = {}

    def add(
        names: str, fate: Fate, details: str = "", handler: str = "", *, arg: bool
    ) -> None:
        for name in names.split():
            table[name] = Option(
                name=name, argument=arg, fate=fate, details=details, handler=handler
            )

    keep, rewrite, drop = Fate.KEEP, Fate.REWRITE, Fate.DROP
    trust, refuse = Fate.TRUST, Fate.REFUSE
    # The machine
    add(
        "machine M",
        rewrite,
        "the type becomes the exact one of the stream (`q35` -> `pc-q35-10.0`); "
        "other properties are kept; `dumpdtb=` needs `--trust`",
        "machine",
        arg=True,
    )
    add("accel", keep, "with a path (`device=`) needs `--trust`", "checked", arg=True)
    add("cpu smp numa m k boot uuid rtc", keep, arg=True)
    add("vga g compat echr overcommit seed msg prom-env", keep, arg=True)
    add("action watchdog-action append", keep, arg=True)
    add("tpmdev", keep, "other than `emulator` needs `--trust`", "tpmdev", arg=True)
    add("mem-prealloc usb enable-kvm no-reboot no-shutdown", keep, arg=False)
    add("nodefaults no-user-config only-migratable full-screen", keep, arg=False)
    add("no-acpi no-hpet no-fd-bootchk win2k-hack old-param", keep, arg=False)
    add("async-teardown enable-sync-profile singlestep portrait", keep, arg=False)
    add("rotate", keep, arg=True)
    add(
        "global",
        keep,
        "a property that opens a host file needs `--trust`",
        "global_",
        arg=True,
    )
    add("icount", keep, "`rr=` (record and replay) is refused", "icount", arg=True)
    add(
        "name",
        rewrite,
        "`debug-threads=on` is added, unless it is there",
        "name",
        arg=True,
    )
    add(
        "device",
        keep,
        "byte for byte. `vfio-*`, `vhost-*`, `usb-host` and properties that open host "
        "files (`file=`, `rootdir=`, `evdev=`, any absolute path) need `--trust`; "
        "`romfile=` is only read and kept; descriptors (`fd=`) are refused",
        "device",
        arg=True,
    )
    add(
        "object",
        keep,
        "types that only compute (memory backends in RAM, iothreads, throttle "
        "groups, `rng-builtin`, `rng-random` of /dev/urandom, secrets that were "
        "recorded) are kept; all others (`memory-backend-file`, `filter-*`, "
        "`tls-creds-*`, `input-linux`, ..) need `--trust`",
        "object_",
        arg=True,
    )
    add(
        "usbdevice",
        keep,
        "but for `tablet`, `mouse`, `keyboard`, `braille` and "
        "`wacom-tablet` needs `--trust`",
        "usbdevice",
        arg=True,
    )
    # Files that the machine is built from
    add(
        "kernel initrd dtb shim bios option-rom L",
        keep,
        "the file is only read; a relative name is made absolute",
        "path",
        arg=True,
    )
    add(
        "fw_cfg smbios acpitable",
        keep,
        "with a host file (`file=`, `data=`, `path=`) needs `--trust`",
        "table",
        arg=True,
    )
    add("mem-path readconfig fsdev virtfs", trust, "opens host files", arg=True)
    add("iscsi set plugin", trust, "", "trusted", arg=True)
    add("semihosting-config", trust, "the guest may open host files", arg=True)
    add("semihosting", trust, "the guest may open host files", arg=False)
    # Disks
    disk = (
        "a recorded disk is kept, or replaced by its overlay; a relative name is made "
        "absolute; any other file, host device or network disk needs `--trust`; "
        "`/dev/fdset/..` is refused"
    )
    add(
        "hda hdb hdc hdd fda fdb cdrom sd mtdblock pflash",
        rewrite,
        disk,
        "disk",
        arg=True,
    )
    table[""] = Option(
        name="", argument=False, fate=rewrite, details=disk, handler="disk"
    )
    add("drive", rewrite, disk, "drive", arg=True)
    add(
        "blockdev",
        rewrite,
        disk + "; with an overlay the node that has the file's format becomes "
        "`driver=qcow2`, and its `backing=` goes, since the overlay names it",
        "blockdev",
        arg=True,
    )
    add("snapshot", keep, "over the disks as they are then", arg=False)
    # Network
    net = (
        "`user`: the host's ports of `hostfwd=` become free ones (port 0: QEMU "
        "chooses, `info usernet` tells); `guestfwd=`, `smb=`, `tftp=` need `--trust`. "
        "`none`, `nic`, `hubport` are kept. Every other type needs `--trust`: it runs "
        "a script or joins the host's networks. Descriptors (`fd=`) are refused"
    )
    add("netdev nic net", rewrite, net, "net", arg=True)
    # Sockets, serial lines, monitors
    line = (
        "a listening socket or stdio moves to a new unix socket; `null`, `none`, `vc`, "
        "`pty`, `chardev:ID` are kept; whatever connects or opens a file or tty needs "
        "`--trust`"
    )
    add("serial parallel debugcon", rewrite, line, "line", arg=True)
    add("monitor", rewrite, line, "line", arg=True)
    add(
        "chardev",
        rewrite,
        "as `-serial`; `logfile=` needs `--trust`; one that only a QMP monitor uses is "
        "left out; descriptors (`fd=`) are refused",
        "chardev",
        arg=True,
    )
    add("mon", rewrite, "QMP (`mode=control`) is left out, see `-qmp`", "mon", arg=True)
    add("qmp qmp-pretty", drop, "QMP is at the socket that `--qmp` names", arg=True)
    add("gdb", drop, "its port would collide", arg=True)
    add("s", drop, "its port would collide", arg=False)
    # Displays
    add(
        "vnc",
        rewrite,
        "moves to a new unix socket, without password and TLS; `none` is kept",
        "vnc",
        arg=True,
    )
    add(
        "spice",
        rewrite,
        "moves to a new unix socket, without ticket and TLS",
        "spice",
        arg=True,
    )
    add(
        "display",
        keep,
        "`vnc=` as `-vnc`; `curses` becomes `none`; `spice-app` and `dbus` with an "
        "address need `--trust`",
        "display",
        arg=True,
    )
    add(
        "nographic",
        keep,
        "the serial line that it puts on stdio moves to a new unix socket",
        "nographic",
        arg=False,
    )
    add(
        "audio audiodev",
        keep,
        "with a file, device or server needs `--trust`",
        "audio",
        arg=True,
    )
    # How the first process was run
    add("S", drop, "given if the guest is to stay paused", "start", arg=False)
    add("incoming", drop, "replaced by `-incoming defer`", arg=True)
    add("loadvm", drop, "the state comes from the snapshot", arg=True)
    add("daemonize preconfig", drop, "", arg=False)
    add("pidfile", drop, "would overwrite that of the first guest", arg=True)
    add(
        "d D dfilter trace dump-vmstate",
        drop,
        "logs and traces of the first run",
        arg=True,
    )
    add("perfmap jitdump", drop, "traces of the first run", arg=False)
    add("sandbox", keep, arg=True)
    user = "under another user or root QEMU does not find the sockets"
    add("runas chroot", refuse, user, arg=True)
    add(
        "run-with",
        keep,
        "`user=` and `chroot=` are refused: " + user,
        "run_with",
        arg=True,
    )
    add("add-fd", refuse, "an inherited descriptor", arg=True)
    add("xen-domid qtest qtest-log", refuse, "no guest of this kind", arg=True)
    add("xen-attach xen-domid-restrict", refuse, "no guest of this kind", arg=False)
    add("help h version audio-help", refuse, "starts no guest", arg=False)
    return table


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


OPTIONS: Mapping[str, Option] = _options()

_INHERITED = "uses a descriptor that QEMU inherited"
# A listening unix socket takes the place of any file of that name.
_REPLACES = "replaces a file of the host"
_FDSET = "/dev/fdset/"
_FD_KEYS = frozenset(("fd", "fds", "vhostfd", "vhostfds"))
# Properties of devices and objects that name files of the host.
_FILE_KEYS = _words(
    "file filename path mem-path rootdir evdev hidraw sysfsdev hostdevice dir db"
    " vhostdev sdrfile frudatafile config logfile input-path script downscript"
    " helper cert-file"
)
_MACHINE_FILES = ("kernel", "initrd", "dtb", "shim")
_READ_KEYS = frozenset(("romfile",))
_HOST_DEVICES = re.compile(
    r"vfio-|vhost-|usb-host$|virtio-input-host|xen-|u2f-passthru|scsi-generic$"
    r"|ipmi-bmc-extern$|x-"
)
_OBJECTS = _words(
    "memory-backend-ram memory-backend-memfd memory-backend-shm iothread"
    " throttle-group main-loop thread-context rng-builtin secret authz-simple"
    " authz-list can-bus cryptodev-backend cryptodev-backend-builtin"
    " acpi-generic-initiator acpi-generic-port"
)
_RANDOM = frozenset(("/dev/urandom", "/dev/random"))
_BLOCK_DRIVERS = _words(
    "raw qcow2 qcow qed vmdk vdi vpc vhdx parallels luks bochs cloop dmg"
    " throttle copy-on-read preallocate null-co null-aio file host_device"
    " host_cdrom"
)
_FILE_DRIVERS = frozenset(("", "file", "host_device", "host_cdrom"))
# What a block node has whatever its driver; the rest is the driver's own.
_NODE_KEYS = _words(
    "driver node-name file cache discard detect-zeroes read-only auto-read-only"
    " force-share"
)
_QUIET_LINES = re.compile(r"(null|none|pty|msmouse|wctablet|testdev|vc(:.*)?)$")
_QUIET_CHARDEVS = _words(
    "null pty vc ringbuf memory msmouse wctablet testdev spicevmc spiceport"
    " qemu-vdagent dbus mux hub"
)
_LISTENERS = ("unix", "tcp", "telnet", "websocket", "tn3270")
_USB_DEVICES = frozenset(("tablet", "mouse", "keyboard", "braille", "wacom-tablet"))
_PROTOCOL = re.compile(r"[^/:]*:")
_BINARY = re.compile(r"qemu-system-[a-z0-9_]+|qemu-kvm|kvm")
# Options whose argument QEMU also takes as JSON.
_JSON = _words("audio audiodev blockdev device display netdev object")
# The key that the first property of an argument may lack.
_IMPLIED = {
    "machine": "type",
    "M": "type",
    "accel": "accel",
    "name": "guest",
    "icount": "shift",
    "device": "driver",
    "object": "qom-type",
    "tpmdev": "type",
    "fw_cfg": "name",
    "blockdev": "driver",
    "netdev": "type",
    "nic": "type",
    "net": "type",
    "chardev": "backend",
    "mon": "chardev",
    "audio": "driver",
    "audiodev": "driver",
    "display": "type",
    "vnc": "vnc",
    **dict.fromkeys(("serial", "parallel", "debugcon", "monitor"), "line"),
    "usbdevice": "device",
}
# Options whose argument is a name, and nothing else.
_PATHS = _words(
    "kernel initrd dtb shim bios option-rom L"
    " hda hdb hdc hdd fda fdb cdrom sd mtdblock pflash"
) | {""}
_CHARDEV = re.compile(r'\bchardev[0-9]*(?:=|:|"\s*:\s*")([\w.-]+)')
_HOSTFWD = re.compile(r"(?P<before>(?:tcp|udp)?:[^:]*:)(?P<port>\d+)(?P<after>-.*)")


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A command line fit for a snapshot: without secrets; ``notes`` name them."""

    argv: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to start.

    Attributes:
        argv: The command line; ``argv[0]`` is the path of the binary.
        changes: One sentence for each difference to the recorded one.
        sockets: Where what listened elsewhere listens now: recorded place -> path.
        trusted: What runs only because the user said --trust.
    """

    argv: tuple[str, ...]
    changes: tuple[str, ...] = ()
    sockets: Mapping[str, str] = field(default_factory=dict)
    trusted: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Item:
    """One option as it was given; ``value`` is "" where it takes no argument."""

    option: Option
    value: str

    def __str__(self) -> str:
        name = self.option.name
        return _show(f"-{name} {self.value}".rstrip() if name else self.value)


# -------------------------------------------------------------------- record


def read(pid: int) -> list[str]:
    """Return the command line of a process.

    Raises:
        IoError: It has gone, or may not be looked at.
    """
    try:
        data = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError as error:
        raise errors.from_os_error(error, "read the command line") from error
    if not data:
        raise errors.IoError(f"process {pid} has no command line: it has ended")
    return [os.fsdecode(part) for part in data.removesuffix(b"\0").split(b"\0")]


def working_directory(pid: int) -> str:
    """Return the directory that relative names of a process start from.

    Raises:
        IoError: It has gone, or may not be looked at.
    """
    try:
        return str(Path(f"/proc/{pid}/cwd").readlink())
    except OSError as error:
        raise errors.from_os_error(error, "read the working directory") from error


def record(argv: Sequence[str]) -> Recorded:
    """Return a command line for a snapshot, with markers instead of secrets."""
    out = list(argv)
    notes = []
    previous = ""
    for number, argument in enumerate(argv):
        clean = (
            argument if previous == "append" else _without_secrets(previous, argument)
        )
        if clean != argument:
            out[number] = clean
            where = f"-{previous}" if previous else "a bare disk image"
            notes.append(f"{where}: a secret in it is not recorded")
        known = OPTIONS.get(_option_name(argument))
        previous = known.name if known and known.argument and not previous else ""
    return Recorded(argv=tuple(out), notes=tuple(notes))


_URL_SECRET = re.compile(r"(?<=://)([^/@\s,]*?)([:%])([^/@\s,]+)@")
_RBD_SECRET = re.compile(r"(rbd:[^,]*?:key=)[^:,]+")
_ANY_SECRET = re.compile(r"((?:^|[,.])pass(?:word|wd)=)(?!on\b|off\b)(?:,,|[^,])+")


def _without_secrets(option: str, text: str) -> str:
    if (option and "=" in text) or text.startswith("{"):
        text = _without_secret_properties(option, text)
    text = _URL_SECRET.sub(rf"\1\2{MARKER}@", text)
    return _RBD_SECRET.sub(rf"\1{MARKER}", text)


def _without_secret_properties(option: str, text: str) -> str:
    try:
        options = OptionString.parse(text, implied="type")
    except ValueError:
        return _ANY_SECRET.sub(rf"\1{MARKER}", text)
    kind = options.get("qom-type") or options.get("type")
    clean = options
    for key, value in options.pairs():
        last = key.rpartition(".")[2]
        is_secret = last in ("password", "passwd", "x509-key-password") or (
            option == "object" and kind == "secret" and last == "data"
        )
        if is_secret and value not in ("", "on", "off"):
            clean = clean.with_(key, MARKER)
    return text if clean is options else str(clean)


# ---------------------------------------------------------------------- plan


def plan(
    argv: Sequence[str],
    *,
    qmp_socket: str | os.PathLike[str],
    run_dir: str | os.PathLike[str],
    qemu: str | os.PathLike[str] | None = None,
    machine: str | None = None,
    cwd: str | None = None,
    disk_map: Mapping[str, str] | None = None,
    known_files: Collection[str] = (),
    trust: bool = False,
    paused: bool = False,
    name: str | None = None,
    debug_threads: bool = True,
    add_devices: Sequence[str] = (),
    hostfwd: Sequence[str] | None = None,
    keep_endpoints: bool = False,
) -> Plan:
    """Turn a recorded command line into the one that a restore starts.

    Args:
        argv: As recorded; data that is not trusted.
        qmp_socket: Where QEMU's QMP server shall listen.
        run_dir: Private directory for the sockets that move.
        qemu: Binary named by the user; None: the recorded one's name is looked
            up in PATH, its recorded place is not used.
        machine: Exact machine type, from the stream.
        cwd: Directory that relative names were relative to.
        disk_map: Recorded file of a disk -> file (qcow2) to be used instead.
        known_files: Files of the recorded disks (absolute), proved unchanged.
        trust: The user trusts the recorded command line.
        paused: The guest shall not run after the restore.
        name: New name of the guest.
        debug_threads: Let QEMU name its threads.
        add_devices: Arguments of further `-device` options (hot-plugged ones).
        hostfwd: Forwarded ports instead of the recorded ones.
        keep_endpoints: Sockets and ports stay where they were, because the
            first guest has gone.

    Raises:
        CommandLineRefused: Names each option that cannot be started again.
        NeedsTrust: Names each option that needs trust, which was not given.
    """
    _check_bounds([*argv, *add_devices])
    binary = find_binary(argv[0], qemu=qemu)
    planner = _Planner(
        run_dir=str(run_dir),
        machine=machine,
        cwd=cwd,
        disk_map=dict(disk_map or {}),
        known=frozenset(known_files),
        name=name,
        debug_threads=debug_threads,
        hostfwd=hostfwd,
        keep_endpoints=keep_endpoints,
    )
    planner.note_binary(argv[0], binary)
    devices = [_Item(OPTIONS["device"], device) for device in add_devices]
    planner.take(_parse(argv[1:]) + devices)
    planner.refuse_markers()
    if planner.refused:
        raise errors.CommandLineRefused(
            "the recorded command line cannot be started again: "
            + "; ".join(planner.refused)
        )
    if planner.trusted and not trust:
        raise errors.NeedsTrust(
            "the recorded command line has what needs trust: "
            + "; ".join(planner.trusted)
        )
    path = _socket_path(str(qmp_socket))
    own = [
        "-chardev",
        f"socket,id={QMP_ID},path={escape(path)},server=on,wait=off",
        "-mon",
        f"chardev={QMP_ID},mode=control",
        *(["-S"] if paused else []),
        "-incoming",
        "defer",
    ]
    return Plan(
        argv=(binary, *planner.out, *own),
        changes=tuple(planner.changes),
        sockets=dict(planner.sockets),
        trusted=tuple(planner.trusted),
    )


def find_binary(recorded: str, *, qemu: str | os.PathLike[str] | None = None) -> str:
    """Return the path of the QEMU to start: the user's, or the one of PATH.

    Raises:
        CommandLineRefused: There is none, or the recorded name is no QEMU's.
    """
    if qemu is not None:
        found = shutil.which(qemu)
        if found is None:
            raise errors.CommandLineRefused(
                f"QEMU {os.fspath(qemu)} is not there, or cannot be executed",
                hint="Give the path of a qemu-system-* binary to --qemu.",
            )
        return str(Path(found).absolute())
    name = Path(recorded).name
    if not _BINARY.fullmatch(name):
        raise errors.CommandLineRefused(
            f"the recorded program {_show(recorded)} is not called like a QEMU",
            hint="Name the QEMU to start with --qemu.",
        )
    found = shutil.which(name)
    if found is None:
        raise errors.CommandLineRefused(
            f"{name} is not in PATH",
            hint="Name the QEMU to start with --qemu, or install it.",
        )
    return str(Path(found).absolute())


def _check_bounds(argv: Sequence[str]) -> None:
    fits = (
        0 < len(argv) <= MAX_ARGUMENTS
        and all(isinstance(argument, str) for argument in argv)
        and all(len(argument) <= MAX_ARGUMENT for argument in argv)
        and sum(map(len, argv)) <= MAX_TOTAL
    )
    if not fits:
        raise errors.CommandLineRefused(
            "the recorded command line is empty or too long"
        )
    if any("\0" in argument for argument in argv):
        raise errors.CommandLineRefused(
            "the recorded command line has an argument with a NUL"
        )


def _option_name(argument: str) -> str:
    """Return the name of the option that an argument is; QEMU takes -x and --x."""
    if not argument.startswith("-") or argument == "-":
        return ""
    return argument.removeprefix("-").removeprefix("-")


def _parse(arguments: Sequence[str]) -> list[_Item]:
    items = []
    iterator = iter(arguments)
    for argument in iterator:
        name = _option_name(argument)
        if not name and argument.startswith("-"):
            raise errors.CommandLineRefused(
                f"the recorded command line has {_show(argument)}, which is no option"
            )
        option = OPTIONS.get(name)
        if option is None:
            raise errors.CommandLineRefused(
                f"option {_show(argument)} of the recorded command line is not known"
            )
        if not name:
            items.append(_Item(option, argument))
            continue
        value = next(iterator, None) if option.argument else ""
        if value is None:
            raise errors.CommandLineRefused(
                f"option {_show(argument)} of the recorded command line lacks its "
                "argument"
            )
        items.append(_Item(option, value))
    return items


def _show(text: str) -> str:
    """Return text of a file for a sentence: short, and harmless to a terminal."""
    clean = "".join(char if char.isprintable() else "?" for char in text)
    return clean if len(clean) <= 100 else clean[:97] + "..."


def _socket_path(path: str) -> str:
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
        raise errors.UsageError(
            f"socket {path}: longer than the {_MAX_SOCKET_PATH} bytes that a unix "
            "socket may have",
            hint="Choose a shorter directory.",
        )
    return path


class _Planner:
    """Collects the new command line; one handler for each kind of option."""

    def __init__(
        self,
        *,
        run_dir: str,
        machine: str | None,
        cwd: str | None,
        disk_map: Mapping[str, str],
        known: frozenset[str],
        name: str | None,
        debug_threads: bool,
        hostfwd: Sequence[str] | None,
        keep_endpoints: bool,
    ) -> None:
        self._run_dir = run_dir
        self._machine = machine
        self._cwd = cwd
        self._disk_map = disk_map
        self._known = known
        self._name = name
        self._debug_threads = debug_threads
        self._hostfwd = hostfwd
        self._keep_endpoints = keep_endpoints
        self.out: list[str] = []
        self.changes: list[str] = []
        self.refused: list[str] = []
        self.trusted: list[str] = []
        self.sockets: dict[str, str] = {}
        self._items: list[_Item] = []
        self._kinds: list[str] = []
        self._used_chardevs: Counter[str] = Counter()
        self._qmp_chardevs: set[str] = set()
        self._has_machine = self._has_name = False

    # -- what handlers use

    def _emit(self, item: _Item, value: str | OptionString | None = None) -> None:
        if item.option.name:
            self.out.append("-" + item.option.name)
        if item.option.argument or not item.option.name:
            self.out.append(item.value if value is None else str(value))

    def _change(self, item: _Item, what: str) -> None:
        self.changes.append(f"{item}: {what}")

    def _refuse(self, item: _Item, why: str) -> None:
        self.refused.append(f"{item}: {why}")

    def _trust(self, item: _Item, why: str) -> None:
        self.trusted.append(f"{item}: {why}")

    def _options(self, item: _Item) -> OptionString | None:
        """Parse an argument; what inherits a descriptor is refused at once."""
        options = _parsed(item)
        for key, value in options.pairs():
            last = key.rpartition(".")[2]
            is_fd = last in _FD_KEYS or (last == "type" and value == "fd")
            if is_fd or _FDSET in value:
                self._refuse(item, _INHERITED)
                return None
        return options

    def _socket(self, item: _Item, kind: str) -> str:
        """Return the path of a new unix socket for what listened elsewhere."""
        number = sum(name == kind for name in self._kinds)
        self._kinds.append(kind)
        path = _socket_path(str(Path(self._run_dir) / f"{kind}{number}.sock"))
        # The same option may be there twice.
        old = str(item) if str(item) not in self.sockets else f"{item} ({number})"
        self.sockets[old] = path
        self._change(item, f"listens on {path} now")
        return path

    def _absolute(self, name: str) -> str:
        """Return a file name that does not depend on the working directory."""
        if name.startswith("/"):
            return name
        if self._cwd is None:
            self.refused.append(
                f"{_show(name)}: relative to a directory that was not recorded"
            )
            return name
        return os.path.normpath(Path(self._cwd) / name)

    def _found(self, name: str) -> str:
        """Likewise, for files that QEMU also looks for among its own."""
        if name.startswith("/") or not name:
            return name
        if "/" in name:
            return self._absolute(name)
        if self._cwd is not None and (Path(self._cwd) / name).exists():
            return self._absolute(name)
        return name

    # -- the walk

    def note_binary(self, recorded: str, binary: str) -> None:
        """Say that another binary is started than the recorded one."""
        if recorded not in (binary, Path(binary).name):
            self.changes.append(f"{_show(recorded)}: {binary} is started instead")

    def take(self, items: list[_Item]) -> None:
        """Handle all options."""
        self._items = [item for item in items if self._is_readable(item)]
        self._look_ahead()
        for item in self._items:
            if item.option.handler:
                getattr(self, f"_do_{item.option.handler}")(item)
            else:
                self._do_by_fate(item)
        if self._machine is not None and not self._has_machine:
            self.out += ["-machine", self._machine]
            self.changes.append(f"-machine {self._machine}: added, as in the stream")
        if not self._has_name:
            self._do_name(_Item(OPTIONS["name"], ""))

    def _is_readable(self, item: _Item) -> bool:
        """Refuse what we might read otherwise than QEMU does."""
        # What has no handler, like -append, is nobody's to read.
        if not item.option.handler or item.option.name in _PATHS:
            return True
        # QEMU takes JSON for some options only.
        readable = item.option.name in _JSON or not item.value.startswith("{")
        try:
            _parsed(item)
        except ValueError:
            readable = False
        if not readable:
            self._refuse(item, "its argument cannot be read")
        return readable

    def _do_by_fate(self, item: _Item) -> None:
        fate, details = item.option.fate, item.option.details
        if fate is Fate.DROP:
            self._change(item, f"left out; {details}".rstrip("; "))
        elif fate is Fate.REFUSE:
            self._refuse(item, details)
        else:
            if fate is Fate.TRUST:
                self._trust(item, details)
            if _FDSET in item.value:
                self._refuse(item, _INHERITED)
            self._emit(item)

    def refuse_markers(self) -> None:
        """Refuse what lacks a secret that was not recorded."""
        for before, argument in zip(["", *self.out], self.out, strict=False):
            if MARKER in argument:
                self.refused.append(
                    f"{_show(before + ' ' + argument)}: the secret was not recorded"
                )

    def _look_ahead(self) -> None:
        """Note how often each chardev is used, and which are QMP monitors'."""
        for item in self._items:
            names = set(_CHARDEV.findall(item.value))
            if item.option.name == "mon":
                monitor = _parsed(item)
                names.add(monitor.get("chardev"))
                if _is_control(item):
                    self._qmp_chardevs.update(names)
            self._used_chardevs.update(names)

    # -- handlers: the machine

    def _do_start(self, item: _Item) -> None:
        """Leave out what the restore decides anyway; nothing to tell."""

    def _do_checked(self, item: _Item) -> None:
        options = self._options(item)
        if options is not None:
            for key, value in options.pairs():
                self._check_property(item, key, value)
        self._emit(item)

    def _do_tpmdev(self, item: _Item) -> None:
        options = self._options(item)
        if options is not None and options.get("type") != "emulator":
            self._trust(item, "gives the guest a device of the host")
        self._emit(item)

    def _do_machine(self, item: _Item) -> None:
        options = self._options(item)
        if options is None:
            return
        old = options.get("type")
        if old:
            self._has_machine = True
            if self._machine is not None and old != self._machine:
                self._change(item, f"the machine is {self._machine}, as in the stream")
                options = options.with_("type", self._machine)
        for key in _MACHINE_FILES:
            value = options.get(key)
            if value and value != self._found(value):
                options = options.with_(key, self._found(value))
        for key, value in options.pairs():
            if key == "dumpdtb" or (
                key not in _MACHINE_FILES and value.startswith("/")
            ):
                self._trust(item, f"{_show(key)}= opens a host file")
        self._emit(item, options)

    def _do_name(self, item: _Item) -> None:
        self._has_name = True
        options = _parsed(item)
        if not item.value:
            options = OptionString(items=())
        if self._name is not None and options.get("guest") != self._name:
            options = options.with_("guest", self._name)
            self._change(item, f"the name is {_show(self._name)}")
        if self._debug_threads and not options.has("debug-threads"):
            options = options.with_("debug-threads", value=True)
        if options.items:
            self._emit(item, options)

    def _do_icount(self, item: _Item) -> None:
        if _parsed(item).has("rr"):
            self._refuse(item, "a replayed guest cannot be restored")
        self._emit(item)

    def _do_global_(self, item: _Item) -> None:
        options = self._options(item)
        if options is None:
            return
        for key, value in options.pairs():
            if key == "property":
                self._check_property(item, value, "?")
            elif "." in key:
                self._check_property(item, key.rpartition(".")[2], value)
            elif key == "value" and value.startswith("/"):
                self._trust(item, "opens a host file")
        self._emit(item)

    def _check_property(self, item: _Item, key: str, value: str) -> None:
        """Ask for trust where a property names a file of the host."""
        names_file = key in _FILE_KEYS and value not in ("", "on", "off")
        if names_file or (value.startswith("/") and key not in _READ_KEYS):
            self._trust(item, f"{key}= opens a host file")

    def _do_device(self, item: _Item) -> None:
        options = self._options(item)
        if options is None:
            return
        driver = options.get("driver")
        if _HOST_DEVICES.match(driver):
            self._trust(item, f"{_show(driver)} gives the guest a device of the host")
        for key, value in options.pairs():
            last = key.rpartition(".")[2]
            self._check_property(item, last, value)
            if last in _READ_KEYS and value != self._found(value):
                options = options.with_(key, self._found(value))
        self._emit(item, options)

    def _do_object_(self, item: _Item) -> None:
        options = self._options(item)
        if options is None:
            return
        kind = options.get("qom-type")
        random = kind == "rng-random" and options.get("filename", "/dev/urandom") in (
            _RANDOM
        )
        if kind not in _OBJECTS and not random:
            self._trust(item, f"objects {_show(kind)} may open host files or run code")
        elif not random:
            for key, value in options.pairs():
                self._check_property(item, key.rpartition(".")[2], value)
        self._emit(item)

    def _do_usbdevice(self, item: _Item) -> None:
        if item.value not in _USB_DEVICES:
            self._trust(item, "gives the guest a device or file of the host")
        self._emit(item)

    def _do_path(self, item: _Item) -> None:
        new = self._found(item.value)
        if item.option.name in ("L", "kernel", "dtb", "shim"):
            new = self._absolute(item.value)
        if _FDSET in new:
            self._refuse(item, _INHERITED)
        if new != item.value:
            self._change(item, f"is {_show(new)} now, so that it is found")
        self._emit(item, new)

    def _do_table(self, item: _Item) -> None:
        options = self._options(item)
        if options is None:
            return
        files = {"file", "path"} | (
            {"data"} if item.option.name == "acpitable" else set()
        )
        if any(key in files for key, _ in options.pairs()):
            self._trust(item, "gives the guest a host file")
        self._emit(item)

    def _do_trusted(self, item: _Item) -> None:
        why = {
            "iscsi": "connects to a storage server",
            "set": "changes other options by name",
            "plugin": "loads code into QEMU",
        }[item.option.name]
        self._trust(item, why)
        self._emit(item)

    def _do_audio(self, item: _Item) -> None:
        options = self._options(item)
        if options is None:
            return
        for key, value in options.pairs():
            last = key.rpartition(".")[2]
            if last in ("path", "dev", "server") or value.startswith("/"):
                self._trust(item, f"{last}= opens what belongs to the host")
        self._emit(item)

    def _do_run_with(self, item: _Item) -> None:
        options = self._options(item)
        if options is not None and (options.has("user") or options.has("chroot")):
            self._refuse(item, OPTIONS["runas"].details)
        if options is not None and options.has("exit-with-parent"):
            options = options.without("exit-with-parent")
            self._change(item, "QEMU does not end with its parent")
            if not options.items:
                return
        self._emit(item, options)

    # -- handlers: disks

    def _disk_file(self, item: _Item, name: str) -> str:
        """Return the file to be used for a disk, asking for trust where needed."""
        if _FDSET in name:
            self._refuse(item, _INHERITED)
            return name
        local = name.removeprefix("file:")
        if _PROTOCOL.match(local):
            self._trust(item, "is no recorded local disk")
            if local in self._disk_map:
                self._refuse(item, "an overlay cannot take its place")
            return name
        path = self._absolute(local)
        if path not in self._known:
            self._trust(item, f"{_show(path)} is not among the recorded disks")
        new = self._disk_map.get(path, path)
        if new != path:
            self._change(item, f"{_show(new)} takes the place of {_show(path)}")
        return new

    def _do_disk(self, item: _Item) -> None:
        if not item.value:
            self._emit(item)
            return
        self._emit(item, self._disk_file(item, item.value))

    def _do_drive(self, item: _Item) -> None:
        options = self._options(item)
        if options is None:
            return
        self._check_drivers(item, options)
        name = options.get("file")
        if name:
            new = self._disk_file(item, name)
            if new != name:
                options = options.with_("file", new)
            if self._is_overlaid(name):
                options = self._as_qcow2(item, options, "")
        self._emit(item, self._with_files(item, options))

    def _do_blockdev(self, item: _Item) -> None:
        options = self._options(item)
        if options is None:
            return
        self._check_drivers(item, options)
        below = options.get("file")
        for other in self._items:
            # The node that has this one's file as a node of its own.
            if below and other.option.name == "blockdev" and other is not item:
                node = _parsed(other)
                if node.get("node-name") == below and self._is_overlaid(
                    node.get("filename")
                ):
                    options = self._as_qcow2(item, options, "")
        self._emit(item, self._with_files(item, options))

    def _check_drivers(self, item: _Item, options: OptionString) -> None:
        for key, value in options.pairs():
            last = key.rpartition(".")[2]
            if last in ("driver", "format") and value not in _BLOCK_DRIVERS:
                self._trust(item, f"block driver {_show(value)} reaches beyond files")
            elif last not in ("file", "filename") and value.startswith("/"):
                self._trust(item, f"{_show(key)}= opens a host file")

    def _is_overlaid(self, name: str) -> bool:
        local = name.removeprefix("file:")
        if not local or _PROTOCOL.match(local):
            return False
        path = os.path.normpath(Path(self._cwd or "/") / local)
        return self._disk_map.get(path, path) != path

    def _with_files(self, item: _Item, options: OptionString) -> OptionString:
        """Treat the files that are named by their own key, at any depth."""
        for key, value in tuple(options.pairs()):
            prefix, _, last = key.rpartition(".")
            if last != "filename":
                continue
            driver = options.get(f"{prefix}.driver" if prefix else "driver")
            if driver not in _FILE_DRIVERS:
                self._trust(item, f"{_show(key)}= of {_show(driver)} is not known")
                continue
            new = self._disk_file(item, value)
            if new != value:
                options = options.with_(key, new)
            if self._is_overlaid(value):
                options = self._overlaid_node(item, options, prefix)
        return options

    def _overlaid_node(
        self, item: _Item, options: OptionString, prefix: str
    ) -> OptionString:
        """Let the node that has the format of an overlaid file be qcow2."""
        if prefix:
            outer, _, last = prefix.rpartition(".")
            if last != "file":
                self._refuse(item, f"{_show(prefix)} cannot have an overlay")
                return options
            driver = f"{prefix}.driver"
            if options.get(driver) not in ("", "file"):
                options = options.with_(driver, "file")
            return self._as_qcow2(item, options, outer)
        node = options.get("node-name")
        if any(_refers_to_file(other, node) for other in self._items):
            return options.with_("driver", "file")
        # The device uses the file without a format: put one between.
        for key, _ in tuple(options.pairs()):
            if key not in ("node-name", "read-only", "discard", "detect-zeroes") and (
                not key.startswith("cache.")
            ):
                options = options.renamed(key, f"file.{key}")
        return options.with_("driver", OVERLAY_FORMAT)

    def _as_qcow2(
        self, item: _Item, options: OptionString, prefix: str
    ) -> OptionString:
        """Give a node the format of an overlay, without what was the old one's."""
        dot = f"{prefix}." if prefix else ""
        for key in ("offset", "size", "encrypt", "key-secret"):
            if options.has(dot + key):
                self._refuse(item, f"{dot}{key}= does not go with an overlay")
                return options
        options = options.without(f"{dot}backing", f"{dot}snapshot")
        if item.option.name == "drive" and not prefix:
            key = "driver" if options.has("driver") else "format"
            return options.with_(key, OVERLAY_FORMAT)
        if options.get(f"{dot}driver") != OVERLAY_FORMAT:
            foreign = [
                key
                for key, _ in options.pairs()
                if key.startswith(dot)
                and key.removeprefix(dot).partition(".")[0] not in _NODE_KEYS
            ]
            options = options.without(*foreign)
        return options.with_(f"{dot}driver", OVERLAY_FORMAT)

    # -- handlers: network

    def _do_net(self, item: _Item) -> None:
        options = self._options(item)
        if options is None:
            return
        kind = options.get("type")
        if kind == "user":
            for key, _ in options.pairs():
                if key.partition(".")[0] in ("guestfwd", "smb", "tftp", "bootfile"):
                    self._trust(item, f"{key}= runs a program or opens host files")
            options = self._forwarded(item, options)
        elif kind not in ("none", "nic", "hubport"):
            self._trust(item, f"{_show(kind)} may run a script and joins host networks")
        self._emit(item, options)

    def _forwarded(self, item: _Item, options: OptionString) -> OptionString:
        """Move the ports of the host that a user network listens on."""
        if self._hostfwd is not None:
            if options.has("hostfwd") or self._hostfwd:
                self._change(item, "its forwarded ports are those that you gave")
            options = options.without("hostfwd")
            for number, forward in enumerate(self._hostfwd):
                key = f"hostfwd.{number}.str" if options.is_json else "hostfwd"
                options = OptionString(
                    items=(
                        *options.items,
                        *OptionString(items=()).with_(key, forward).items,
                    ),
                    is_json=options.is_json,
                )
            self._hostfwd = ()
            return options
        if self._keep_endpoints:
            return options
        for key, value in tuple(options.pairs()):
            match = _HOSTFWD.fullmatch(value)
            if key.partition(".")[0] == "hostfwd" and match and match["port"] != "0":
                new = f"{match['before']}0{match['after']}"
                options = options.replaced(key, value, new)
                self._change(
                    item,
                    f"host port {match['port']} is one that QEMU chooses now; "
                    "`info usernet` tells which",
                )
        return options

    # -- handlers: serial lines, monitors, displays

    def _do_line(self, item: _Item) -> None:
        """Handle the old syntax of `-serial`, `-monitor` and the like."""
        mux = "mon:" if item.value.startswith("mon:") else ""
        value = item.value.removeprefix("mon:")
        kind, _, rest = value.partition(":")
        name = item.option.name
        if _FDSET in value or kind == "fd":
            self._refuse(item, _INHERITED)
        elif kind == "chardev" or _QUIET_LINES.match(value):
            self._emit(item)
        elif value == "stdio":
            if name == "monitor":
                self._change(item, "left out; QEMU has no terminal now")
                self._emit(item, "none")
            else:
                self._emit(item, f"{mux}unix:{self._server(item, name)}")
        elif kind in _LISTENERS and OptionString.parse(rest, implied="a").is_on(
            "server"
        ):
            if self._keep_endpoints:
                place = OptionString.parse(rest, implied="a").with_("wait", value=False)
                if kind == "unix" or place.has("logfile"):
                    self._trust(item, _REPLACES)
                self._emit(item, f"{mux}{kind}:{place}")
            else:
                self._emit(item, f"{mux}unix:{self._server(item, name)}")
        else:
            self._trust(item, "connects, or opens a file or device of the host")
            self._emit(item)

    def _server(self, item: _Item, kind: str) -> str:
        return f"{escape(self._socket(item, kind))},server=on,wait=off"

    def _do_mon(self, item: _Item) -> None:
        if _is_control(item):
            self._change(item, "left out; QMP is at the socket that --qmp names")
        else:
            self._emit(item)

    def _do_chardev(self, item: _Item) -> None:
        options = self._options(item)
        if options is None:
            return
        identity = options.get("id")
        if identity in self._qmp_chardevs and self._used_chardevs[identity] == 1:
            self._change(item, "left out; QMP is at the socket that --qmp names")
            return
        backend = options.get("backend")
        if backend in _QUIET_CHARDEVS or options.has("logfile"):
            for key in ("path", "logfile"):
                self._check_property(item, key, options.get(key))
        if backend == "stdio" or (backend == "socket" and options.is_on("server")):
            if backend == "socket" and self._keep_endpoints:
                if options.has("path"):
                    self._trust(item, _REPLACES)
                # Waiting for a client would keep QEMU from answering us.
                options = options.with_("wait", value=False)
            else:
                options = self._moved(item, options)
        elif backend not in _QUIET_CHARDEVS:
            self._trust(item, "connects, or opens a file or device of the host")
        self._emit(item, options)

    def _moved(self, item: _Item, options: OptionString) -> OptionString:
        """Turn a chardev that listens, or uses the terminal, into a new socket."""
        kept = {key: options.get(key) for key in ("mux", "logfile", "logappend")}
        new = OptionString.parse("socket", implied="backend")
        new = new.with_("id", options.get("id"))
        new = new.with_("path", self._socket(item, "chardev"))
        new = new.with_("server", value=True).with_("wait", value=False)
        if options.is_on("telnet"):
            new = new.with_("telnet", value=True)
        for key, value in kept.items():
            if value:
                new = new.with_(key, value)
        return new

    def _do_nographic(self, item: _Item) -> None:
        self._emit(item)
        # What -nographic would put on stdio (QEMU's qemu_create_default_devices).
        names = {other.option.name for other in self._items}
        drivers = {
            _parsed(other).get("driver")
            for other in self._items
            if other.option.name == "device"
        }
        if "nodefaults" in names or "serial" in names or "isa-serial" in drivers:
            return
        self.out += ["-serial", f"unix:{self._server(item, 'serial')}"]

    def _do_vnc(self, item: _Item) -> None:
        if item.value == "none" or self._keeps_display(item, item.value):
            self._emit(item)
        else:
            self._emit(item, self._vnc(item, item.value))

    def _keeps_display(self, item: _Item, address: str) -> bool:
        if self._keep_endpoints and "unix" in address:
            self._trust(item, _REPLACES)
        return self._keep_endpoints

    def _vnc(self, item: _Item, value: str) -> str:
        options = OptionString.parse(value, implied="vnc")
        kept = {
            key: options.get(key)
            for key in (
                "share",
                "display",
                "head",
                "id",
                "audiodev",
                "lossy",
                "non-adaptive",
                "key-delay-ms",
                "power-control",
            )
            if options.has(key)
        }
        address = f"unix:{escape(self._socket(item, 'vnc'))}"
        return ",".join([address, *(f"{k}={escape(v)}" for k, v in kept.items())])

    def _do_display(self, item: _Item) -> None:
        kind, _, rest = item.value.partition("=")
        if kind == "vnc":
            if rest == "none" or self._keeps_display(item, rest):
                self._emit(item)
            else:
                self._emit(item, f"vnc={self._vnc(item, rest)}")
            return
        options = self._options(item)
        if options is None:
            return
        kind = options.get("type")
        if kind == "curses":
            self._change(item, "none, since QEMU has no terminal now")
            self._emit(item, "none")
            return
        if kind == "spice-app":
            self._trust(item, "starts a viewer")
        if options.has("addr") or options.has("p2p") or options.has("rendernode"):
            self._trust(item, "reaches what belongs to the host")
        self._emit(item)

    def _do_spice(self, item: _Item) -> None:
        if self._keeps_display(item, item.value):
            self._emit(item)
            return
        options = _parsed(item)
        gone = [
            key
            for key, _ in options.pairs()
            if key
            in (
                "port",
                "tls-port",
                "addr",
                "ipv4",
                "ipv6",
                "unix",
                "sasl",
                "password",
                "password-secret",
                "disable-ticketing",
                "ticketing",
                "plaintext-channel",
            )
            or key.startswith(("x509-", "tls-"))
        ]
        options = options.without(*gone).with_("unix", value=True)
        options = options.with_("addr", self._socket(item, "spice"))
        self._emit(item, options.with_("disable-ticketing", value=True))


def _parsed(item: _Item) -> OptionString:
    """Parse an argument; the planner has refused the ones that cannot be."""
    # A legacy description (`unix:PATH,server`) is not a property at all.
    implied = _IMPLIED.get(item.option.name, "")
    return OptionString.parse(item.value, implied=implied)


def _is_control(item: _Item) -> bool:
    return _parsed(item).get("mode") == "control"


def _refers_to_file(item: _Item, node: str) -> bool:
    """Tell whether a -blockdev has a named node as its file."""
    if item.option.name != "blockdev" or not node:
        return False
    return _parsed(item).get("file") == node


# ---------------------------------------------------------------------- table


def table() -> str:
    """Return :data:`OPTIONS` as the table of COMMAND-LINE.md."""
    groups: dict[tuple[Fate, str, str], list[str]] = {}
    for option in OPTIONS.values():
        name = f"`-{option.name}`" if option.name else "a bare disk image"
        # Options without details and handler are listed together.
        key = (option.fate, option.details, option.handler if option.details else "")
        groups.setdefault(key, []).append(name)
    lines = ["| option | a restore | details |", "| --- | --- | --- |"]
    lines += [
        f"| {' '.join(names)} | {fate} | {details} |"
        for (fate, details, _), names in groups.items()
    ]
    return "\n".join(lines)
