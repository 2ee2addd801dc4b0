# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is measured. Every scenario interleaves its contenders in one run."""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import qemu_pagesaver
from tests.support import qemus
from tests.support.console import PatternConsole, Touch
from tests.support.redisclient import RedisClient, key, keys_for, value
from tests.support.vm import Vm, pss

from . import page_cache
from .contenders import (
    Contender,
    Ours,
    Source,
    everyone,
    save_all,
    set_capabilities,
)
from .figures import Table
from .floor import Floor

MIB = 1 << 20


@contextlib.contextmanager
def redis_guest(memory: int, in_use: int) -> Iterator[tuple[Vm, int]]:
    """A redis guest with about `in_use` MiB not zero; (guest, keys)."""
    with Vm(qemus.get(), "redis", memory=memory) as vm:
        vm.start()
        # The system itself takes about 80 MiB, redis 1.3 times its values.
        count = keys_for(max(8, int((in_use - 80) / 1.3)))
        with vm.redis() as redis:
            redis.load(count)
        yield vm, count


def restore_once(
    contender: Contender, source: Source, count: int, table: Table
) -> None:
    """Measure one restore of a redis guest and add it to the table."""
    contender.prepare()
    options = contender.vm_options(source)
    with Vm(qemus.get(), "redis", incoming=True, **options) as vm:
        vm.start()
        start = time.monotonic()
        cpu_before = vm.cpu_seconds()
        contender.begin(vm, source)
        vm.qmp.event("RESUME", deadline=120)
        running = time.monotonic() - start
        with RedisClient(vm.redis_port or 0) as redis:
            reply = time.monotonic() - start
            memory = vm.memory_bytes()
            rng = random.Random(1)
            sample = [rng.randrange(count) for _ in range(10_000)]
            for i in sample:
                if redis.get(key(i)) != value(i):
                    raise AssertionError(f"{contender.name}: {key(i)} is wrong")
            keys = time.monotonic() - start
        pager = contender.pager_pid()
        pager_memory = pss(pager) / MIB if pager else None
        end = contender.end()
        latency = end.get("latency", {})
        table.add(
            contender.name,
            running_s=running,
            first_reply_s=reply,
            **{"10000_keys_s": keys},
            QEMU_MiB_at_reply=memory / MIB,
            pager_MiB=pager_memory,
            QEMU_CPU_s=vm.cpu_seconds() - cpu_before,
            pager_CPU_s=end.get("pager-cpu"),
            faults=end.get("faults"),
            pages_sent=sum(end["pages-sent"].values()) if end else None,
            fault_p50_us=latency["p50"] * 1e6 if latency else None,
            fault_p99_us=latency["p99"] * 1e6 if latency else None,
            fault_max_us=latency["max"] * 1e6 if latency else None,
        )


def restore_table(
    directory: Path, memory: int, in_use: int, pairs: int, *, cold: bool
) -> list[Table]:
    """Compare all ways on one guest; with a warm and maybe a cold page cache."""
    tables = []
    with redis_guest(memory, in_use) as (vm, count):
        source = save_all(vm, directory)
    for state in ("warm", "cold") if cold else ("warm",):
        table = Table(
            f"{memory} MiB of RAM, about {in_use} MiB in use, page cache {state}",
            "Seconds from QMP answering; median (lowest-highest).",
        )
        contenders = everyone()
        for turn in range(pairs):
            for contender in contenders[:: 1 if turn % 2 else -1]:
                if state == "cold":
                    page_cache.drop()
                else:
                    contender.warm(source)
                restore_once(contender, source, count, table)
                print(".", end="", flush=True)
        print()
        tables.append(table)
    sizes = Table(f"File sizes, MiB ({memory} MiB, about {in_use} MiB in use)")
    for contender in contenders:
        files = [source.file(name) for name in contender.files]
        used = sum(file.stat().st_blocks * 512 for file in files)
        sizes.add(contender.name, MiB=used / MIB)
    stream = source.file("stream")
    packed = subprocess.run(
        ["zstd", "-3", "-c", str(stream)], check=True, capture_output=True
    )
    sizes.add("zstd -3 of the stream", MiB=len(packed.stdout) / MIB)
    tables.append(sizes)
    tables.append(load_all(source, pairs))
    return tables


