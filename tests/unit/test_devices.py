# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

import json
import random
import struct
from typing import Any

import pytest

from qemu_pagesaver import devices, errors
from qemu_pagesaver.devices import Device
from tests.unit import streams
from tests.unit.streams import State


def decode(*given: tuple[str, int, State]) -> tuple[Device, ...]:
    data, description = streams.device_sections(given)
    return devices.decode(description, data, footers=True)


def one(state: State) -> Device:
    (device,) = decode((state.name, 0, state))
    assert device.data == state.data
    return device


def sample() -> tuple[bytes, bytes]:
    """A bit of everything."""
    inner = [
        State("inner").number("num", "uint16", i).number("base", "uint64", 4096 * i)
        for i in range(3)
    ]
    state = State("everything", 2)
    state.number("small", "uint8", 200).number("below", "int32", -5)
    state.put("name", "buffer", b"abc\0\0\0\0\0").put("gap", "unused_buffer", bytes(4))
    state.put("later", "timer", (2**64 - 1).to_bytes(8, "big"))
    state.structs("queue", inner)
    sub = State("everything/more", 3).numbers("msr", "uint64", [7, 8])
    sub.subsection(State("everything/more/still").number("x", "uint32", 9))
    state.subsection(sub)
    return streams.device_sections(
        [
            ("cpu", 0, streams.cpu()),
            ("cpu", 1, streams.cpu(0x5000)),
            ("0000:00:02.0/everything", 0, state),
            ("globalstate", 0, streams.globalstate("paused")),
        ]
    )


def test_fields_have_names_types_offsets_and_values() -> None:
    data, description = sample()
    found = devices.decode(description, data, footers=True)
    assert [(d.name, d.instance, d.exact) for d in found] == [
        ("cpu", 0, True),
        ("cpu", 1, True),
        ("0000:00:02.0/everything", 0, True),
        ("globalstate", 0, True),
    ]
    cr3 = found[1].field("env.cr[3]")
    assert (cr3.value, cr3.type, cr3.size) == (0x5000, "uint64", 8)
    assert data[cr3.offset : cr3.offset + 8] == cr3.data
    assert found[0].field("env.regs[5]").value == 5
    assert found[0].field("env.regs").value == tuple(range(16))
    assert found[0].field("env.halted").value is True
    device = found[2]
    assert (device.type, device.version) == ("everything", 2)
    values = {each.name: each.value for each in device.fields()}
    assert values == {
        "small": 200,
        "below": -5,
        "name": b"abc\0\0\0\0\0",
        "gap": bytes(4),
        "later": -1,
        "queue[0].num": 0,
        "queue[0].base": 0,
        "queue[1].num": 1,
        "queue[1].base": 4096,
        "queue[2].num": 2,
        "queue[2].base": 8192,
        "everything/more.msr[0]": 7,
        "everything/more.msr[1]": 8,
        "everything/more.everything/more/still.x": 9,
    }
    for name, value in values.items():
        assert device.field(name).value == value
    for name in ("", "queue[3].num", "queue[0]num2", "queue[0].", "env", "small[0]"):
        with pytest.raises(KeyError):
            device.field(name)


def test_every_byte_is_in_one_field() -> None:
    data, description = sample()
    for device in devices.decode(description, data, footers=True):
        covered = sum(each.size for each in device.fields())
        headers = sum(
            6 + len(name)
            for name in ("everything/more", "everything/more/still")
            if device.type == "everything"
        )
        assert covered + headers == len(device.data)


def test_elements_described_one_by_one() -> None:
    state = State("list")
    for index in range(3):
        inner = State("element").put("blob", "buffer", bytes(index + 1))
        state.struct("e", inner, index=index)
    assert [each.name for each in one(state).fields()] == [
        "e[0].blob",
        "e[1].blob",
        "e[2].blob",
    ]
    assert one(state).field("e[2].blob").size == 3


def test_null_elements_as_qemu_9_2_describes_them() -> None:
    state = State("pointers")
    state.fields += [
        {"name": "p", "type": "nullptr", "size": 1},
        {"name": "p", "array_len": 2, "type": "uint32", "size": 4},
        {"name": "p", "array_len": 2, "type": "nullptr", "size": 1},
        {"name": "p", "type": "uint32", "size": 4},
    ]
    state.data = b"0" + struct.pack(">II", 5, 6) + b"00" + struct.pack(">I", 7)
    device = one(state)
    values = [None, 5, 6, None, None, 7]
    assert [(f.name, f.value) for f in device.fields()] == [
        (f"p[{n}]", value) for n, value in enumerate(values)
    ]
    assert [device.field(f"p[{n}]").value for n in range(6)] == values


