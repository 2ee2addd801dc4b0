# SPDX-License-Identifier: LGPL-2.1-or-later
"""What prefetch is worth: workloads in a guest whose physical memory is aged.

One guest has all workloads, each a process that has its memory and waits. It
is saved once; every measurement restores it, starts one workload by one command and
waits for its answer. What the workloads read they compare with what it ought to be.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import qemu_pagesaver
from qemu_pagesaver import control
from tests.support import qemus
from tests.support.console import GuestError, ShellConsole
from tests.support.redisclient import RedisClient, keys_for
from tests.support.vm import Vm

from . import page_cache, slow_storage
from .contenders import Contender, Ours, Source, Stock, stock_save
from .figures import Table

MODES = ("none", "physical", "virtual")
WINDOW = 64
MEMORY = 2304  # MiB
HEAP_MIB = 300
TURN_MIB, TURN_PAGES = 64, 64
CELL_PAGES = 64  # of which the random walk touches one
RECORDS_MIB = 40
REDIS_MIB, READS = 200, 10_000
TREE = "/usr/lib"
CHURN_ROUNDS = 3
KEPT_PERCENT = 53  # of memory, while the workloads get theirs
SLOW_PAIRS = 3  # at most: half a minute each
_DEADLINE = 600.0

# Values are read where they are, in redis: what slirp and the guest's TCP need would
# hide what memory does. Each value has its number at 3648 (tests/support/redisclient).
_READ_KEYS = """
local state, right = 1, 0
for _ = 1, tonumber(ARGV[2]) do
  state = (state * 16807) % 2147483647
  local index = state % tonumber(ARGV[1])
  local value = redis.call('GET', string.format('key:%08d', index))
  if #value == 4000 and struct.unpack('<I4', value, 3649) == index then
    right = right + 1
  end
end
return right
"""

Figures = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One of them: how it is told to start; what it is called and measured by."""

    name: str
    title: str
    run: Callable[[Vm], Figures]


def _ask(process: str, request: str) -> Callable[[Vm], Figures]:
    """Send one line to a process of the guest; builtins of the shell alone."""
    fifo = f"/run/{process}"
    line = f'echo {request} >{fifo}.in; read -r line <{fifo}.out; echo "$line"'

    def run(vm: Vm) -> Figures:
        answer = _fields(vm.shell.run(line, deadline=_DEADLINE))
        if answer["wrong"]:
            raise GuestError(f"{process}: {answer['wrong']:g} wrong")
        return answer

    return run


def _fields(line: str) -> Figures:
    return {
        name: float(value)
        for name, _, value in (word.partition("=") for word in line.split())
    }


def _read_keys(vm: Vm) -> Figures:
    with RedisClient(vm.redis_port or 0) as redis:
        start = time.monotonic()
        count = keys_for(REDIS_MIB)
        right = redis.command("EVAL", _READ_KEYS, 0, count, READS)
        if right != READS:
            raise GuestError(f"{right!r} of {READS} values are right")
        return {"ns": (time.monotonic() - start) * 1e9}


WALK = Workload(
    name="walk",
    title=f"(a) a process walks {HEAP_MIB} MB of heap in order",
    run=_ask("heap", "walk"),
)
KEYS = Workload(
    name="keys",
    title=f"(b) redis reads {READS:,} random keys of {keys_for(REDIS_MIB):,}",
    run=_read_keys,
)
IMPORT = Workload(
    name="import",
    title=f"(c) Python imports and computes over {RECORDS_MIB} MB of records",
    run=_ask("import", "go"),
)
TURNS = Workload(
    name="turns",
    title=f"(d) two processes in turn, {TURN_PAGES} pages of {TURN_MIB} MB each",
    run=_ask("pair", "walk"),
)
FILES = Workload(
    name="files",
    title=f"(e) {TREE} is read from the page cache",
    run=_ask("tree", "read"),
)
RANDOM = Workload(
    name="random",
    title=f"(f) a random walk, one page of each {CELL_PAGES} of {HEAP_MIB} MB",
    run=_ask("heap", f"random {CELL_PAGES}"),
)
WORKLOADS = (WALK, KEYS, IMPORT, TURNS, FILES, RANDOM)


# ------------------------------------------------------------------ the guest


@dataclass(frozen=True, kw_only=True)
class Adjacency:
    """Of neighbours in virtual memory (or in a file), how many are in physical."""

    pages: int
    pairs: int
    adjacent: int

    @property
    def percent(self) -> float:
        return 100 * self.adjacent / self.pairs