def load_all(source: Source, pairs: int) -> Table:
    """Everything loaded: ours at full speed against the stream from a socket."""
    table = Table(
        "Loading everything, guest paused",
        "Seconds from QMP answering. The floor sends the same pages by postcopy from "
        "a flat array in memory; counted from the devices on.",
    )
    ours = {"background": "max", "paused": True}
    rows: list[Contender] = [
        StockFromSocket(),
        Ours(options=ours),
        Ours(name="ours, uncompressed", files=("plain.psnap",), options=ours),
        Floor("plain.psnap", push=True),
    ]
    for turn in range(pairs):
        for contender in rows[:: 1 if turn % 2 else -1]:
            contender.warm(source)
            contender.prepare()
            with Vm(
                qemus.get(), "redis", memory=source.memory, incoming=True, paused=True
            ) as vm:
                vm.start()
                start = time.monotonic()
                cpu_before = vm.cpu_seconds()
                contender.begin(vm, source)
                end = contender.end()
                loaded = time.monotonic() - start
                if isinstance(contender, Floor):
                    loaded = end["duration"]
                table.add(
                    contender.name,
                    loaded_s=loaded,
                    QEMU_CPU_s=vm.cpu_seconds() - cpu_before,
                    pager_CPU_s=end.get("pager-cpu"),
                )
    return table


class StockFromSocket(Contender):
    """QEMU reads the stream from a unix socket, until it has all."""

    name = "stock stream, from a socket"
    files = ("stream",)

    def begin(self, vm: Vm, source: Source) -> None:
        path = vm.directory / "in"
        vm.qmp.command("migrate-incoming", uri=f"unix:{path}")
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(path))
            with source.file(self.files[0]).open("rb") as data:
                sock.sendfile(data)
        vm.qmp.wait_migration("completed", deadline=120)


