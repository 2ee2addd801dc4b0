# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether this host can save and restore on demand, and what would let it."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import json
import os
import platform
import resource
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from qemu_pagesaver import control, errors, files
from qemu_pagesaver.convert import default_spool

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

State: TypeAlias = Literal["ok", "note", "lacking"]

_SYSCTL = Path("/proc/sys/vm/unprivileged_userfaultfd")
_DEVICE = Path("/dev/userfaultfd")
_THP = Path("/sys/kernel/mm/transparent_hugepage")
# userfaultfd(2) by machine (Linux: arch/*/entry/syscalls).
_SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282, "riscv64": 282, "s390x": 355}
_USERFAULTFD_IOC_NEW = 0xAA00
_KVM_GET_API_VERSION = 0xAE00
_KVM_API_VERSION = 12

_PROBE_TIMEOUT = 20.0
_LITTLE_SPACE = 1 << 30
_FEW_FILES = 256
_SHMEM_HUGE = ("always", "within_size", "force")
# Used where a QEMU has them; none is needed.
_USEFUL = ("postcopy-preempt", "background-snapshot", "mapped-ram", "x-ignore-shared")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at.

    ``state``: "lacking" is what no restore on demand can do without. ``remedy``
    is the command, or the advice, that would change it.
    """

    name: str
    state: State
    text: str
    remedy: str = ""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """All findings; ``ok`` unless something needed is lacking."""

    ok: bool
    findings: tuple[Finding, ...]


def host_validate(
    *,
    qemu: Sequence[str] = (),
    spool_dir: str | os.PathLike[str] | None = None,
) -> Validation:
    """Look at this host; see :func:`host_validate_async`."""
    return asyncio.run(host_validate_async(qemu=qemu, spool_dir=spool_dir))


async def host_validate_async(
    *,
    qemu: Sequence[str] = (),
    spool_dir: str | os.PathLike[str] | None = None,
) -> Validation:
    """Look at this host as the user who calls.

    Args:
        qemu: QEMU binaries; none: those of PATH for this machine's architecture.
        spool_dir: Where saves are to spool; None: /var/tmp.
    """
    findings = [
        *_host(),
        *_userfaultfd(),
        _kvm(),
        *_huge_pages(),
        _runtime_directory(),
        _spool(Path(spool_dir) if spool_dir is not None else default_spool()),
        *_limits(),
    ]
    binaries = list(qemu) or _binaries()
    if not binaries:
        findings.append(
            Finding(
                name="qemu",
                state="lacking",
                text=f"no qemu-system-{platform.machine()} in PATH",
                remedy=f"apt-get install {_package()}, or --qemu BINARY",
            )
        )
    for binary in binaries:
        findings.append(await _qemu(binary))
    return Validation(
        ok=all(finding.state != "lacking" for finding in findings),
        findings=tuple(findings),
    )


# ----------------------------------------------------------------- the kernel


def _host() -> Iterator[Finding]:
    size = os.sysconf("SC_PAGE_SIZE")
    yield Finding(
        name="page-size",
        state="ok" if size == 4096 else "lacking",
        text=f"{platform.machine()}, Linux {platform.release()}, pages of {size} bytes",
        remedy="" if size == 4096 else "use a kernel with pages of 4096 bytes",
    )
    cpus = len(os.sched_getaffinity(0))
    yield Finding(
        name="cpus",
        state="ok" if cpus > 1 else "note",
        text=f"{cpus} CPU{'s' if cpus > 1 else ''} to run on"
        + ("" if cpus > 1 else ": QEMU and the pager share it"),
    )


def _userfaultfd() -> Iterator[Finding]:
    """Try what QEMU tries: the device (8.0 on), else the system call.

    QEMU needs faults of the kernel reported as well (KVM, system calls), so
    UFFD_USER_MODE_ONLY would not do.
    """
    refused = _try_syscall()
    by_device = _try_device()
    sysctl = _read(_SYSCTL)
    if not refused:
        yield Finding(
            name="userfaultfd",
            state="ok",
            text="the system call is allowed for this user",
        )
    elif not by_device:
        yield Finding(
            name="userfaultfd",
            state="note",
            text=f"{_DEVICE} can be used; the system call is refused ({refused}), "
            "so QEMU before 8.0 cannot restore on demand",
            remedy="sysctl -w vm.unprivileged_userfaultfd=1",
        )
    else:
        yield Finding(
            name="userfaultfd",
            state="lacking",
            text=f"the system call is refused ({refused}; "
            f"vm.unprivileged_userfaultfd={sysctl or 'absent'}), and {_DEVICE} "
            f"({by_device})",
            remedy="sysctl -w vm.unprivileged_userfaultfd=1, or "
            f"setfacl -m u:{_user()}:rw {_DEVICE}; in a container: --device {_DEVICE}",
        )


def _try_syscall() -> str:
    """Return why userfaultfd(2) is refused, or ""."""
    number = _SYS_USERFAULTFD.get(platform.machine())
    if number is None:
        return "its number is not known here"
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(ctypes.c_long(number), ctypes.c_int(os.O_CLOEXEC | os.O_NONBLOCK))
    if fd < 0:
        return os.strerror(ctypes.get_errno())
    os.close(fd)
    return ""


def _try_device() -> str:
    """Return why /dev/userfaultfd cannot be used, or ""."""
    try:
        fd = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return error.strerror or str(error)
    try:
        os.close(fcntl.ioctl(fd, _USERFAULTFD_IOC_NEW, os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        return error.strerror or str(error)
    finally:
        os.close(fd)
    return ""


def _kvm() -> Finding:
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return Finding(
            name="kvm",
            state="note",
            text=f"/dev/kvm: {error.strerror}; guests run without it (TCG), slowly",
            remedy=""
            if isinstance(error, FileNotFoundError)
            else f"adduser {_user()} kvm",
        )
    try:
        version = fcntl.ioctl(fd, _KVM_GET_API_VERSION)
    except OSError as error:
        return Finding(name="kvm", state="note", text=f"/dev/kvm: {error.strerror}")
    finally:
        os.close(fd)
    right = version == _KVM_API_VERSION
    return Finding(
        name="kvm",
        state="ok" if right else "note",
        text="/dev/kvm can be used" if right else f"/dev/kvm has version {version}",
    )


def _huge_pages() -> Iterator[Finding]:
    """Say what is set: postcopy switches them off for anonymous memory itself."""
    for name, what in (("enabled", "anonymous memory"), ("shmem_enabled", "shmem")):
        chosen = _read(_THP / name).partition("[")[2].partition("]")[0]
        if not chosen:
            continue
        loud = name == "shmem_enabled" and chosen in _SHMEM_HUGE
        yield Finding(
            name="huge-pages" if name == "enabled" else "huge-pages-shmem",
            state="note" if loud else "ok",
            text=f"transparent huge pages for {what}: {chosen}",
            remedy=f"echo never > {_THP / name}" if loud else "",
        )


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""


def _user() -> str:
    import pwd  # noqa: PLC0415 - needed for advice only

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())


# ------------------------------------------------------------ places, limits


def _runtime_directory() -> Finding:
    try:
        place = control.runtime_directory()
    except errors.PagesaverError as error:
        return Finding(
            name="runtime-directory",
            state="lacking",
            text=error.message,
            remedy=error.hint or f"set {control.RUNTIME_VARIABLE} to a directory",
        )
    return Finding(name="runtime-directory", state="ok", text=str(place))


def _spool(place: Path) -> Finding:
    try:
        with files.spool_file(place):
            pass
        space = os.statvfs(place)
        kind = files.file_system(place)
        in_memory = files.is_memory(place)
    except (errors.PagesaverError, OSError) as error:
        return Finding(
            name="spool",
            state="lacking",
            text=str(error),
            remedy="name a directory with --spool-dir",
        )
    free = space.f_bavail * space.f_frsize
    text = f"{place} ({kind or 'unknown file system'}), {free / (1 << 30):.1f} GiB free"
    if in_memory:
        return Finding(
            name="spool",
            state="note",
            text=f"{text}: what is spooled there stays in memory",
            remedy="name a directory on disk with --spool-dir",
        )
    little = free < _LITTLE_SPACE
    return Finding(
        name="spool",
        state="note" if little else "ok",
        text=text,
        remedy="free space, or name another directory with --spool-dir"
        if little
        else "",
    )


def _limits() -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < _FEW_FILES
    yield Finding(
        name="open-files",
        state="note" if few else "ok",
        text=f"at most {soft} open files",
        remedy=f"ulimit -n {_FEW_FILES}" if few else "",
    )
    size, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if size != resource.RLIM_INFINITY:
        yield Finding(
            name="file-size",
            state="note",
            text=f"files may have {size} bytes at most",
            remedy="ulimit -f unlimited",
        )
    space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if space != resource.RLIM_INFINITY:
        yield Finding(
            name="address-space",
            state="note",
            text=f"processes may have {space} bytes of address space",
            remedy="ulimit -v unlimited",
        )


# ---------------------------------------------------------------------- QEMU


def _binaries() -> list[str]:
    names = [f"qemu-system-{platform.machine()}", "qemu-kvm"]
    found = [path for path in map(shutil.which, names) if path]
    libexec = Path("/usr/libexec/qemu-kvm")
    if libexec.exists():
        found.append(str(libexec))
    return found


def _package() -> str:
    """Return the Debian package of this machine's QEMU."""
    families = {"aarch64": "arm", "x86_64": "x86", "s390x": "s390x"}
    return f"qemu-system-{families.get(platform.machine(), 'misc')}"