@contextlib.contextmanager
def aged_guest() -> Iterator[tuple[Vm, dict[str, Adjacency]]]:
    """Boot a guest, age its memory, prepare all workloads; the shares by name.

    Huge pages are off in the guest: a heap in pages of 2 MiB is adjacent by
    construction, and what is measured here are the others. For the same reason
    the kernel must not put free memory in order again while nothing runs
    (compaction_proactiveness).
    """
    with Vm(qemus.get(), "redis", memory=MEMORY) as vm:
        vm.start()
        shell = vm.shell
        shell.run("echo never >/sys/kernel/mm/transparent_hugepage/enabled")
        shell.run("echo 0 >/proc/sys/vm/compaction_proactiveness")
        # Processes started and ended; the page cache filled and partly dropped.
        shell.run(f"walker churn 1 {CHURN_ROUNDS}", deadline=_DEADLINE)
        shell.run("walker drop /usr", deadline=_DEADLINE)
        # Nearly all memory allocated, and most of it freed out of order.
        _start(shell, "hold", f"walker hold /run/hold 1 {KEPT_PERCENT}")
        _start(shell, "tree", f"walker tree /run/tree {TREE}")
        (heap,) = _start(shell, "heap", f"walker heap /run/heap {HEAP_MIB}")
        pair = _start(shell, "pair", f"walker pair /run/pair {TURN_MIB} {TURN_PAGES}")
        importer = "python3 -B /usr/local/lib/importer.py"
        # Another process has imported it all before: the page cache has it.
        (before,) = _start(shell, "before", f"{importer} /run/before 1")
        _ask("before", "go")(vm)
        shell.run(f"kill {before}")
        (python,) = _start(shell, "import", f"{importer} /run/import {RECORDS_MIB}")
        with vm.redis() as redis:
            redis.load(keys_for(REDIS_MIB))
            server = redis.info()["process_id"]
        shell.run("echo end >/run/hold.in; read -r line </run/hold.out")
        time.sleep(1)
        processes = {
            WALK.name: heap,
            KEYS.name: server,
            IMPORT.name: python,
            TURNS.name: " ".join(pair),
            RANDOM.name: heap,
        }
        shares = {
            name: _adjacency(shell, f"share {pids}") for name, pids in processes.items()
        }
        shares[FILES.name] = _adjacency(shell, f"share-files {TREE}")
        yield vm, shares


def _start(shell: ShellConsole, name: str, command: str) -> list[str]:
    """Start a process that says when it is ready; its process ids."""
    fifo = f"/run/{name}"
    line = shell.run(
        f"mkfifo {fifo}.in {fifo}.out; {command} </dev/null >/dev/null & "
        f'read -r line <{fifo}.out; echo "$line"',
        deadline=_DEADLINE,
    )
    ready, *pids = line.split()
    if ready != "ready":
        raise GuestError(f"{command}: {line}")
    return pids


def _adjacency(shell: ShellConsole, what: str) -> Adjacency:
    found = _fields(shell.run(f"walker {what}", deadline=_DEADLINE))
    if found["pages"] < 0.95 * found["of"]:
        raise GuestError(f"{what}: only {found} are in memory")
    return Adjacency(
        pages=int(found["pages"]),
        pairs=int(found["pairs"]),
        adjacent=int(found["adjacent"]),
    )


# -------------------------------------------------------------- measurements


def tables(directory: Path, pairs: int, window: int = WINDOW) -> list[Table]:
    """Measure all workloads, and some of them on slow storage."""
    with aged_guest() as (vm, shares):
        for name, share in shares.items():
            print(
                f"{name}: {share.percent:.0f} % of {share.pairs} adjacent", flush=True
            )
        qemu_pagesaver.save(vm.qmp_path, directory / "ours.psnap", disks="none")
        stock_save(vm, directory / "stream", {})
        stock_save(vm, directory / "mapped", {"mapped-ram": True})
    source = Source(directory=directory, memory=MEMORY)
    found = []
    for workload in WORKLOADS:
        table = _table(workload, shares, f"window {window}, page cache warm")
        for turn in range(pairs):
            _turn(workload, source, table, shares, contenders=_ours(window), turn=turn)
        print()
        found.append(table)
    if reason := slow_storage.why_not():
        print(f"no slow storage: {reason}")
        return found
    with slow_storage.mounted(directory) as mount:
        page_cache.warm(directory / "stream")
        found.append(slow_storage.self_check(mount, "stream"))
    for workload in (WALK, IMPORT):
        table = _table(workload, shares, f"window {window}, slow storage")
        contenders: list[Contender] = [
            *_ours(window),
            Stock(),
            Stock(
                name="mapped-ram",
                files=("mapped",),
                capabilities={"mapped-ram": True},
            ),
        ]
        for turn in range(min(pairs, SLOW_PAIRS)):
            _turn(
                workload,
                source,
                table,
                shares,
                contenders=contenders,
                turn=turn,
                slow=True,
            )
        print()
        found.append(table)
    return found


def _ours(window: int) -> list[Contender]:
    return [
        Ours(
            name=mode,
            options={
                "prefetch": mode,
                "prefetch_window": window,
                "background": "off",
            },
        )
        for mode in MODES
    ]