def test_qemu_9_2_leaves_out_the_last_index() -> None:
    state = State("list")
    for index in range(3):
        inner = State("element").number("x", "uint8", index)
        state.struct("e", inner, **({"index": index} if index < 2 else {}))
    device = one(state)
    assert [each.name for each in device.fields()] == ["e[0].x", "e[1].x", "e[2].x"]
    assert device.field("e[2].x").value == 2


def test_null_elements_as_older_qemu_describes_them() -> None:
    """One byte for NULL where the description says that all are structures."""
    state = State("pointers").number("before", "uint8", 1)
    element = State("element").number("x", "uint64", 77)
    state.structs("p", [element, element, element])
    state.data = state.data[: 1 + 8] + b"0" + state.data[1 + 8 : 1 + 16]
    state.number("after", "uint8", 2)
    found = decode(("pointers", 0, state), ("cpu", 0, streams.cpu()))
    assert [device.exact for device in found] == [False, True]
    assert found[0].data == state.data
    assert [each.name for each in found[0].fields()] == ["before"]


def test_lists_are_taken_apart() -> None:
    element = State("element").number("x", "uint16", 3)
    other = State("element").number("x", "uint16", 4)
    data = b"\1" + element.data + b"\1" + other.data + b"\0"
    described = json.dumps({"name": "l", "type": "qtailq", **element.description()})[
        :-1
    ]
    # QEMU writes the keys once for each element.
    described += ", " + json.dumps(other.description())[1:-1]
    described += f', "size": {len(data)}}}'
    section = streams.full_section(3, "d", 0, State("d", data=data))
    text = '{"devices": [{"name": "d", "instance_id": 0, "fields": ['
    text += described + "]}]}"
    (device,) = devices.decode(text.encode(), section, footers=True)
    assert {f.name: f.value for f in device.fields()} == {"l[0].x": 3, "l[1].x": 4}


def test_commands_are_skipped_and_unlisted_devices_found_by_footer() -> None:
    data, description = streams.device_sections([("cpu", 0, streams.cpu())])
    odd = streams.full_section(9, "odd", 4, State("odd", data=b"\x7e\0\0\0\1xyz"))
    whole = streams.command(11, b"") + odd + streams.command(2, b"ping") + data
    found = devices.decode(description, whole, footers=True)
    assert [(d.name, d.exact) for d in found] == [("odd", False), ("cpu", True)]
    assert found[0].data == b"\x7e\0\0\0\1xyz"
    assert devices.decode(b"", whole, footers=True)[1].data == streams.cpu().data


def test_without_footers_the_description_is_all_there_is() -> None:
    given = [("cpu", 0, streams.cpu()), ("globalstate", 0, streams.globalstate())]
    data, description = streams.device_sections(given, footers=False)
    found = devices.decode(description, data, footers=False)
    assert devices.run_state(found) == "running"
    with pytest.raises(errors.Damaged):
        devices.decode(b"", data, footers=False)


@pytest.mark.parametrize("described", [True, False])
def test_run_state_is_replaced(*, described: bool) -> None:
    data, description = sample()
    if not described:
        description = b""
    changed = devices.with_run_state(data, description, footers=True, state="running")
    assert len(changed) == len(data)
    found = devices.decode(description, changed, footers=True)
    assert devices.run_state(found) == "running"
    if described:
        assert found[3].field("size").value == len("running") + 1
    again = devices.with_run_state(changed, description, footers=True, state="paused")
    assert again == data
    with pytest.raises(ValueError, match="too long"):
        devices.with_run_state(data, description, footers=True, state="x" * 32)


def test_run_state_may_be_missing() -> None:
    data, description = streams.device_sections([("cpu", 0, streams.cpu())])
    found = devices.decode(description, data, footers=True)
    assert devices.run_state(found) is None
    state = devices.with_run_state(data, description, footers=True, state="running")
    assert state == data


