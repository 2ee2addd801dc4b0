# SPDX-License-Identifier: LGPL-2.1-or-later
"""Disks of a real QEMU (no guest runs): seen, frozen, given back, started again."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import stat
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from qemu_pagesaver import command_line, disks, errors
from qemu_pagesaver.command_line import OPTIONS
from qemu_pagesaver.disks import Disk
from qemu_pagesaver.qmp import Qmp
from tests.support.qemus import Qemu

MIB = 1 << 20
BASE = ["-nodefaults", "-display", "none", "-machine", "pc", "-m", "16"]


def _text(log: Path) -> str:
    return log.read_text(errors="replace")


async def _connected(path: Path, process: subprocess.Popen[bytes], log: Path) -> Qmp:
    for _ in range(3000):
        try:
            return await Qmp.connect(path)
        except errors.QmpUnreachable:
            # Bound, but it does not listen yet; or it has ended.
            assert process.poll() is None, _text(log)
            await asyncio.sleep(0.01)
    raise AssertionError(_text(log))


@contextlib.asynccontextmanager
async def running(
    argv: Sequence[str], directory: Path, *, qmp: str | None = None
) -> AsyncIterator[Qmp]:
    """Run QEMU in a directory and connect to it; ended by its pid."""
    path = Path(qmp) if qmp else directory / "qmp"
    path.unlink(missing_ok=True)
    own = [] if qmp else ["-S", "-qmp", f"unix:{path},server=on,wait=off"]
    log = directory / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: ASYNC220 - it does not block for long
            [*argv, *own],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        async with await _connected(path, process, log) as connection:
            yield connection
    finally:
        process.kill()
        process.wait()


def with_qemu(
    qemu: Qemu,
    directory: Path,
    arguments: Sequence[str],
    test: Callable[[Qmp], Awaitable[None]],
) -> None:
    async def main() -> None:
        async with running([str(qemu.system), *BASE, *arguments], directory) as qmp:
            await test(qmp)

    asyncio.run(main())


def image(qemu: Qemu, path: Path, *options: str, size: int = 8 * MIB) -> Path:
    with_size = [] if "-b" in options else [str(size)]
    arguments = ["create", "-q", *options, str(path), *with_size]
    subprocess.run([qemu.img, *arguments], check=True)
    return path


async def write(qmp: Qmp, pattern: int, *, flush: bool = True) -> None:
    """Write to every writable disk, as its device would."""
    for entry in await qmp.execute("query-block"):
        if entry.get("inserted") and not entry["inserted"]["ro"]:
            device = f"-d {entry['qdev']}" if entry.get("qdev") else entry["device"]
            for line in (f"write -P {pattern} 0 64k", *(["flush"] if flush else [])):
                said = await qmp.hmp(f'qemu-io {device} "{line}"')
                assert not said, said


def content(qemu: Qemu, path: Path) -> int:
    """Return the first byte that a disk shows, whatever its format."""
    raw = path.with_suffix(".content")
    subprocess.run(
        [qemu.img, "convert", "-U", "-O", "raw", str(path), str(raw)], check=True
    )
    with raw.open("rb") as file:
        found = file.read(1)[0]
    raw.unlink()
    return found


@pytest.fixture
def pair(qemu: Qemu, disk_path: Path) -> list[str]:
    """Arguments for two writable disks, of either format and either syntax."""
    image(qemu, disk_path / "a.img", "-f", "raw")
    image(qemu, disk_path / "golden.qcow2", "-f", "qcow2")
    image(
        qemu, disk_path / "b.qcow2", "-f", "qcow2", "-b", "golden.qcow2", "-F", "qcow2"
    )
    node = {
        "driver": "qcow2",
        "node-name": "disk-b",
        "file": {"driver": "file", "filename": f"{disk_path}/b.qcow2"},
    }
    return [
        *("-drive", "file=a.img,format=raw,if=none,id=disk-a"),
        *("-device", "virtio-blk-pci,drive=disk-a,id=da"),
        *("-blockdev", json.dumps(node)),
        *("-device", "virtio-blk-pci,drive=disk-b,id=db"),
    ]


# ----------------------------------------------------------------- inspecting


def test_disks_are_seen(qemu: Qemu, disk_path: Path, pair: list[str]) -> None:
    iso = image(qemu, disk_path / "cd.iso", "-f", "raw")
    image(qemu, disk_path / "t.qcow2", "-f", "qcow2")
    arguments = [
        *pair,
        *("-drive", f"file={iso},format=raw,media=cdrom,if=ide,id=cd"),
        *("-drive", "if=none,id=empty,media=cdrom", "-device", "ide-cd,drive=empty"),
        *("-drive", "file=t.qcow2,format=qcow2,if=none,id=temp,snapshot=on"),
        *("-device", "virtio-blk-pci,drive=temp"),
        *("-blockdev", f"driver=file,node-name=p,filename={disk_path}/spare.img"),
        *("-blockdev", "driver=raw,node-name=two,file=p"),
        *("-device", "virtio-blk-pci,drive=two,id=dtwo"),
    ]
    image(qemu, disk_path / "spare.img", "-f", "raw")

    async def test(qmp: Qmp) -> None:
        found = await disks.inspect(qmp)
        seen = {Path(disk.filename).name: disk for disk in found}
        temporary = next(disk for disk in found if disk.kind == "temporary")
        del seen[Path(temporary.filename).name]
        assert temporary.device == "temp"
        assert set(seen) == {"a.img", "b.qcow2", "cd.iso", "spare.img"}
        assert [disk.filename for disk in disks.needs_choice(seen.values())] == [
            disk.filename for disk in seen.values() if "cd.iso" not in disk.filename
        ]
        a, b = seen["a.img"], seen["b.qcow2"]
        status = (disk_path / "a.img").stat()
        assert a.filename == str(disk_path / "a.img")
        assert a.layers[0].size == status.st_size
        assert a.layers[0].mtime_ns == status.st_mtime_ns
        assert a.layers[0].inode == status.st_ino
        assert (a.format, a.virtual_size, a.device) == ("raw", 8 * MIB, "disk-a")
        assert [layer.filename for layer in b.layers] == [
            str(disk_path / "b.qcow2"),
            str(disk_path / "golden.qcow2"),
        ]
        assert b.node == "disk-b"
        assert disks.known_files(seen.values()) == {
            str(disk_path / name)
            for name in ("a.img", "b.qcow2", "golden.qcow2", "cd.iso", "spare.img")
        }
        documents = json.loads(json.dumps([disk.document() for disk in found]))
        assert [
            disk.document() for disk in disks.from_documents(documents)
        ] == documents
        for mode in ("check", "overlay"):
            with pytest.raises(errors.DisksChoiceNeeded, match=r"temp .*-snapshot"):
                disks.require_mode(found, mode)
            disks.require_mode(seen.values(), mode)

    with_qemu(qemu, disk_path, arguments, test)


def test_a_disk_that_was_replaced_below_qemu(
    newest_qemu: Qemu, disk_path: Path
) -> None:
    path = image(newest_qemu, disk_path / "a.img", "-f", "raw")

    async def test(qmp: Qmp) -> None:
        path.rename(disk_path / "old.img")
        image(newest_qemu, path, "-f", "raw")
        with pytest.raises(errors.DisksChanged, match="another file"):
            await disks.inspect(qmp)

    with_qemu(
        newest_qemu, disk_path, ["-drive", f"file={path},format=raw,if=virtio"], test
    )


# ------------------------------------------------------------------- freezing


def overlays_of(directory: Path) -> list[Path]:
    return [
        path
        for path in directory.rglob("*.qcow2")
        if re.search(r"\.[0-9a-f]{8}\.qcow2$", path.name)
    ]


def test_overlays_freeze_and_undo_brings_back(
    qemu: Qemu, disk_path: Path, pair: list[str]
) -> None:
    async def test(qmp: Qmp) -> None:
        await write(qmp, 1, flush=False)
        found = await disks.inspect(qmp)
        overlays = await disks.make_overlays(qmp, found)
        frozen = overlays.frozen(found)
        assert [disk.mode for disk in frozen] == ["overlay", "overlay"]
        assert len(overlays_of(disk_path)) == 2
        await write(qmp, 2)
        for made in overlays.made:
            assert content(qemu, Path(made.filename)) == 2
            assert content(qemu, Path(made.disk.filename)) == 1
        assert disks.check_unchanged(frozen) == []

        assert await overlays.undo() == ()
        assert overlays_of(disk_path) == []
        after = await disks.inspect(qmp)
        assert [(d.node, d.filename) for d in after] == [
            (d.node, d.filename) for d in found
        ]
        for name in ("a.img", "b.qcow2"):
            assert content(qemu, disk_path / name) == 2
        await write(qmp, 3)
        assert content(qemu, disk_path / "a.img") == 3
        assert await overlays.undo() == ()

    with_qemu(qemu, disk_path, pair, test)


def test_prepared_overlays_change_nothing(
    qemu: Qemu, disk_path: Path, pair: list[str]
) -> None:
    place = disk_path / "place"
    place.mkdir()

    async def test(qmp: Qmp) -> None:
        found = await disks.inspect(qmp)
        overlays = await disks.prepare_overlays(qmp, found, directory=place)
        assert len(overlays_of(place)) == 2
        assert await disks.inspect(qmp) == found
        await overlays.undo()
        assert overlays_of(disk_path) == []
        nodes = await qmp.execute("query-named-block-nodes")
        assert not [n for n in nodes if "pagesaver" in n["node-name"]]

    with_qemu(qemu, disk_path, pair, test)


def test_undo_after_a_migration(qemu: Qemu, disk_path: Path, pair: list[str]) -> None:
    async def test(qmp: Qmp) -> None:
        await write(qmp, 1)
        found = await disks.inspect(qmp)
        overlays = await disks.make_overlays(qmp, found)
        await qmp.execute("migrate", {"uri": "exec:cat > /dev/null"})
        for _ in range(3000):
            if (await qmp.execute("query-migrate"))["status"] == "completed":
                break
            await asyncio.sleep(0.01)
        if await qmp.has_command("blockdev-set-active"):
            await overlays.undo()
            assert not overlays.made
        else:
            with pytest.raises(errors.QemuRefused):
                await overlays.undo()
            assert len(overlays.made) == 2
        await qmp.execute("cont")
        await qmp.execute("stop")
        await overlays.undo()
        assert overlays_of(disk_path) == []
        after = await disks.inspect(qmp)
        assert [disk.filename for disk in after] == [disk.filename for disk in found]
        await write(qmp, 2)

    with_qemu(qemu, disk_path, pair, test)


def test_nothing_is_left_of_overlays_that_fail(
    qemu: Qemu, disk_path: Path, pair: list[str]
) -> None:
    async def test(qmp: Qmp) -> None:
        found = await disks.inspect(qmp)
        with pytest.raises(errors.QemuRefused):
            await disks.make_overlays(qmp, found, directory=disk_path / "absent")
        # The second of two cannot be switched: neither is.
        broken = [found[0], Disk(node="absent", read_only=False,
                                 virtual_size=MIB, layers=found[1].layers)]  # fmt: skip
        with pytest.raises(errors.QemuRefused):
            await disks.make_overlays(qmp, broken)
        assert await disks.inspect(qmp) == found
        for steps in range(12):
            task = asyncio.create_task(disks.make_overlays(qmp, found))
            await asyncio.sleep(0.002 * steps)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await (await task).undo()
            assert overlays_of(disk_path) == []
        assert [disk.filename for disk in await disks.inspect(qmp)] == [
            disk.filename for disk in found
        ]

    with_qemu(qemu, disk_path, pair, test)


def test_no_overlay_over_what_cannot_have_one(
    newest_qemu: Qemu, disk_path: Path
) -> None:
    arguments = [
        *("-object", "throttle-group,id=g"),
        *("-blockdev", "driver=null-co,node-name=n,size=1048576"),
        *("-blockdev", "driver=throttle,node-name=t,throttle-group=g,file=n"),
        *("-device", "virtio-blk-pci,drive=t,id=throttled"),
    ]

    async def test(qmp: Qmp) -> None:
        found = await disks.inspect(qmp)
        with pytest.raises(errors.DisksChoiceNeeded, match="throttled"):
            await disks.make_overlays(qmp, found)

    with_qemu(newest_qemu, disk_path, arguments, test)


# ------------------------------------------------------------------ restoring


def planned(
    qemu: Qemu, arguments: Sequence[str], directory: Path, frozen: Sequence[Disk]
) -> command_line.Plan:
    made = disks.restore_overlays(frozen, directory / "run", qemu=qemu.system)
    return command_line.plan(
        [str(qemu.system), *BASE, *arguments],
        qemu=qemu.system,
        qmp_socket=directory / "run" / "qmp",
        run_dir=directory / "run",
        cwd=str(directory),
        disk_map=disks.disk_map(frozen, made),
        known_files=disks.known_files(frozen),
    )


async def save(qmp: Qmp) -> list[Disk]:
    """Freeze the disks, then go on writing."""
    found = await disks.inspect(qmp)
    overlays = await disks.make_overlays(qmp, found)
    frozen = overlays.frozen(found)
    await write(qmp, 9)
    documents = json.loads(json.dumps([disk.document() for disk in frozen]))
    return disks.from_documents(documents)


async def check_restored(
    qemu: Qemu, arguments: Sequence[str], directory: Path, frozen: list[Disk],
    pattern: int,
) -> None:  # fmt: skip
    """Start what a restore starts, but for `-incoming`, beside the first guest."""
    assert disks.check_unchanged(frozen) == []
    run = directory / "run"
    run.mkdir(exist_ok=True)
    plan = planned(qemu, arguments, directory, frozen)
    argv = [word for word in plan.argv if word not in ("-incoming", "defer")]
    async with running([*argv, "-S"], directory, qmp=str(run / "qmp")) as qmp:
        found = await disks.inspect(qmp)
        assert len(found) == len(frozen)
        for disk in found:
            assert disk.format == "qcow2"
            assert disk.filename.startswith(str(run))
            assert content(qemu, Path(disk.filename)) == pattern
        await write(qmp, 7)
        for disk in found:
            assert content(qemu, Path(disk.filename)) == 7
    assert disks.check_unchanged(frozen) == []
    shutil.rmtree(run)


def test_restored_guests_have_the_disks_of_the_save(
    qemu: Qemu, disk_path: Path, pair: list[str]
) -> None:
    async def test(qmp: Qmp) -> None:
        await write(qmp, 1, flush=False)
        first = await save(qmp)
        await check_restored(qemu, pair, disk_path, first, 1)
        # Saved once more: the command line still names what lies below.
        second = await save(qmp)
        assert [len(disk.layers) for disk in second] == [2, 3]
        await check_restored(qemu, pair, disk_path, first, 1)
        await check_restored(qemu, pair, disk_path, second, 9)

    with_qemu(qemu, disk_path, pair, test)


NODES = {
    "one node": ["driver=raw,node-name=d,file.driver=file,file.filename=d.img"],
    "two nodes": ["driver=file,node-name=p,filename=d.img,cache.direct=off",
                  "driver=raw,node-name=d,file=p,discard=unmap"],
    "no format": ["driver=file,node-name=d,filename=d.img,discard=unmap"],
    "throttled": ["driver=file,node-name=p,filename=d.img",
                  "driver=raw,node-name=r,file=p",
                  "driver=copy-on-read,node-name=d,file=r"],
}  # fmt: skip


@pytest.mark.parametrize("nodes", NODES.values(), ids=NODES)
def test_block_nodes(qemu: Qemu, disk_path: Path, nodes: list[str]) -> None:
    image(qemu, disk_path / "d.img", "-f", "raw")
    arguments = [word for node in nodes for word in ("-blockdev", node)]
    arguments += ["-device", "virtio-blk-pci,drive=d"]

    async def test(qmp: Qmp) -> None:
        await write(qmp, 1)
        found = await disks.inspect(qmp)
        if found[0].format == "copy-on-read":
            with pytest.raises(errors.DisksChoiceNeeded):
                await save(qmp)
            return
        await check_restored(qemu, arguments, disk_path, await save(qmp), 1)

    with_qemu(qemu, disk_path, arguments, test)


DRIVES = {
    "virtio": ["-drive", "file=d.img,format=raw,if=virtio,cache=none,aio=native"],
    "ide": ["-drive", "file=d.img,if=ide,driver=raw,discard=unmap"],
    "hda": ["-hda", "d.img"],
    "bare": ["d.img"],
    "pflash": ["-drive", "if=pflash,format=raw,file=d.img"],
    "dotted": ["-drive", "if=virtio,format=raw,file.driver=file,file.filename=d.img"],
}


@pytest.mark.parametrize("arguments", DRIVES.values(), ids=DRIVES)
def test_drives(qemu: Qemu, disk_path: Path, arguments: list[str]) -> None:
    image(qemu, disk_path / "d.img", "-f", "raw", size=2 * MIB)

    async def test(qmp: Qmp) -> None:
        await write(qmp, 1)
        await check_restored(qemu, arguments, disk_path, await save(qmp), 1)

    with_qemu(qemu, disk_path, arguments, test)


def test_overlays_that_cannot_be_made_leave_nothing(
    newest_qemu: Qemu, disk_path: Path
) -> None:
    path = image(newest_qemu, disk_path / "a.img", "-f", "raw")
    layer = disks.Layer(filename=str(path), format="raw")
    good = Disk(node="a", read_only=False, mode="overlay", layers=(layer,))
    absent = disks.Layer(filename="/absent", format="raw")
    bad = Disk(node="b", read_only=False, mode="overlay", layers=(absent,))
    with pytest.raises(errors.IoError, match="overlay"):
        disks.restore_overlays([good, bad], disk_path, qemu=newest_qemu.system)
    assert overlays_of(disk_path) == []


# -------------------------------------------------------------- command lines


def test_the_table_knows_the_options_of_qemu(qemu: Qemu) -> None:
    said = subprocess.run(
        [qemu.system, "-help"], capture_output=True, text=True, check=True
    ).stdout
    said = said.partition("\nDuring emulation")[0]
    found = dict(re.findall(r"^--?([A-Za-z][\w-]*)(?:[ /]|$)(\S?)", said, re.MULTILINE))
    assert len(found) > 100
    assert set(found) <= set(OPTIONS)


def test_the_table_knows_which_options_take_an_argument(qemu: Qemu) -> None:
    for option in OPTIONS.values():
        # An option that takes an argument takes the first of the wrong ones.
        arguments = [f"-{option.name}", "-wrong-one", "-wrong-two"]
        said = subprocess.run(
            [qemu.system, *arguments], capture_output=True, text=True, check=False
        ).stderr
        if option.name and f"{arguments[0]}: invalid option" not in said:
            assert ("-wrong-two: invalid" in said) is option.argument, option.name


PROCESSES = {
    "sockets": ["-serial", "unix:s,server=on,wait=off", "-monitor", "tcp::0,server",
                "-parallel", "pty", "-chardev", "stdio,id=c,mux=on", "-serial",
                "chardev:c", "-daemonize", "-pidfile", "pid", "-gdb", "tcp::0"],
    "nographic": ["-nographic"],
    "serial stdio": ["-serial", "mon:stdio", "-vnc", ":77,share=ignore"],
    "network": ["-netdev", "user,id=n,hostfwd=tcp:127.0.0.1:45671-:22", "-device",
                "e1000,netdev=n,romfile=", "-nic", "user,hostfwd=udp::45671-:53"],
    "spice": ["-spice", "port=45672,disable-ticketing=on", "-vga", "qxl"],
    "object": ["-object", "secret,id=s,file=/dev/null", "-object",
               '{"qom-type":"rng-random","id":"r","filename":"/dev/urandom"}'],
}  # fmt: skip


@pytest.mark.parametrize("arguments", PROCESSES.values(), ids=PROCESSES)
def test_planned_command_lines_start_twice(
    qemu: Qemu, disk_path: Path, arguments: list[str]
) -> None:
    """What is started does not collide with another one of the same guest."""
    machine = [] if "-nographic" in arguments else ["-nodefaults", "-display", "none"]

    def plan_in(name: str) -> command_line.Plan:
        (disk_path / name).mkdir()
        return command_line.plan(
            [str(qemu.system), *machine, *arguments],
            qemu=qemu.system,
            qmp_socket=disk_path / name / "qmp",
            run_dir=disk_path / name,
            machine="pc-i440fx-7.2",
            trust="secret,id=s,file=/dev/null" in arguments,
        )

    async def main() -> None:
        async with contextlib.AsyncExitStack() as stack:
            for name in ("first", "second"):
                plan = plan_in(name)
                qmp = await stack.enter_async_context(
                    running(plan.argv, disk_path, qmp=str(disk_path / name / "qmp"))
                )
                status = await qmp.execute("query-status")
                assert status["status"] == "inmigrate"
                for path in plan.sockets.values():
                    assert stat.S_ISSOCK(os.stat(path).st_mode)  # noqa: PTH116
                argv = command_line.read(qmp.peer_pid)
                assert tuple(argv) == plan.argv
                if "network" in PROCESSES and "-netdev" in arguments:
                    users = await qmp.hmp("info usernet")
                    ports = re.findall(r"HOST_FORWARD\]\s+\d+\s+\S+\s+(\d+)", users)
                    assert len(ports) == 2
                    assert all(int(port) not in (0, 45671) for port in ports)

    if "-spice" in arguments and not _has_spice(qemu):
        pytest.skip("this QEMU has no spice")
    asyncio.run(main())


def _has_spice(qemu: Qemu) -> bool:
    said = subprocess.run(
        [qemu.system, "-machine", "none", "-spice", "help"],
        capture_output=True,
        text=True,
        check=False,
    )
    return "seamless" in said.stdout + said.stderr
