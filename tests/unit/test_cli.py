# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line, from main() down, on streams and snapshots made by code."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qemu_pagesaver import cli, errors
from qemu_pagesaver.cli import main
from qemu_pagesaver.cli.output import Output, printable, size
from tests.unit import streams

COMMAND = [sys.executable, "-m", "qemu_pagesaver"]
ESCAPE = "\x1b[31mred\x1b[0m"


def noise(seed: int) -> bytes:
    return random.Random(seed).randbytes(4096)


def blocks() -> dict[str, list[bytes]]:
    pages = [bytes(4096)] * 600
    pages[10] = pages[11] = noise(1)
    pages[20] = b"\xaa" * 4096
    pages[599] = noise(2)
    return {"pc.ram": pages, "pc.bios": [noise(3), noise(1)]}


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    path = tmp_path / "guest.stream"
    path.write_bytes(streams.stream(blocks()))
    return path


@pytest.fixture
def snapshot(stream: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    path = stream.with_name("guest.psnap")
    assert main(["convert", str(stream), str(path), "-q"]) == 0
    capsys.readouterr()
    return path


class Ran:
    """A run of main(): code, stdout, stderr."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err

    @property
    def document(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> Ran:
        code = main([str(each) for each in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return call


def failed(ran: Ran, kind: type[errors.PagesaverError]) -> bool:
    """Say whether a run failed as it should: code, one sentence, no traceback."""
    assert ran.out == ""
    assert "Traceback" not in ran.err
    assert ran.err.startswith("qemu-pagesaver: ")
    return ran.code == kind.exit_code


# ------------------------------------------------------------ the frame of it


def test_help_names_every_verb(run: Run) -> None:
    ran = run("--help")
    assert ran.code == 0
    for verb in cli.VERBS:
        assert f"\n    {verb}" in ran.out


@pytest.mark.parametrize("verb", cli.VERBS)
def test_each_verb_has_help(run: Run, verb: str) -> None:
    ran = run(verb, "--help")
    assert ran.code == 0
    for option in ("--json", "--quiet", "--verbose", "--progress", "--status-fd"):
        assert option in ran.out


def test_version(run: Run) -> None:
    assert run("--version").out.startswith("qemu-pagesaver 0.")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--json",),
        ("frobnicate",),
        ("info",),
        ("info", "a", "b"),
        ("info", "a", "--frobnicate"),
        ("--js", "info", "a"),
        ("--status-fd", "x", "info", "a"),
        ("--status-fd", "999", "info", "a"),
        ("--status-fd", "-1", "info", "a"),
        ("--status-fd", str(2**70), "info", "a"),
        ("convert", "a", "b", "--to", "qcow2"),
    ],
)
def test_used_wrongly(run: Run, arguments: tuple[str, ...]) -> None:
    ran = run(*arguments)
    assert ran.code == 2
    assert ran.out == ""
    if "--json" in arguments:
        assert json.loads(ran.err)["error"] == "usage"
    else:
        assert "--help" in ran.err or "One of" in ran.err or "descriptor" in ran.err


@pytest.mark.parametrize("where", ["before", "after"])
def test_global_options_before_and_after_the_verb(
    run: Run, snapshot: Path, where: str
) -> None:
    reading, writing = os.pipe()
    options = ["--json", "-q", "-v", "-p", "--status-fd", writing]
    verb = ["check", snapshot]
    ran = run(*options, *verb) if where == "before" else run(*verb, *options)
    os.close(writing)
    events = [json.loads(line) for line in os.read(reading, 1 << 16).splitlines()]
    os.close(reading)
    assert ran.code == 0
    assert ran.document["ok"] is True
    assert events[-1]["event"] == "progress"
    assert events[-1]["stage"] == "checking"
    assert events[-1]["done"] == events[-1]["total"]


def test_errors_as_documents_and_as_events(run: Run, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    ran = run("info", tmp_path / "absent", "--json", "--status-fd", writing)
    os.close(writing)
    (event,) = map(json.loads, os.read(reading, 1 << 16).splitlines())
    os.close(reading)
    assert ran.code == errors.IoError.exit_code
    assert ran.out == ""
    document = json.loads(ran.err)
    assert set(document) == {"error", "message", "hint"}
    assert document["error"] == "io"
    assert "absent" in document["message"]
    assert event["event"] == "failed"
    assert event["error"] == "io"


class Verb(types.ModuleType):
    """A verb that does what a test wants."""

    HELP = "a test"
    TAKES_COMMAND = False

    def __init__(self, body: Callable[[argparse.Namespace, Output], int]) -> None:
        super().__init__("qemu_pagesaver.cli.probe")
        self.body = body

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("words", nargs="*")

    def run(self, args: argparse.Namespace, out: Output) -> int:
        return self.body(args, out)


Probe = Callable[[Callable[[argparse.Namespace, Output], int]], Verb]


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Probe:
    def install(body: Callable[[argparse.Namespace, Output], int]) -> Verb:
        verb = Verb(body)
        monkeypatch.setitem(sys.modules, verb.__name__, verb)
        monkeypatch.setattr(cli, "VERBS", (*cli.VERBS, "probe"))
        return verb

    return install


def raises(error: BaseException) -> Callable[[argparse.Namespace, Output], int]:
    def body(_args: argparse.Namespace, _out: Output) -> int:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (errors.Damaged("it is broken"), 13, "it is broken."),
        (KeyboardInterrupt(), 130, "interrupted."),
        (MemoryError(), 33, "out of memory."),
        (OSError(28, "No space left on device", "X"), 31, "failed X: No space"),
        (ZeroDivisionError("two\nlines"), 10, "ZeroDivisionError: two lines."),
        (RecursionError(), 10, "RecursionError: no text."),
    ],
)
def test_exceptions_become_sentences(
    run: Run, probe: Probe, error: BaseException, code: int, sentence: str
) -> None:
    probe(raises(error))
    ran = run("probe")
    assert ran.code == code
    assert sentence in ran.err
    assert "Traceback" not in ran.err
    assert json.loads(run("probe", "--json").err)["error"]


def test_a_traceback_only_when_asked_for(run: Run, probe: Probe) -> None:
    probe(raises(ZeroDivisionError("oops")))
    assert "Traceback" not in run("probe", "-v").err
    assert "Traceback" in run("probe", "-v", "-v").err
    assert "Traceback" in run("-vv", "probe").err


def test_what_follows_the_dashes(run: Run, probe: Probe) -> None:
    seen: list[Any] = []

    def body(args: argparse.Namespace, _out: Output) -> int:
        seen.append((args.words, args.command))
        return 0

    verb = probe(body)
    verb.TAKES_COMMAND = True
    assert run("probe", "a", "--", "qemu", "--json", "-q").code == 0
    assert run("probe", "a").code == 0
    verb.TAKES_COMMAND = False
    assert run("probe", "a", "--", "-b").code == 0
    assert seen == [
        (["a"], ["qemu", "--json", "-q"]),
        (["a"], None),
        (["a", "-b"], None),
    ]


def test_talk_goes_to_stderr_by_verbosity(run: Run, probe: Probe) -> None:
    def body(_args: argparse.Namespace, out: Output) -> int:
        out.note("a note")
        out.detail("a detail")
        out.progress("counting", 1 << 20, 1 << 20)
        out.result({"it": 1}, "text")
        return 1

    probe(body)
    for option, heard in (
        ("-q", ""),
        ("--json", "a note\n"),
        ("-v", "a note\na detail\n"),
        ("-p", "a note\ncounting: 1.0 MiB (100 %)\n"),
    ):
        ran = run("probe", option)
        assert (ran.code, ran.err) == (1, heard)
        assert ran.out == ('{"it": 1}\n' if option == "--json" else "text\n")


def test_a_supervisor_that_does_not_read_holds_nothing(run: Run, probe: Probe) -> None:
    def body(_args: argparse.Namespace, out: Output) -> int:
        for done in range(20_000):
            out.progress(f"stage {done}", done, 0)
        return 0

    probe(body)
    reading, writing = os.pipe()
    began = time.monotonic()
    assert run("probe", "--status-fd", writing).code == 0
    assert time.monotonic() - began < 5
    os.close(reading)  # and one that has gone
    assert run("probe", "--status-fd", writing).code == 0
    os.close(writing)


def test_hostile_text_does_not_steer_the_terminal() -> None:
    assert printable(ESCAPE) == "\\x1b[31mred\\x1b[0m"
    assert printable("a\nb\u202e\ud800é") == "a\\nb\\u202e\\ud800é"
    assert [size(n) for n in (0, 1023, 1024, 1 << 30, 1 << 50)] == [
        "0 bytes",
        "1023 bytes",
        "1.0 KiB",
        "1.0 GiB",
        "1024.0 TiB",
    ]


def test_hostile_names_in_a_stream(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "hostile"
    name = f"[bold]{ESCAPE}[/bold]"
    device = (f"cpu{ESCAPE}", 0, streams.cpu())
    hostile = streams.stream({name: [noise(1)]}, [device], machine=ESCAPE)
    path.write_bytes(hostile)
    other = tmp_path / "other"
    other.write_bytes(streams.stream({name: [noise(2)]}, []))
    for verb in ("info", "map"):
        ran = run(verb, path)
        assert ran.code == 0
        assert "\x1b" not in ran.out
        assert "[bold]\\x1b[31mred" in ran.out
    for ran in (
        run("info", path, "--device", ESCAPE),
        run("compare", path, other),
        run("check", path),
    ):
        assert ran.code
        assert "\x1b" not in ran.out + ran.err


# ------------------------------------------------------------- as a process


def test_who_reads_stdout_may_go(snapshot: Path) -> None:
    command = subprocess.list2cmdline([*COMMAND, "map", "--json", str(snapshot)])
    script = f"{command} | exec true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert int(done.stdout) in (0, 141)


def test_stdout_may_be_full(snapshot: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMMAND, "info", str(snapshot)],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == errors.DiskFull.exit_code
    assert done.stderr.startswith("qemu-pagesaver: write the result")
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


def test_output_in_ascii(tmp_path: Path) -> None:
    path = tmp_path / "stream"
    path.write_bytes(streams.stream({"é": [noise(1)]}))
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "NO_COLOR": "1"}
    for arguments in (["map"], ["info"], ["info", "--device", "cpu"]):
        done = subprocess.run(
            [*COMMAND, *arguments, str(path)],
            capture_output=True,
            check=True,
            env=environment,
        )
        assert done.stdout.isascii()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
@pytest.mark.parametrize("sent", [0, 3, 100, 10_000, -1])
def test_interrupted_conversions_leave_nothing(
    tmp_path: Path, stream: Path, number: int, code: int, sent: int
) -> None:
    data = stream.read_bytes()[:sent]
    directory = tmp_path / "out"
    directory.mkdir()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [*COMMAND, "convert", "-", str(directory / "new.psnap"), "-v"],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=False,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stdin
    assert process.stderr
    process.stdin.write(data)
    process.stdin.flush()
    time.sleep(1.0)
    process.send_signal(number)
    # stdin stays open: it is the signal that ends it.
    assert process.wait(20) == code
    assert b"interrupted" in process.stderr.read()
    process.stdin.close()
    process.stderr.close()
    assert list(directory.iterdir()) == []


# --------------------------------------------------------------------- verbs


def test_convert_there_and_back(run: Run, stream: Path, tmp_path: Path) -> None:
    there = run("convert", stream, tmp_path / "a.psnap", "--json").document
    assert there["format"] == "psnap"
    assert there["run-state"] == "running"
    assert there["machine"] == "pc-i440fx-7.2"
    assert there["pages"] == {"zero": 596, "fill": 1, "data": 3, "shared": 2}
    assert there["bytes"] == (tmp_path / "a.psnap").stat().st_size
    back = run("convert", tmp_path / "a.psnap", tmp_path / "b.stream", "--json")
    assert back.document["format"] == "stream"
    assert back.document["run-state"] == "running"
    assert back.document["pages"] == there["pages"]
    again = run(
        *("convert", tmp_path / "b.stream", tmp_path / "c", "--compression", "none")
    )
    assert "The guest was running" in again.out
    packed = run(
        *("convert", "--to", "psnap", tmp_path / "c", tmp_path / "d"),
        *("--compression", "zstd:19"),
    )
    assert packed.code == 0
    for other in ("a.psnap", "b.stream", "c", "d"):
        ran = run("compare", stream, tmp_path / other, "--json")
        assert ran.code == 0
        assert ran.document["equal"] is True
        assert ran.document["differences"] == []
        assert ran.document["pages-compared"] == 602
    uuids = {
        run("info", tmp_path / name, "--json").document["uuid"]
        for name in ("a.psnap", "c", "d")
    }
    assert len(uuids) == 3


def test_convert_says_what_the_guest_was(run: Run, tmp_path: Path) -> None:
    """A guest that META calls running is running in the stream, too."""
    paused = [("globalstate", 0, streams.globalstate("paused"))]
    path = tmp_path / "paused.stream"
    path.write_bytes(streams.stream({"r": [noise(1)]}, paused))
    made = run("convert", path, tmp_path / "paused.psnap", "--json").document
    assert made["run-state"] == "paused"
    back = run("convert", tmp_path / "paused.psnap", tmp_path / "back")
    assert "The guest was paused" in back.out
    assert (tmp_path / "back").read_bytes().count(b"paused\0") == 1


def test_convert_refuses(
    run: Run, stream: Path, snapshot: Path, tmp_path: Path
) -> None:
    new = tmp_path / "new"
    assert failed(run("convert", stream, snapshot), errors.TargetExists)
    assert failed(run("convert", tmp_path / "no", new), errors.IoError)
    assert failed(run("convert", tmp_path, new), errors.NotASnapshot)
    assert failed(run("convert", "/dev/null", new), errors.NotASnapshot)
    assert failed(run("convert", __file__, new), errors.NotASnapshot)
    assert failed(run("convert", stream, new, "--to", "stream"), errors.UsageError)
    wrong = ("gzip", "zstd:", "zstd:0", "zstd:99", "zstd:x", "none:1", "")
    for each in wrong:
        ran = run("convert", stream, new, f"--compression={each}")
        assert failed(ran, errors.UsageError)
    ran = run("convert", stream, new, "--spool-dir", tmp_path / "no")
    assert failed(ran, errors.IoError)
    assert failed(run("convert", stream, tmp_path / "no" / "x"), errors.IoError)
    libvirt = tmp_path / "libvirt"
    libvirt.write_bytes(b"LibvirtQemudSave" + bytes(100))
    assert failed(run("convert", libvirt, new), errors.StreamUnsupported)
    empty = tmp_path / "empty"
    empty.touch()
    assert failed(run("convert", empty, new), errors.Truncated)
    assert not new.exists()


def test_convert_when_the_disk_is_full(stream: Path, tmp_path: Path) -> None:
    """A file size limit stands for it; the kernel says EFBIG where it says ENOSPC."""
    done = subprocess.run(
        [
            *("bash", "-c", 'ulimit -f 4; exec "$@"', "-", *COMMAND),
            *("convert", str(stream), str(tmp_path / "new")),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == errors.DiskFull.exit_code, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()


def test_info(run: Run, snapshot: Path, stream: Path) -> None:
    document = run("info", snapshot, "--json").document
    assert document["format-version"] == 1
    assert document["parent"] is None
    assert document["working-set"] is None
    assert document["machine"] == "pc-i440fx-7.2"
    assert document["qemu-version"] is None
    assert document["architecture"] == "x86_64"
    assert document["bytes"] == snapshot.stat().st_size
    pages = {"zero": 596, "fill": 1, "data": 3, "shared": 2, "absent": 0}
    assert document["pages"] == pages
    named = [(b["name"], b["bytes"]) for b in document["ram-blocks"]]
    assert named == [("pc.ram", 600 * 4096), ("pc.bios", 2 * 4096)]
    assert all("page-size" in block for block in document["ram-blocks"])
    assert [d["name"] for d in document["devices"]] == ["cpu", "globalstate"]
    text = run("info", snapshot).out
    for word in (document["uuid"], "pc.bios", "globalstate", "x86_64", "running"):
        assert word in text
    of_stream = run("info", stream, "--json").document
    for key in ("pages", "machine", "ram-blocks", "devices", "run-state"):
        assert of_stream[key] == document[key]


def test_info_of_a_device(run: Run, snapshot: Path) -> None:
    document = run("info", snapshot, "--device", "cpu", "--json").document
    values = {each["name"]: each["value"] for each in document["fields"]}
    assert document["instance"] == 0
    assert document["exact"] is True
    assert values["env.cr[3]"] == 0x1234000
    assert values["env.regs[15]"] == 15
    assert values["env.halted"] is True
    text = run("info", snapshot, "--device", "cpu:0").out
    assert "0x1234000" in text
    ran = run("info", snapshot, "--device", "cpu:1")
    assert failed(ran, errors.UsageError)
    assert "globalstate" in ran.err


def test_info_of_the_command_line(run: Run, snapshot: Path) -> None:
    ran = run("info", snapshot, "--command-line", "--json")
    assert ran.document == {"command-line": None, "qemu-binary": None}
    assert "no command line" in run("info", snapshot, "--command-line").err


def test_check(run: Run, snapshot: Path, tmp_path: Path) -> None:
    ran = run("check", snapshot, "--json")
    assert (ran.code, ran.document["ok"], ran.document["errors"]) == (0, True, [])
    assert "no errors" in run("check", snapshot).out
    broken = tmp_path / "broken.psnap"
    data = bytearray(snapshot.read_bytes())
    data[4096 + 5] ^= 1
    broken.write_bytes(data)
    ran = run("check", broken, "--json")
    assert (ran.code, ran.document["ok"]) == (1, False)
    assert ran.document["count"] == len(ran.document["errors"]) == 1
    assert run("check", broken).code == 1
    broken.write_bytes(data[:-1])
    ran = run("check", broken, "--json")
    assert (ran.code, ran.document["ok"]) == (1, False)
    assert failed(run("check", __file__), errors.NotASnapshot)


def test_compare(run: Run, stream: Path, snapshot: Path, tmp_path: Path) -> None:
    assert "Equal: 602 pages" in run("compare", stream, snapshot).out
    changed = blocks()
    changed["pc.ram"][100] = noise(9)
    changed["pc.ram"][101] = noise(10)
    changed["extra"] = [noise(4)]
    del changed["pc.bios"]
    other = tmp_path / "other"
    devices = [
        ("cpu", 0, streams.cpu(0x9999000)),
        ("globalstate", 0, streams.globalstate("paused")),
        ("new", 3, streams.State("new").number("x", "uint8", 1)),
    ]
    other.write_bytes(streams.stream(changed, devices, machine="pc-q35-10.0"))
    ran = run("compare", snapshot, other, "--json")
    assert ran.code == 1
    assert ran.document["equal"] is False
    assert ran.document["pages-different"] == 2
    found = {(d["kind"], d["where"]): d for d in ran.document["differences"]}
    assert found["machine", "machine"]["b"] == "pc-q35-10.0"
    assert found["pages", "pc.ram"]["first"] == 100
    assert found["pages", "pc.ram"]["count"] == 2
    assert found["ram-block", "pc.bios"]["b"] is None
    assert found["ram-block", "extra"]["a"] is None
    assert found["field", "cpu:0"]["field"] == "env.cr[3]"
    assert found["field", "cpu:0"]["b"] == 0x9999000
    assert found["device", "new:3"]["a"] is None
    fields = {d.get("field") for d in ran.document["differences"]}
    assert {"size", "runstate"} <= fields
    text = run("compare", snapshot, other)
    assert text.code == 1
    assert "pc.ram: pages 100-101 (offset 0x64000)" in text.out
    assert "device globalstate:0: runstate: running | paused" in text.out
    ran = run("compare", snapshot, other, "--ignore-devices", "--json")
    kinds = {d["kind"] for d in ran.document["differences"]}
    assert kinds == {"pages", "ram-block"}


def test_map(run: Run, snapshot: Path) -> None:
    document = run("map", snapshot, "--json").document
    assert document["classes"] == ["absent", "zero", "fill", "data", "shared"]
    regions = {region["ram-block"]: region for region in document["regions"]}
    assert regions["pc.ram"]["leaves"] == [[0, 509, 1, 1, 1], [0, 87, 0, 1, 0]]
    assert sum(regions["pc.bios"]["leaves"][0]) == 2
    document = run("map", snapshot, "--json", "--runs", "--block", "pc.ram").document
    (region,) = document["regions"]
    assert region["runs"] == [
        *([0, 10, 1], [10, 1, 3], [11, 1, 4], [12, 8, 1], [20, 1, 2]),
        *([21, 578, 1], [599, 1, 3]),
    ]
    text = run("map", snapshot).out
    for word in ("pc.ram, 2.3 MiB", "pc.bios, 8.0 KiB", "zero", "shared"):
        assert word in text
    assert failed(run("map", snapshot, "--block", "no"), errors.UsageError)


def test_map_by_guest_physical_address(run: Run, tmp_path: Path) -> None:
    """The CMOS tells where a PC's memory is, if it adds up."""
    path = tmp_path / "stream"
    pages = [bytes(4096)] * ((48 << 20) // 4096)
    for above, addresses in ((16 << 20, [0, 1 << 32]), (8 << 20, [None])):
        cmos = bytearray(128)
        cmos[0x34:0x36] = ((16 << 20) >> 16).to_bytes(2, "little")
        cmos[0x5B:0x5E] = (above >> 16).to_bytes(3, "little")
        clock = streams.State("mc146818rtc", 3).put("cmos_data", "buffer", bytes(cmos))
        path.write_bytes(streams.stream({"pc.ram": pages}, [("mc146818rtc", 0, clock)]))
        document = run("map", path, "--json").document
        assert [r["address"] for r in document["regions"]] == addresses
        assert sum(r["bytes"] for r in document["regions"]) == 48 << 20


def test_host_validate(run: Run, tmp_path: Path) -> None:
    ran = run("host-validate", "--json", "--qemu", "/bin/false")
    assert ran.code == 1
    assert ran.document["ok"] is False
    checks = {check["name"]: check for check in ran.document["checks"]}
    assert checks["qemu false"]["state"] == "lacking"
    assert checks["qemu false"]["remedy"]
    for name in ("userfaultfd", "kvm", "runtime-directory", "spool", "open-files"):
        assert checks[name]["state"] in ("ok", "note", "lacking")
    ran = run("host-validate", "--qemu", "/no/qemu", "--spool-dir", tmp_path / "no")
    assert ran.code == 1
    assert "lacking  spool" in ran.out
    assert "lacking  qemu qemu: /no/qemu cannot be asked" in ran.out


# ------------------------------------------------------------------ bad input


def test_truncated_input(
    run: Run, snapshot: Path, stream: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut"
    codes = {
        errors.NotASnapshot.exit_code,
        errors.Truncated.exit_code,
        errors.Damaged.exit_code,
    }
    for path in (snapshot, stream):
        data = path.read_bytes()
        random_ = random.Random(1)
        for length in (0, 1, 7, 8, *random_.sample(range(len(data)), 40)):
            cut.write_bytes(data[:length])
            for arguments in (
                ("info", cut),
                ("map", cut),
                ("compare", path, cut),
                ("convert", cut, tmp_path / "new"),
            ):
                ran = run(*arguments)
                assert ran.code in codes, (arguments, length, ran.err)
                assert ran.out == ""
            assert not (tmp_path / "new").exists()


def test_flipped_bits(run: Run, snapshot: Path, stream: Path, tmp_path: Path) -> None:
    """What comes out of a damaged snapshot is an error or the right stream."""
    data = snapshot.read_bytes()
    bad, new = tmp_path / "bad", tmp_path / "new"
    random_ = random.Random(2)
    for _ in range(150):
        changed = bytearray(data)
        changed[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
        bad.write_bytes(changed)
        ran = run("convert", bad, new)
        if ran.code == 0:
            assert run("compare", stream, new).code == 0
            new.unlink()
        else:
            assert 10 <= ran.code <= 19, ran.err
            assert "Traceback" not in ran.err
            assert not new.exists()
        for verb in ("info", "map", "check"):
            ran = run(verb, bad)
            assert ran.code in (0, 1, 11, 12, 13, 14, 15), (verb, ran.err)
