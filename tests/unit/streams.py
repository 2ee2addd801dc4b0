# SPDX-License-Identifier: LGPL-2.1-or-later
"""Small QEMU streams, written by code: an encoder that shares nothing with us."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

PAGE = 4096


@dataclass
class State:
    """A device's state, bytes and description side by side, as vmstate.c does."""

    name: str
    version: int = 1
    data: bytes = b""
    fields: list[dict[str, Any]] = field(default_factory=list)
    subsections: list[dict[str, Any]] = field(default_factory=list)

    def put(self, name: str, kind: str, data: bytes, **more: object) -> State:
        self.fields.append({"name": name, **more, "type": kind, "size": len(data)})
        self.data += data
        return self

    def number(self, name: str, kind: str, value: int) -> State:
        bits = int("".join(filter(str.isdigit, kind)))
        signed = kind.startswith("int")
        return self.put(name, kind, value.to_bytes(bits // 8, "big", signed=signed))

    def numbers(self, name: str, kind: str, values: Sequence[int]) -> State:
        bits = int("".join(filter(str.isdigit, kind)))
        parts = [value.to_bytes(bits // 8, "big") for value in values]
        described = {"name": name, "array_len": len(values), "type": kind}
        self.fields.append({**described, "size": bits // 8})
        self.data += b"".join(parts)
        return self

    def struct(self, name: str, inner: State, **more: object) -> State:
        described = {"name": name, **more, "type": "struct"}
        self.fields.append(
            {**described, "struct": inner.description(), "size": len(inner.data)}
        )
        self.data += inner.data
        return self

    def structs(self, name: str, inner: Sequence[State]) -> State:
        """An array of equal structures, the first one described for all."""
        self.struct(name, inner[0], array_len=len(inner))
        self.data += b"".join(each.data for each in inner[1:])
        return self

    def subsection(self, inner: State) -> State:
        encoded = inner.name.encode()
        header = b"\x05" + bytes([len(encoded)]) + encoded
        self.data += header + struct.pack(">I", inner.version) + inner.data
        self.subsections.append(inner.description())
        return self

    def description(self) -> dict[str, Any]:
        described: dict[str, Any] = {
            "vmsd_name": self.name,
            "version": self.version,
            "fields": self.fields,
        }
        if self.subsections:
            described["subsections"] = self.subsections
        return described


def counted(name: str) -> bytes:
    encoded = name.encode()
    return bytes([len(encoded)]) + encoded


def full_section(
    number: int, name: str, instance: int, state: State, *, footers: bool = True
) -> bytes:
    head = b"\x04" + struct.pack(">I", number) + counted(name)
    head += struct.pack(">II", instance, state.version)
    return head + state.data + (footer(number) if footers else b"")


def footer(number: int) -> bytes:
    return b"\x7e" + struct.pack(">I", number)


def command(number: int, payload: bytes) -> bytes:
    return b"\x08" + struct.pack(">HH", number, len(payload)) + payload


def globalstate(state: str = "running") -> State:
    made = State("globalstate").number("size", "uint32", len(state) + 1)
    return made.put("runstate", "buffer", state.encode().ljust(100, b"\0"))


def cpu(cr3: int = 0x1234000) -> State:
    made = State("cpu", 12)
    made.numbers("env.regs", "uint64", range(16))
    made.number("env.cr[0]", "uint64", 0x80050033)
    made.number("env.cr[3]", "uint64", cr3)
    made.number("env.efer", "uint64", 0xD01)
    return made.put("env.halted", "bool", b"\1")


Devices = Sequence[tuple[str, int, State]]


def device_sections(devices: Devices, *, footers: bool = True) -> tuple[bytes, bytes]:
    """Bytes and JSON description of device sections, numbered from 3."""
    data = b""
    described = []
    for number, (name, instance, state) in enumerate(devices, 3):
        data += full_section(number, name, instance, state, footers=footers)
        described.append({"name": name, "instance_id": instance, **state.description()})
    document = {"page_size": PAGE, "devices": described}
    return data, json.dumps(document).encode()


def configuration(machine: str) -> bytes:
    return b"\x07" + struct.pack(">I", len(machine)) + machine.encode()


def stream(
    blocks: dict[str, list[bytes]],
    devices: Devices | None = None,
    *,
    machine: str = "pc-i440fx-7.2",
) -> bytes:
    """A whole stream: pages of each RAM block, in order; footers on."""
    out = bytearray(b"QEVM" + struct.pack(">I", 3) + configuration(machine))
    total = sum(len(pages) * PAGE for pages in blocks.values())
    out += b"\x01" + struct.pack(">I", 2) + counted("ram") + struct.pack(">II", 0, 4)
    out += struct.pack(">Q", total | 0x04)
    for name, pages in blocks.items():
        out += counted(name) + struct.pack(">Q", len(pages) * PAGE)
    out += struct.pack(">Q", 0x10) + footer(2)
    out += b"\x03" + struct.pack(">I", 2)
    for name, pages in blocks.items():
        for index, page in enumerate(pages):
            flags = 0x20 if index else 0
            zero = not any(page)
            flags |= 0x02 if zero else 0x08
            out += struct.pack(">Q", index * PAGE | flags)
            out += b"" if index else counted(name)
            out += b"\0" if zero else page
    out += struct.pack(">Q", 0x10) + footer(2)
    if devices is None:
        devices = [("cpu", 0, cpu()), ("globalstate", 0, globalstate())]
    sections, description = device_sections(devices)
    out += sections + b"\0"
    out += b"\x06" + struct.pack(">I", len(description)) + description
    return bytes(out)
