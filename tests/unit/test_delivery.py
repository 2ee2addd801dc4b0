# SPDX-License-Identifier: LGPL-2.1-or-later
"""What delivery decides, and how it takes a QEMU that behaves badly."""

from __future__ import annotations

import argparse
import asyncio
import socket
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import pytest

from qemu_pagesaver import delivery, errors, placement
from qemu_pagesaver.cli.delivery import add_delivery, options
from qemu_pagesaver.guest import Guest, HostBlock, parse_ram_blocks
from qemu_pagesaver.native import UNBOUNDED, RamBlock
from qemu_pagesaver.postcopy import Reply

OF_7_2 = """\
              Block Name    PSize              Offset               Used              Total
                  pc.ram    4 KiB  0x0000000000000000 0x0000000008000000 0x0000000008000000
 0000:00:02.0/vga.vram      2 MiB  0x0000000008080000 0x0000000001000000 0x0000000001000000
    /rom@etc/acpi/tables    4 KiB  0x0000000008100000 0x0000000000020000 0x0000000000200000
                           4 KiB  0x0000000009000000 0x0000000000001000 0x0000000000001000
"""  # noqa: E501 - as QEMU prints it
OF_10_0 = """\
              Block Name    PSize              Offset               Used              Total                HVA  RO
                  pc.ram    1 GiB  0x0000000000000000 0x0000000040000000 0x0000000040000000 0x00007f8d40000000  rw
    odd name 4 KiB (block)  4 KiB  0x0000000040000000 0x0000000000001000 0x0000000000001000 0x00007f8d80000000  ro
"""  # noqa: E501


def host(name: str, page_size: int, length: int, length_max: int) -> HostBlock:
    return HostBlock(
        name=name, page_size=page_size, length=length, length_max=length_max
    )


def test_info_ramblock() -> None:
    assert parse_ram_blocks(OF_7_2) == [
        host("pc.ram", 4096, 128 << 20, 128 << 20),
        host("0000:00:02.0/vga.vram", 2 << 20, 16 << 20, 16 << 20),
        host("/rom@etc/acpi/tables", 4096, 128 << 10, 2 << 20),
    ]
    assert parse_ram_blocks(OF_10_0) == [
        host("pc.ram", 1 << 30, 1 << 30, 1 << 30),
        host("odd name 4 KiB (block)", 4096, 4096, 4096),
    ]


RAM = RamBlock(
    index=0,
    name="pc.ram",
    length=128 << 20,
    page_size=None,
    address=None,
    first_leaf=0,
    pages_zero=0,
    pages_fill=0,
    pages_data=0,
    pages_absent=0,
)
TABLES = replace(RAM, index=1, name="/rom@etc/acpi/tables", length=256 << 10)
THERE = parse_ram_blocks(OF_7_2)[::2]


def test_blocks_that_fit() -> None:
    # ACPI tables grow to what the stream says.
    found = delivery.match_blocks([TABLES, RAM], THERE, where="QEMU")
    assert [block.name for block in found] == [TABLES.name, RAM.name]
    assert [block.length for block in found] == [TABLES.length, RAM.length]


@pytest.mark.parametrize(
    ("wanted", "there", "message"),
    [
        ([RAM], THERE, "which the snapshot does not have"),
        ([RAM, TABLES, replace(RAM, name="more")], THERE, "has no RAM block more"),
        ([replace(RAM, length=64 << 20), TABLES], THERE, "67108864 bytes"),
        ([RAM, replace(TABLES, length=4 << 20)], THERE, "4194304 bytes"),
        (
            [replace(RAM, length=4096)],
            [host("pc.ram", 2 << 20, 4096, 4096)],
            "no multiple of the page size",
        ),
    ],
    ids=["more", "less", "smaller", "larger", "page-size"],
)
def test_blocks_that_do_not_fit(
    wanted: list[RamBlock], there: list[HostBlock], message: str
) -> None:
    with pytest.raises(errors.MachineMismatch, match=message):
        delivery.match_blocks(wanted, there, where="QEMU")