async def _qemu(binary: str) -> Finding:
    """Start a QEMU without a machine and ask it for postcopy, as restore will."""
    name = f"qemu {Path(binary).name}"
    try:
        version, capabilities, refused = await asyncio.wait_for(
            _probe(binary), _PROBE_TIMEOUT
        )
    except (OSError, ValueError, EOFError, TimeoutError, KeyError, TypeError) as error:
        reason = (
            f"no answer within {_PROBE_TIMEOUT:g} s"
            if isinstance(error, TimeoutError)
            else str(error)
        )
        return Finding(
            name=name,
            state="lacking",
            text=f"{binary} cannot be asked: {reason}",
            remedy=f"see what `{shlex.quote(binary)} --version` says",
        )
    useful = [each for each in _USEFUL if each in capabilities]
    text = f"{binary}, version {version}; has {', '.join(useful) or 'no extras'}"
    if "postcopy-ram" not in capabilities:
        return Finding(
            name=name,
            state="lacking",
            text=f"{text}; it has no postcopy-ram",
            remedy="use a QEMU that was built with postcopy (Linux)",
        )
    if refused:
        return Finding(
            name=name,
            state="lacking",
            text=f"{text}; it refuses postcopy-ram: {refused}",
            remedy="see userfaultfd" if "serfault" in refused else "",
        )
    return Finding(name=name, state="ok", text=f"{text}; postcopy-ram accepted")