def _discard(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        buffer = bytearray(MIB)
        while connection.recv_into(buffer):
            pass


def save_pause(directory: Path, memory: int, in_use: int, pairs: int) -> Table:
    """The guest's pause at save, against QEMU sending to nobody."""
    table = Table(
        f"Pause at save ({memory} MiB of RAM, about {in_use} MiB in use)",
        "Seconds that the guest is stopped; zstd:3 of the whole save beside it.",
    )
    with redis_guest(memory, in_use) as (vm, _):
        for turn in range(pairs):
            for name in ("ours", "nobody") if turn % 2 else ("nobody", "ours"):
                if name == "ours":
                    target = directory / "pause.psnap"
                    saved = qemu_pagesaver.save(vm.qmp_path, target, disks="none")
                    table.add(
                        "ours",
                        pause_s=saved.downtime,
                        whole_save_s=saved.duration,
                        file_MiB=target.stat().st_size / MIB,
                    )
                    target.unlink()
                    continue
                path = vm.directory / "out"
                with socket.socket(socket.AF_UNIX) as listener:
                    listener.bind(str(path))
                    listener.listen()
                    reader = threading.Thread(target=_discard, args=(listener,))
                    reader.start()
                    vm.qmp.command("migrate-set-parameters", max_bandwidth=1 << 40)
                    vm.qmp.events.clear()
                    set_capabilities(vm, {"events": True})
                    start = time.monotonic()
                    vm.qmp.command("stop")
                    vm.qmp.command("migrate", uri=f"unix:{path}")
                    while True:
                        event = vm.qmp.event("MIGRATION", deadline=120)
                        if event["data"]["status"] == "completed":
                            break
                    vm.qmp.wait_status("postmigrate")
                    vm.qmp.command("cont")
                    table.add("QEMU to nobody", pause_s=time.monotonic() - start)
                    set_capabilities(vm, {"events": False})
                    reader.join()
                path.unlink()
    return table


def scale_table(directory: Path, pairs: int) -> Table:
    """Time to running over RAM sizes, the same memory in use."""
    table = Table("Time to running by RAM size, about 400 MiB in use")
    for memory in (512, 1024, 2048, 4096, 8192):
        place = directory / str(memory)
        place.mkdir()
        with redis_guest(memory, 400) as (vm, count):
            source = save_all(vm, place, templates=False)
        for _ in range(pairs):
            for contender in (everyone()[2], Ours()):
                contender.warm(source)
                scratch = Table("")
                restore_once(contender, source, count, scratch)
                figure = f"{memory}_MiB_running_s"
                table.add(
                    contender.name,
                    **{figure: scratch.median(contender.name, "running s")},
                )
        for file in place.iterdir():
            file.unlink()
    return table


TOUCHES = 4000
ARENA_MIB = 256
DECODED_PAGES = 1600  # in blocks that the pager's cache of 8 MiB holds


def first_touches(directory: Path, pairs: int) -> Table:
    """First touches seen from inside the guest, nothing prefetched."""
    table = Table(
        f"{TOUCHES} random first touches, seen from inside the guest",
        "Microseconds. Nothing prefetched unless a row says so, background off, warm "
        "storage. The floor is a pager that is a flat array of pages.",
    )
    pages = ARENA_MIB * 256
    with Vm(qemus.get(), "pattern", memory=ARENA_MIB + 32) as vm:
        vm.start()
        vm.pattern.fill(7, 0, pages, "text")
        for name, compression in (("plain", "none"), ("packed", "zstd:3")):
            file = directory / f"touch-{name}.psnap"
            qemu_pagesaver.save(
                vm.qmp_path, file, compression=compression, disks="none"
            )
            page_cache.warm(file)
    source = Source(directory=directory, memory=ARENA_MIB + 32)
    quiet = {"prefetch": "none", "background": "off"}
    free = {**quiet, "place": "off"}
    plain, packed = ("touch-plain.psnap",), ("touch-packed.psnap",)
    rows = [
        Floor(),
        Ours(name="ours, uncompressed, threads free", files=plain, options=free),
        Ours(name="ours, zstd, threads free", files=packed, options=free),
        Ours(name="ours, uncompressed, placed", files=plain, options=quiet),
        Ours(name="ours, zstd, placed", files=packed, options=quiet),
    ]
    # What neighbours of a walk are worth is in the locality suite; here they only
    # stand in the way.
    for preempt in ("off", "on"):
        for prefetch in ("none", "virtual"):
            how = {"prefetch": prefetch, "background": "off", "preempt": preempt}
            name = f"ours, zstd, prefetch {prefetch}, preempt {preempt}"
            rows.append(Ours(name=name, files=packed, options=how))
    decoded = [
        Ours(name="ours, zstd decoded, threads free", files=packed, options=free),
        Ours(name="ours, zstd decoded, placed", files=packed, options=quiet),
    ]
    for _ in range(pairs):
        for contender in rows:
            _touch_once(contender, source, table, _touch_anywhere)
        for contender in decoded:
            _touch_once(contender, source, table, _touch_decoded)
    return table


def _touch_anywhere(pattern: PatternConsole) -> Touch:
    return pattern.touch(3, 0, ARENA_MIB * 256, TOUCHES)


def _touch_decoded(pattern: PatternConsole) -> Touch:
    """Touch pages whose blocks the pager has just decoded for another page."""
    for page in range(0, DECODED_PAGES, 8):
        pattern.touch(1, page, 1, 1, "seq")
    return pattern.touch(3, 0, DECODED_PAGES, DECODED_PAGES - 1)


def _touch_once(
    contender: Contender,
    source: Source,
    table: Table,
    touches: Callable[[PatternConsole], Touch],
) -> None:
    contender.prepare()
    with Vm(qemus.get(), "pattern", memory=source.memory, incoming=True) as vm:
        vm.start()
        contender.begin(vm, source)
        vm.qmp.event("RESUME", deadline=60)
        rate = vm.pattern.ticks_per_second()
        touch = touches(vm.pattern)
        vm.kill()
        end = contender.end()
        seconds: dict[str, float] = end["latency"]
        table.add(
            contender.name,
            guest_p50=touch.p50 / rate * 1e6,
            guest_p99=touch.p99 / rate * 1e6,
            total_ms=touch.total / rate * 1e3,
            pager_p50=seconds["p50"] * 1e6,
            pager_p99=seconds["p99"] * 1e6,
        )
