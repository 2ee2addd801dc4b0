# SPDX-License-Identifier: LGPL-2.1-or-later
"""The ways of bringing a guest back, each behind the same few calls."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import qemu_pagesaver
from tests.support.vm import Vm

from . import page_cache


@dataclass(frozen=True, kw_only=True)
class Source:
    """The files that one saved guest left, and the guest's shape."""

    directory: Path
    memory: int  # MiB

    def file(self, name: str) -> Path:
        return self.directory / name


def save_all(vm: Vm, directory: Path, *, templates: bool = True) -> Source:
    """Save one running redis guest by every way; it runs on afterwards."""
    source = Source(directory=directory, memory=vm.memory)
    stock_save(vm, source.file("stream"), {})
    stock_save(vm, source.file("mapped"), {"mapped-ram": True})
    stock_save(vm, source.file("mapped-multifd"), {"mapped-ram": True, "multifd": True})
    for name, compression in (("ours.psnap", "zstd:3"), ("plain.psnap", "none")):
        qemu_pagesaver.save(
            vm.qmp_path, source.file(name), compression=compression, disks="none"
        )
    if templates:
        make_template(vm, source)
    return source


def set_capabilities(vm: Vm, states: dict[str, bool]) -> None:
    vm.qmp.command(
        "migrate-set-capabilities",
        capabilities=[{"capability": k, "state": v} for k, v in states.items()],
    )


def stock_save(vm: Vm, path: Path, capabilities: dict[str, bool]) -> None:
    """Save by QEMU itself to a file; the guest runs on."""
    set_capabilities(vm, capabilities)
    vm.qmp.command("migrate-set-parameters", max_bandwidth=1 << 40, multifd_channels=2)
    vm.qmp.command("migrate", uri=f"file:{path}")
    vm.qmp.wait_migration("completed", deadline=600)
    set_capabilities(vm, dict.fromkeys(capabilities, False))
    vm.qmp.command("cont")


def make_template(vm: Vm, source: Source) -> None:
    """QEMU's VM templating: RAM in a shared file, devices in a stream."""
    ram = source.file("template-ram")
    options = f"size={vm.memory}M,mem-path={ram},share=on"
    with Vm(
        vm.qemu,
        vm.guest,
        memory=vm.memory,
        machine="pc,memory-backend=pc.ram",
        incoming=True,
        paused=True,
        extra=["-object", f"memory-backend-file,id=pc.ram,{options}"],
    ) as template:
        template.start()
        template.qmp.command("migrate-incoming", uri=f"file:{source.file('stream')}")
        template.qmp.wait_migration("completed", deadline=600)
        set_capabilities(template, {"x-ignore-shared": True})
        template.qmp.command("migrate-set-parameters", max_bandwidth=1 << 40)
        template.qmp.command("migrate", uri=f"file:{source.file('template-devices')}")
        template.qmp.wait_migration("completed", deadline=600)


class Contender:
    """One way of restoring: begin() after QMP answered, end() at the end."""

    name = ""
    files: tuple[str, ...] = ()

    def vm_options(self, source: Source) -> dict[str, Any]:
        """Return what the destination's command line needs beyond the usual."""
        return {"memory": source.memory}

    def prepare(self) -> None:
        """Do what is no part of the measured time."""

    def begin(self, vm: Vm, source: Source) -> None:
        """Start the restore; returns at once."""
        raise NotImplementedError

    def pager_pid(self) -> int | None:
        """Return the process beside QEMU, if there is one."""
        return None

    def end(self) -> dict[str, Any]:
        """Wait until all is loaded; figures that only this way knows."""
        return {}

    def warm(self, source: Source) -> None:
        """Bring the files into the page cache."""
        for name in self.files:
            page_cache.warm(source.file(name))


@dataclass
class Stock(Contender):
    """QEMU alone: `-incoming file:`."""

    name: str = "stock stream"
    files: tuple[str, ...] = ("stream",)
    capabilities: dict[str, bool] = field(default_factory=dict)

    def begin(self, vm: Vm, source: Source) -> None:
        if self.capabilities:
            set_capabilities(vm, self.capabilities)
        if self.capabilities.get("multifd"):
            vm.qmp.command("migrate-set-parameters", multifd_channels=2)
        vm.qmp.command("migrate-incoming", uri=f"file:{source.file(self.files[0])}")


@dataclass
class Template(Stock):
    """QEMU's VM templating, private mapping at the restore."""

    name: str = "VM templating"
    files: tuple[str, ...] = ("template-devices", "template-ram")
    capabilities: dict[str, bool] = field(
        default_factory=lambda: {"x-ignore-shared": True}
    )

    def vm_options(self, source: Source) -> dict[str, Any]:
        path = source.file("template-ram")
        options = f"size={source.memory}M,mem-path={path},share=off"
        return {
            "memory": source.memory,
            "machine": "pc,memory-backend=pc.ram",
            "extra": ["-object", f"memory-backend-file,id=pc.ram,{options}"],
        }

    def begin(self, vm: Vm, source: Source) -> None:
        super().begin(vm, source)
        # The template was made of a guest that stood still.
        vm.qmp.wait_migration("completed")
        vm.qmp.command("cont")


@dataclass
class Ours(Contender):
    """qemu_pagesaver, with the options of restore_async()."""

    name: str = "ours"
    files: tuple[str, ...] = ("ours.psnap",)
    options: dict[str, Any] = field(default_factory=dict)

    def prepare(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._wait("ready")

    def begin(self, vm: Vm, source: Source) -> None:
        path = str(source.file(self.files[0]))
        options = {"file": path, "attach": str(vm.qmp_path), **self.options}
        assert self._child.stdin
        self._child.stdin.write(json.dumps(options) + "\n")
        self._child.stdin.flush()

    def pager_pid(self) -> int | None:
        return self._child.pid

    def end(self) -> dict[str, Any]:
        try:
            return self._wait("result")
        finally:
            self.stop()

    def stop(self) -> None:
        """End the child, whatever it does."""
        if self._child.poll() is None:
            self._child.terminate()
        self._child.wait(60)
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe:
                pipe.close()

    def _wait(self, name: str) -> dict[str, Any]:
        assert self._child.stdout
        for line in self._child.stdout:
            message: dict[str, Any] = json.loads(line)
            if message["event"] == name:
                return message
        raise RuntimeError(f"the restoring child ended before {name!r}")


def everyone() -> list[Contender]:
    """Return all contenders of the restore tables."""
    mapped = {"mapped-ram": True}
    return [
        Stock(),
        Stock(name="mapped-ram", files=("mapped",), capabilities=mapped),
        Stock(
            name="mapped-ram + multifd",
            files=("mapped-multifd",),
            capabilities={**mapped, "multifd": True},
        ),
        Template(),
        Ours(),
        Ours(name="ours, no prefetch", options={"prefetch": "none"}),
    ]
