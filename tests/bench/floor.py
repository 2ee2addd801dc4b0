# SPDX-License-Identifier: LGPL-2.1-or-later
"""The floor: a pager that is a flat array of pages (native/tests/floor_pager.c)."""

from __future__ import annotations

import json
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import qemu_pagesaver
from qemu_pagesaver import postcopy
from qemu_pagesaver.native import PAGE_SIZE, Section
from tests.support.vm import Vm

from .contenders import Contender, Source, set_capabilities

PROGRAM = Path("build/native/tests/floor_pager")
_PONG = 8  # bytes
_READ_PAGES = 4096


class Floor(Contender):
    """Answers one page a request from memory that is all there.

    With `push` it sends everything, too.
    """

    name = "floor, uncompressed"

    def __init__(self, file: str = "touch-plain.psnap", *, push: bool = False) -> None:
        self.files = (file,)
        self._push = push

    def prepare(self) -> None:
        """Do nothing: what it needs it makes in begin()."""

    def begin(self, vm: Vm, source: Source) -> None:
        with qemu_pagesaver.open(source.file(self.files[0])) as snapshot:
            image = snapshot.image
            blocks = [
                postcopy.Block(name=b.name, length=b.length, page_size=PAGE_SIZE)
                for b in image.ram_blocks
            ]
            stream = image.info().stream
            opening = postcopy.opening(
                stream=stream,
                configuration=image.section(Section.CONFIGURATION),
                blocks=blocks,
                page_sizes=[PAGE_SIZE],
                host_page_size=PAGE_SIZE,
            )
            package = postcopy.package(image.section(Section.DEVICES))
            self._flat = tempfile.NamedTemporaryFile(dir=source.directory)  # noqa: SIM115
            places, at = [], 0
            for block in image.ram_blocks:
                pages = block.length // PAGE_SIZE
                for first in range(0, pages, _READ_PAGES):
                    count = min(_READ_PAGES, pages - first)
                    self._flat.write(image.read_pages(block.index, first, count))
                places.append(f"{at}:{block.length}:{block.name}")
                at += block.length
            self._flat.flush()
        path = vm.directory / "in"
        set_capabilities(vm, {"postcopy-ram": True})
        vm.qmp.command("migrate-incoming", uri=f"unix:{path}")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            sock.sendall(opening)
            for _ in range(2):  # PONGs of both PINGs
                sock.recv(_PONG, socket.MSG_WAITALL)
            number, footers = str(stream.ram_section_id), str(int(stream.footers))
            command = [str(PROGRAM), str(sock.fileno()), self._flat.name]
            self._process = subprocess.Popen(
                [*command, number, footers, str(int(self._push)), *places],
                pass_fds=(sock.fileno(),),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            assert self._process.stderr
            said = self._process.stderr.readline()
            if said != b"ready\n":
                raise RuntimeError(f"the floor cannot start: {said!r}")
            sock.sendall(package)

    def end(self) -> dict[str, Any]:
        out, errors = self._process.communicate(timeout=60)
        self._flat.close()
        if self._process.returncode:
            raise RuntimeError(f"the floor failed: {errors!r}")
        found: dict[str, Any] = json.loads(out)
        return {
            "latency": {q: found[f"{q}-ns"] / 1e9 for q in ("p50", "p99")},
            "duration": found["all-ns"] / 1e9,
        }
