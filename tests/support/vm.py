# SPDX-License-Identifier: LGPL-2.1-or-later
"""A QEMU with a guest in it, in a private directory, ended by its own pid."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from .console import DEADLINE, Console, PatternConsole, ShellConsole
from .qemus import GuestFiles, Qemu, guest_files
from .qmp import Qmp
from .redisclient import RedisClient

_BOOT_DEADLINE = 120.0
_SERIAL = "socket,id=serial0,server=on,wait=off"


def private_directory() -> Path:
    """On disk, and short enough for unix sockets."""
    return Path(tempfile.mkdtemp(prefix="psv-", dir="/var/tmp"))


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class Vm:
    """One QEMU process.

    `qmp_path` is the monitor for the product under test; `qmp` is the harness's
    own, on a second socket (`own_monitor=False`: there is none, and `qmp` uses
    the first, which takes one client at a time).
    """

    def __init__(
        self,
        qemu: Qemu,
        guest: str,
        *,
        memory: int | None = None,
        machine: str | None = None,
        smp: int = 1,
        network: bool | None = None,
        writable_disk: bool | Path = False,
        incoming: bool = False,
        paused: bool = False,
        own_monitor: bool = True,
        extra: Sequence[str] = (),
        append: str = "",
        command: Sequence[str] | None = None,
    ) -> None:
        """Describe; `start` runs it.

        memory: MiB. machine: the usual one of its architecture. network: slirp and
        a virtio-net device (default: where the guest has a driver). writable_disk:
        the root disk is writable, on a fresh qcow2 overlay or on the one given.
        command: replaces the arguments.
        """
        self.qemu = qemu
        self.files: GuestFiles = guest_files(guest)
        self.guest = guest
        kind, architecture = self.files.kind, self.files.architecture
        self.system = qemu.system_for(architecture)
        self.memory = memory or {"pattern": 128, "busybox": 256, "redis": 2048}[kind]
        self.machine = machine or architecture.machine
        self.smp = smp
        self.network = kind != "pattern" if network is None else network
        self.writable_disk = writable_disk
        self.incoming = incoming
        self.paused = paused
        self.own_monitor = own_monitor
        self.extra = list(extra)
        self.append = append
        self.directory = private_directory()
        self.qmp_path = self.directory / "qmp"
        self.own_qmp_path = self.directory / "own-qmp" if own_monitor else self.qmp_path
        self.serial_path = self.directory / "serial"
        self.log_path = self.directory / "log"
        self.redis_port = free_port() if kind == "redis" else None
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._qmp: Qmp | None = None
        self._console: Console | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # The command line

    def arguments(self) -> list[str]:
        """QEMU's arguments, its name first."""
        if self._command is not None:
            return list(self._command)
        arguments = [
            *(str(self.system), "-name", f"{self.guest},debug-threads=on"),
            *("-machine", self.machine, *self.files.architecture.options),
            *("-accel", "tcg", "-nodefaults"),
            *("-display", "none", "-m", f"{self.memory}M", "-smp", str(self.smp)),
            *("-qmp", f"unix:{self.qmp_path},server=on,wait=off"),
            *("-chardev", f"{_SERIAL},path={self.serial_path}"),
            *("-serial", "chardev:serial0"),
            *("-kernel", str(self.files.kernel)),
        ]
        if self.own_monitor:
            arguments += ["-qmp", f"unix:{self.own_qmp_path},server=on,wait=off"]
        if self.files.initrd:
            arguments += ["-initrd", str(self.files.initrd)]
            arguments += ["-append", self._append()]
        if self.network:
            arguments += ["-netdev", self._netdev()]
            arguments += ["-device", "virtio-net-pci,netdev=net0"]
        if self.files.disk:
            arguments += ["-drive", self._drive(self.files.disk)]
            arguments += ["-device", "virtio-blk-pci,drive=root"]
        arguments += self.extra
        if self.incoming:
            arguments += ["-incoming", "defer"]
        if self.paused or not self.incoming:
            arguments += ["-S"]
        return arguments

    def _append(self) -> str:
        append = f"console={self.files.architecture.serial} quiet loglevel=1 panic=-1"
        if self.files.disk:
            append += " guest.root=" + ("rw" if self.writable_disk else "overlay")
        if self.append:
            append += f" {self.append}"
        return append

    def _netdev(self) -> str:
        netdev = "user,id=net0"
        if self.redis_port is not None:
            netdev += f",hostfwd=tcp:127.0.0.1:{self.redis_port}-:6379"
        return netdev

    def _drive(self, disk: Path) -> str:
        drive = "id=root,if=none,"
        if not self.writable_disk:
            return f"{drive}format=raw,readonly=on,file={disk}"
        if isinstance(self.writable_disk, Path):
            overlay = self.writable_disk
        else:
            overlay = self.directory / "root.qcow2"
            create = [str(self.qemu.img), "create", "-q", "-f", "qcow2", "-F", "raw"]
            subprocess.run([*create, "-b", str(disk), str(overlay)], check=True)
        return f"{drive}format=qcow2,file={overlay}"

    # Life

    def start(self, *, wait: bool = True) -> Self:
        """Run QEMU and, unless incoming or paused, boot the guest to its ready line.

        A booting guest is started with -S and continued when the console listens,
        so that nothing it says is lost. Without WAIT it boots while we return.
        """
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self.arguments(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            if self.own_monitor:
                self.qmp.command("query-status")  # QEMU listens now
            if not self.incoming and not self.paused:
                console = self.console
                self.qmp.command("cont")
                if wait:
                    console.wait_ready(_BOOT_DEADLINE)
        except BaseException:
            self.close()
            raise
        return self

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """What QEMU said on stdout and stderr."""
        return self.log_path.read_text(errors="replace")

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal and wait for the end."""
        if self.alive and self._process is not None:
            self._process.send_signal(number)
            self._process.wait(DEADLINE)
        self._disconnect()

    def quit(self) -> None:
        self.qmp.command("quit")
        self.wait()

    def wait(self, deadline: float = DEADLINE) -> int:
        """Wait until QEMU has ended; its status."""
        assert self._process is not None, "not started"
        status = self._process.wait(deadline)
        self._disconnect()
        return status

    def _disconnect(self) -> None:
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None
        if self._console is not None:
            self._console.close()
            self._console = None

    def close(self) -> None:
        """End QEMU if it runs; remove the directory."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    # Talk

    @property
    def qmp(self) -> Qmp:
        if self._qmp is None:
            self._qmp = Qmp(self.own_qmp_path)
        return self._qmp

    @property
    def console(self) -> Console:
        if self._console is None:
            kind = PatternConsole if self.files.kind == "pattern" else ShellConsole
            self._console = kind(self.serial_path)
        return self._console

    @property
    def pattern(self) -> PatternConsole:
        assert isinstance(self.console, PatternConsole)
        return self.console

    @property
    def shell(self) -> ShellConsole:
        assert isinstance(self.console, ShellConsole)
        return self.console

    def redis(self, deadline: float = DEADLINE) -> RedisClient:
        """A new connection to the guest's redis."""
        assert self.redis_port is not None
        return RedisClient(self.redis_port, deadline)

    # Stock migration, and what is seen from outside

    def save_stream(self, path: Path, deadline: float = 600.0) -> None:
        """Write QEMU's own stream to PATH; the guest ends up postmigrate."""
        self.qmp.command("migrate-set-parameters", max_bandwidth=1 << 40)
        self.qmp.command("migrate", uri=f"exec:cat > '{path}'")
        self.qmp.wait_migration("completed", deadline=deadline)

    def load_stream(self, path: Path, deadline: float = 600.0) -> None:
        """Load QEMU's own stream, as `incoming=True` waits for it."""
        self.qmp.command("migrate-incoming", uri=f"exec:cat '{path}'")
        self.qmp.wait_migration("completed", deadline=deadline)

    def physical_memory(self, address: int, length: int) -> bytes:
        """Guest-physical memory, as QEMU sees it (missing pages are asked for)."""
        path = self.directory / "pmemsave"
        try:
            self.qmp.command(
                "pmemsave", val=address, size=length, filename=str(path), deadline=600.0
            )
            return path.read_bytes()
        finally:
            path.unlink(missing_ok=True)

    def memory_bytes(self) -> int:
        """Resident memory of QEMU (PSS)."""
        return pss(self.pid)

    def cpu_seconds(self) -> float:
        return cpu_seconds(self.pid)


def pss(pid: int) -> int:
    """Proportional resident memory of a process, in bytes."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Pss")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_for_end(pid: int, deadline: float = DEADLINE) -> None:
    """Wait until a process that is not our child is gone."""
    end = time.monotonic() + deadline
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end, f"process {pid} still runs"
        time.sleep(0.01)