def _table(workload: Workload, shares: dict[str, Adjacency], how: str) -> Table:
    share = shares[workload.name]
    return Table(
        f"{workload.title}; {how}",
        f"{share.percent:.0f} % of {share.pairs:,} virtually adjacent pages are "
        "physically adjacent. Work: from the command to its answer, as the guest says; "
        "end: from QMP answering. Counts are of the work alone, wasted is of all: "
        "prefetched pages that saved no fault of the same turn's none. Latency of "
        "faults as the pager sees it, of touches as the guest does.",
    )


def _turn(
    workload: Workload,
    source: Source,
    table: Table,
    shares: dict[str, Adjacency],
    *,
    contenders: list[Contender],
    turn: int,
    slow: bool = False,
) -> None:
    """Measure every contender once, in an order that alternates."""
    runs: dict[str, tuple[Figures, dict[str, Any]]] = {}
    for contender in contenders[:: 1 if turn % 2 == 0 else -1]:
        if slow:
            page_cache.drop()
            page_cache.warm(qemus.guest_files("redis").directory / "root.img")
        contender.warm(source)
        with contextlib.ExitStack() as stack:
            place = source
            if slow:
                mount = stack.enter_context(slow_storage.mounted(source.directory))
                place = Source(directory=mount, memory=source.memory)
            runs[contender.name] = _run_once(contender, place, workload)
        print(".", end="", flush=True)
    for contender in contenders:
        figures, counts = runs[contender.name]
        wasted = None
        if counts and "none" in runs:
            wasted = _wasted(counts, runs["none"][1])
        said = counts.get("prefetch") or {}
        table.add(
            contender.name,
            **{"adjacent_%": shares[workload.name].percent},
            **figures,
            wasted=wasted,
            **{
                f"prefetch_{name}": value
                for name, value in said.items()
                if isinstance(value, int | float)
            },
        )


def _wasted(counts: dict[str, Any], none: dict[str, Any]) -> float:
    """Return the prefetched pages without which there would be no fault more.

    In none a page that is touched is one fault; with prefetch it is a fault, or it
    was there, or it was on its way (a late fault).
    """
    faults = counts["faults"] - counts["faults-late"]
    used = none["faults"] - none["faults-late"] - faults
    return float(counts["pages-sent"]["prefetched"] - used)


def _run_once(
    contender: Contender, source: Source, workload: Workload
) -> tuple[Figures, dict[str, Any]]:
    """Restore, do the work; its figures, and the pager's counts at its end."""
    contender.prepare()
    try:
        options = contender.vm_options(source)
        with Vm(qemus.get(), "redis", incoming=True, **options) as vm:
            vm.start()
            start = time.monotonic()
            contender.begin(vm, source)
            vm.qmp.event("RESUME", deadline=_DEADLINE)
            running = time.monotonic() - start
            ours = isinstance(contender, Ours)
            before = _counts(vm) if ours else {}
            answer = workload.run(vm)
            end = time.monotonic() - start
            after = _counts(vm) if ours else {}
            reads = _disk_reads(vm)
            vm.kill()
            contender.end()
    except BaseException:
        if isinstance(contender, Ours):
            contender.stop()
        raise
    figures = {"running_s": running, "work_s": answer["ns"] / 1e9, "end_s": end}
    if "import-ns" in answer:
        figures["import_s"] = answer["import-ns"] / 1e9
        # No page table of the snapshot tells which pages these will be.
        figures["new_pages"] = answer["new"]
    if reads:
        figures["disk_reads"] = reads  # it was not from the page cache then
    if ours:
        figures |= _difference(before, after)
    if "p99" in answer:
        figures |= {f"touch_{q}_us": answer[q] / 1e3 for q in ("p50", "p99")}
    return figures, after


def _counts(vm: Vm) -> dict[str, Any]:
    """Return what the pager has counted so far."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        (document,) = control.status(str(vm.pid))
        if "faults" in document:
            return document
        time.sleep(0.01)
    raise RuntimeError(f"the pager of {vm.pid} does not answer")


def _disk_reads(vm: Vm) -> int:
    """Return how often the guest has read its disk."""
    devices = vm.qmp.command("query-blockstats")
    return sum(int(device["stats"]["rd_operations"]) for device in devices)


def _difference(before: dict[str, Any], after: dict[str, Any]) -> Figures:
    figures = {"faults_before": before["faults"]}
    for name in ("faults", "faults-late"):
        figures[name.replace("-", "_")] = after[name] - before[name]
    for name in ("requested", "prefetched"):
        figures[name] = after["pages-sent"][name] - before["pages-sent"][name]
    figures["storage_reads"] = after["storage"]["reads"] - before["storage"]["reads"]
    for name in ("p50", "p99"):
        figures[f"fault_{name}_us"] = after["latency"][name] * 1e6
    return figures