def test_find_by_name_and_instance() -> None:
    data, description = sample()
    found = devices.decode(description, data, footers=True)
    assert devices.find(found, "cpu").instance == 0
    assert devices.find(found, "cpu", 1).instance == 1
    assert devices.find(found, "everything").name == "0000:00:02.0/everything"
    for name, instance in (("cpu", 2), ("0000:00:02.0", None), ("", None)):
        with pytest.raises(KeyError):
            devices.find(found, name, instance)
    assert devices.architecture(found) == "x86_64"
    arm = State("cpu", 22).numbers("env.regs", "uint32", range(16))
    arm.numbers("env.xregs", "uint64", range(32))
    assert devices.architecture((one(arm),)) == "aarch64"


def test_machine_name() -> None:
    assert devices.machine_name(streams.configuration("pc-q35-10.0")) == "pc-q35-10.0"
    for broken in (b"", b"\x07", b"\x07\0\0\0\5abcd", b"\x06\0\0\0\1a"):
        with pytest.raises(errors.Damaged):
            devices.machine_name(broken)


def decodes(description: bytes, data: bytes) -> bool:
    """Decode; say whether that succeeded. Everything but Damaged is a failure."""
    try:
        found = devices.decode(description, data, footers=True)
    except errors.Damaged:
        return False
    for device in found:
        for each in device.fields():
            assert each.value is not None or each.type == "nullptr"
            assert each.size == len(each.data)
    return True


def test_truncated_anywhere() -> None:
    data, description = sample()
    for length in range(len(data)):
        decodes(description, data[:length])
    for length in range(1, len(description)):
        assert not decodes(description[:length], data)


def test_flipped_bits() -> None:
    data, description = sample()
    random_ = random.Random(1)
    for _ in range(3000):
        changed, text = bytearray(data), bytearray(description)
        for victim in random_.choice(([changed], [text], [changed, text])):
            victim[random_.randrange(len(victim))] ^= 1 << random_.randrange(8)
        decodes(bytes(text), bytes(changed))


def described(*fields: dict[str, Any], **more: object) -> bytes:
    device = {"name": "d", "instance_id": 0, "fields": list(fields), **more}
    return json.dumps({"devices": [device]}).encode()


def test_hostile_descriptions_cost_nothing() -> None:
    section = streams.full_section(3, "d", 0, State("d", data=bytes(64)))

    def run(description: bytes) -> bool:
        return decodes(description, section)

    huge = {"name": "a", "type": "uint8", "size": 0, "array_len": 2**32 - 1}
    assert run(described(huge, {"name": "b", "type": "buffer", "size": 64}))
    inner = {"vmsd_name": "i", "version": 1, "fields": [huge] * 50}
    nested = {"name": "n", "type": "struct", "struct": inner, "size": 0}
    assert run(described(*[{**nested, "array_len": 2**32 - 1}] * 50))
    assert run(described({"name": "c", "type": "buffer", "size": 2**32 - 1}))
    # Nothing of those is believed: the footer says where the section ends.
    deep: dict[str, Any] = {"name": "x", "type": "uint8", "size": 1}
    for _ in range(100):
        fields = {"vmsd_name": "d", "version": 1, "fields": [deep]}
        deep = {"name": "x", "type": "struct", "size": 1, "struct": fields}
    assert not run(described(deep))
    assert not run(b"[" * 100_000)
    assert not run(b'{"devices": ' + b'[{"a":' * 50_000)
    assert not run(b"9" * 10_000)
    assert not run(b'{"devices": [{"name": "d", "instance_id": 1e999, "fields": []}]}')
    for wrong in (
        {"name": 1, "type": "uint8", "size": 1},
        {"name": "a", "size": 1},
        {"name": "a", "type": "uint8", "size": -1},
        {"name": "a", "type": "uint8", "size": 2**64},
        {"name": "a", "type": "uint8", "size": True},
        {"name": "a", "type": "uint8", "size": 1, "array_len": "3"},
        {"name": "a", "type": "struct", "size": 1, "struct": {"fields": {}}},
    ):
        assert not run(described(wrong))
    assert not run(described({}, subsections=[{"vmsd_name": "s"}]))
    assert not run(described(subsections=[{"vmsd_name": "s" * 300, "fields": []}]))
    with pytest.raises(errors.Damaged):
        devices.decode(b" " * ((16 << 20) + 1), section, footers=True)