@pytest.mark.parametrize(
    ("text", "rate"),
    [("off", 0), ("max", UNBOUNDED), ("1", 1), ("4k", 4096), ("2G", 2 << 30)],
)
def test_rates(text: str, rate: int) -> None:
    assert delivery.parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "0", "-1", "M", "1T", "1.5M", "1e3", "9" * 20])
def test_no_rates(text: str) -> None:
    with pytest.raises(errors.UsageError):
        delivery.parse_rate(text)


@pytest.mark.parametrize(
    "options", [{"prefetch": "all"}, {"preempt": "1"}, {"prefetch_window": -1}]
)
def test_options_out_of_range(options: dict[str, str]) -> None:
    with pytest.raises(errors.UsageError):
        delivery.Delivery(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "names",
    [
        ["mig/dst/fault", "mig/dst/listen", "CPU 0/TCG"],
        ["fault-default", "postcopy/listen", "CPU 0/KVM"],
    ],
)
def test_threads_of_a_fault(names: list[str]) -> None:
    named = dict(enumerate(["qemu-system-x86", "IO mon_iothread", *names]))
    assert placement.fault_path(named) == [4, 2, 3]
    assert placement.fault_path(named | {9: "CPU 1/TCG"}) is None
    assert placement.fault_path(named | {4: "qemu-system-x86"}) is None


# ------------------------------------------------------------- bad behaviour


class _Watch:
    def ended(self, _timeout: float = 0) -> bool:
        return False


class _FakeGuest:
    """A QEMU that lives and says nothing."""

    pid = 4711
    watch = _Watch()
    last_words = "its last words"

    @property
    def qmp(self) -> object:
        raise errors.QmpUnreachable("no QMP")


def message(kind: Reply, body: bytes) -> bytes:
    return struct.pack(">HH", kind, len(body)) + body


def ask(behave: Callable[[socket.socket], None]) -> delivery.Link:
    """Wait for a PONG from a QEMU that behaves in some way."""

    async def run() -> delivery.Link:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            link = delivery.Link(ours, None, cast("Guest", _FakeGuest()))
            link.expect_blocks({"pc.ram": 1 << 20})
            behave(theirs)
            try:
                await link.receive(Reply.PONG, 2, "in a test")
                return link
            finally:
                link.close()

    return asyncio.run(run())


def test_requests_are_kept() -> None:
    first = message(Reply.REQ_PAGES_ID, struct.pack(">QI", 0, 4096) + b"\x06pc.ram")
    second = message(Reply.REQ_PAGES, struct.pack(">QI", 4096, 4096))
    pongs = [message(Reply.PONG, struct.pack(">I", value)) for value in (1, 2)]
    data = first + pongs[0] + pongs[1] + second + first[:7]
    link = ask(lambda sock: sock.sendall(data))
    assert link.take_received() == first + second + first[:7]


@pytest.mark.parametrize(
    ("behave", "kind"),
    [
        (lambda sock: sock.sendall(b"\xff" * 64), errors.PeerNonsense),
        (lambda sock: sock.shutdown(socket.SHUT_WR), errors.MigrationFailed),
        (
            lambda sock: sock.sendall(message(Reply.SHUT, bytes(4))),
            errors.MigrationFailed,
        ),
        (lambda _: None, errors.QemuTimeout),
        (lambda sock: sock.sendall(b"\0\2\0\4\0"), errors.QemuTimeout),
    ],
    ids=["nonsense", "closes", "shuts", "silent", "half"],
)
def test_bad_behaviour(
    behave: Callable[[socket.socket], None],
    kind: type[errors.PagesaverError],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(delivery, "ANSWER_TIMEOUT", 0.05)
    with pytest.raises(kind, match=r"4711|nonsense"):
        ask(behave)


def test_the_verb_has_the_same_defaults() -> None:
    """Said twice, as --help must not need the C core."""
    parser = argparse.ArgumentParser()
    add_delivery(parser, preempt=True)
    args = parser.parse_args([])
    how = options(args) | {"preempt": args.preempt}
    assert delivery.Delivery(**how) == delivery.Delivery()