async def _probe(binary: str) -> tuple[str, frozenset[str], str]:
    """Return version, migration capabilities, and why postcopy is refused."""
    process = await asyncio.create_subprocess_exec(
        *(binary, "-M", "none", "-nodefaults", "-display", "none", "-S"),
        *("-accel", "tcg", "-incoming", "defer", "-qmp", "stdio"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        limit=1 << 20,
    )
    try:
        greeting = await _read_message(process)
        numbers = greeting["QMP"]["version"]["qemu"]
        version = ".".join(str(numbers[key]) for key in ("major", "minor", "micro"))
        await _ask(process, "qmp_capabilities")
        listed = await _ask(process, "query-migrate-capabilities")
        capabilities = frozenset(each["capability"] for each in listed["return"])
        wanted = {"capabilities": [{"capability": "postcopy-ram", "state": True}]}
        answer = await _ask(process, "migrate-set-capabilities", wanted)
        refused = answer.get("error", {}).get("desc", "")
        return version, capabilities, str(refused)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _ask(
    process: asyncio.subprocess.Process,
    command: str,
    arguments: dict[str, Any] | None = None,
) -> dict[str, Any]:
    assert process.stdin is not None  # noqa: S101 - we made it a pipe
    message = {"execute": command, "arguments": arguments or {}}
    process.stdin.write(json.dumps(message).encode() + b"\n")
    await process.stdin.drain()
    while True:
        answer = await _read_message(process)
        if "return" in answer or "error" in answer:
            return answer


async def _read_message(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None  # noqa: S101 - we made it a pipe
    line = await process.stdout.readline()
    if not line:
        raise EOFError("it ended without an answer")
    message = json.loads(line)
    if not isinstance(message, dict):
        raise TypeError("it does not speak QMP")
    return message
