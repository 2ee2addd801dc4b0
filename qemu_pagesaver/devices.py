# SPDX-License-Identifier: LGPL-2.1-or-later
"""Device sections of a QEMU stream, decoded with the JSON that QEMU appends.

Does no I/O. QEMU's ``migration/vmstate.c`` (vmstate_save_state_v,
vmsd_desc_field_start) writes the bytes and the description side by side: a field
has a name, a type and the size of one element; equal elements of an array are
described once (``array_len``), others one by one (``index``); a ``struct`` holds
a description of its own; sub-sections follow the fields as 0x05, counted name,
be32 version, fields. ``migration/savevm.c`` frames the sections.

The description is trusted for sizes only: each section has to end where its
footer stands. Some arrays of pointers are described wrongly by QEMU before 9.2
(an element that is NULL is one byte, whatever its neighbours are); then the
section's end is found by its footer, and the fields from there on are left out
(``Device.exact`` is false).
"""

from __future__ import annotations

import itertools
import json
import re
import struct
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from qemu_pagesaver import errors

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

T = TypeVar("T")
Value: TypeAlias = "int | bool | bytes | tuple[Value, ...] | None"

_SECTION_FULL = 0x04
_SUBSECTION = 0x05
_CONFIGURATION = 0x07
_COMMAND = 0x08
_FOOTER = 0x7E
_FOOTER_BYTES = 5

# QEMU's deepest description has about 8 levels.
_MAX_DEPTH = 32
# Python objects take some 20 times the space of their JSON text.
_MAX_DESCRIPTION = 16 << 20
_RUN_STATE_BYTES = 32

_INTEGER = re.compile(r"(u?)int(8|16|32|64)( equal| le)?")
_FLOATS = {"CPU_Double_U", "float64", "float32"}
# Where a description repeats a key: QEMU's lists write one set for each element.
_REPEATED = object()


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field, an element of an array, or a whole array of them.

    ``offset`` counts from the start of DEVICES; ``size`` is in bytes; ``data`` are
    its bytes. ``count`` is 1 unless it is a whole array.
    """

    name: str
    type: str
    offset: int
    size: int
    count: int
    data: bytes = field(repr=False)

    @property
    def value(self) -> Value:
        """The bytes as what the type says: int, bool, None (NULL) or bytes."""
        if self.count == 1:
            return _value(self.type, self.data)
        if not _is_scalar(self.type, self.size // self.count):
            return self.data
        step = self.size // self.count
        return tuple(
            _value(self.type, self.data[at : at + step])
            for at in range(0, self.size, step)
        )


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """Where a field is within its structure; ``size`` is that of one element."""

    name: str
    type: str
    offset: int
    size: int
    count: int = 1
    first_index: int | None = None  # of an array's element 0; None: no array
    members: tuple[_Layout, ...] = ()
    marker: bytes = b""  # what must be there: header of a sub-section

    @property
    def end(self) -> int:
        return self.offset + self.size * self.count


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device section.

    Attributes:
        name: QEMU's, as "cpu" or "0000:00:02.0/virtio-net".
        instance: Instance id.
        section_id: Number of the section in the stream.
        version: Version of the section.
        type: Name of the state's description ("vmsd_name"); "" without one.
        offset: Of ``data`` in DEVICES.
        data: The section's bytes between header and footer.
        exact: All fields are known and fill the section exactly.
    """

    name: str
    instance: int
    section_id: int
    version: int
    type: str
    offset: int
    exact: bool
    data: bytes = field(repr=False)
    _layout: tuple[_Layout, ...] = field(repr=False, default=())

    def field(self, path: str) -> Field:
        """Return a field by name: ``env.cr[3]``, ``vqs[0].num``, ``env.regs``.

        QEMU calls a part of an array like the whole, without saying where it
        begins (``env.vfp.xregs`` of an Arm CPU); of equal names the first counts.

        Raises:
            KeyError: There is no such field.
        """
        found = _find(self._layout, path, 0)
        if found is None:
            raise KeyError(path)
        layout, at, count = found
        return self._make(path, layout, at, count)

    def fields(self) -> Iterator[Field]:
        """Yield all fields that hold values, structures and arrays taken apart."""
        for path, layout, at in _leaves(self._layout, "", 0):
            yield self._make(path, layout, at, 1)

    def _make(self, path: str, layout: _Layout, at: int, count: int) -> Field:
        size = layout.size * count
        return Field(
            name=path,
            type=layout.type,
            offset=self.offset + at,
            size=size,
            count=count,
            data=self.data[at : at + size],
        )


def machine_name(configuration: bytes) -> str:
    """Return the machine type that a CONFIGURATION section names.

    Raises:
        Damaged: It is no such section.
    """
    if len(configuration) < 5 or configuration[0] != _CONFIGURATION:
        raise errors.Damaged("configuration section: it does not begin like one")
    (length,) = struct.unpack_from(">I", configuration, 1)
    if length > len(configuration) - 5:
        raise errors.Damaged("configuration section: the machine's name is too long")
    return configuration[5 : 5 + length].decode("utf-8", "replace")


def decode(description: bytes, devices: bytes, *, footers: bool) -> tuple[Device, ...]:
    """Take DEVICES apart with DESCRIPTION (FORMAT.md); both as in the stream.

    Without a description (empty) sections are found by their footers, and no
    fields are known.

    Raises:
        Damaged: The sections cannot be followed to their end, or the
            description is not one.
    """
    described = _describe(description)
    found: list[Device] = []
    at = 0
    while at < len(devices):
        kind = devices[at]
        if kind == _COMMAND:
            at = _skip_command(devices, at)
        elif kind == _SECTION_FULL:
            device, at = _section(devices, at, described, footers=footers)
            found.append(device)
        else:
            raise _damaged(f"a section of type {kind:#04x} is not known", at)
    return tuple(found)


def find(devices: Sequence[Device], name: str, instance: int | None = None) -> Device:
    """Return one device by name, the lowest instance unless one is given.

    A name without its bus address ("virtio-net") does where it is the only one.

    Raises:
        KeyError: There is none, or there are several.
    """
    for match in (
        [d for d in devices if d.name == name],
        [d for d in devices if d.name.rpartition("/")[2] == name],
    ):
        chosen = [d for d in match if instance is None or d.instance == instance]
        if chosen and len({d.name for d in chosen}) == 1:
            return min(chosen, key=lambda d: d.instance)
    raise KeyError(name)


def run_state(devices: Sequence[Device]) -> str | None:
    """Return the run state that QEMU recorded, or None where it did not."""
    for device in devices:
        if device.name == "globalstate":
            start, length = _run_state_place(device)
            text = device.data[start : start + length].partition(b"\0")[0]
            return text.decode("ascii", "replace")
    return None


def with_run_state(
    devices: bytes, description: bytes, *, footers: bool, state: str
) -> bytes:
    """Return DEVICES with another run state ("running", "paused").

    A stream without that section is returned as it is: QEMU then starts the
    guest unless told otherwise.
    """
    encoded = state.encode("ascii")
    for device in decode(description, devices, footers=footers):
        if device.name != "globalstate":
            continue
        start, length = _run_state_place(device)
        if len(encoded) >= length:
            raise ValueError(f"run state {state!r} is too long")
        changed = bytearray(devices)
        struct.pack_into(">I", changed, device.offset, len(encoded) + 1)
        at = device.offset + start
        changed[at : at + length] = encoded.ljust(length, b"\0")
        return bytes(changed)
    return devices


def architecture(devices: Sequence[Device]) -> str | None:
    """Guess the guest's architecture from its CPU's registers."""
    marks = {
        "env.efer": "x86_64",
        "env.xregs": "aarch64",
        "env.elr_el": "aarch64",
        "env.gpr": "riscv64",
        "env.psw.mask": "s390x",
    }
    for device in devices:
        if device.name == "cpu":
            for mark, name in marks.items():
                if _find(device._layout, mark, 0):
                    return name
    return None


# ---------------------------------------------------------------- sections


def _damaged(what: str, at: int) -> errors.Damaged:
    return errors.Damaged(f"device sections: {what} (at offset {at})")


def _skip_command(devices: bytes, at: int) -> int:
    if at + 5 > len(devices):
        raise _damaged("a command is cut off", at)
    (length,) = struct.unpack_from(">H", devices, at + 3)
    if at + 5 + length > len(devices):
        raise _damaged("a command is cut off", at)
    return int(at + 5 + length)


@dataclass(frozen=True, kw_only=True)
class _Header:
    section_id: int
    name: str
    instance: int
    version: int
    length: int


def _header(devices: bytes, at: int) -> _Header | None:
    """Read a FULL section's header, or None where there is none."""
    if at + 6 > len(devices) or devices[at] != _SECTION_FULL:
        return None
    (section_id, name_length) = struct.unpack_from(">IB", devices, at + 1)
    if not name_length or at + 14 + name_length > len(devices):
        return None
    name = devices[at + 6 : at + 6 + name_length]
    instance, version = struct.unpack_from(">II", devices, at + 6 + name_length)
    return _Header(
        section_id=section_id,
        name=name.decode("utf-8", "replace"),
        instance=instance,
        version=version,
        length=14 + name_length,
    )


_Described: TypeAlias = "dict[tuple[str, int], tuple[str, tuple[_Layout, ...], int]]"


def _section(
    devices: bytes, at: int, described: _Described, *, footers: bool
) -> tuple[Device, int]:
    """Take one section apart; returns it and where the next one begins."""
    header = _header(devices, at)
    if header is None:
        raise _damaged("a section's header is cut off", at)
    start = at + header.length
    kind, layout, size = described.get((header.name, header.instance), ("", (), -1))
    end = start + size
    exact = size >= 0 and _fits(devices, layout, start, end, header, footers=footers)
    if not exact:
        if not footers:
            raise _damaged(f"{header.name} does not fit its description", at)
        end = _find_end(devices, start, header)
        layout = _certain(layout, devices[start:end])
    device = Device(
        name=header.name,
        instance=header.instance,
        section_id=header.section_id,
        version=header.version,
        type=kind,
        offset=start,
        exact=exact,
        data=devices[start:end],
        _layout=layout,
    )
    return device, end + (_FOOTER_BYTES if footers else 0)


def _footer(header: _Header) -> bytes:
    return struct.pack(">BI", _FOOTER, header.section_id)


def _fits(
    devices: bytes,
    layout: tuple[_Layout, ...],
    start: int,
    end: int,
    header: _Header,
    *,
    footers: bool,
) -> bool:
    """Say whether a section ends where its description says."""
    if end > len(devices):
        return False
    if not _markers_fit(layout, devices[start:end]):
        return False
    if footers:
        return devices[end : end + _FOOTER_BYTES] == _footer(header)
    return end == len(devices) or devices[end] in (_SECTION_FULL, _COMMAND)


def _markers_fit(layout: tuple[_Layout, ...], data: bytes) -> bool:
    """Check the headers of sub-sections; those of arrays cannot have any."""
    todo = [(each, 0) for each in layout]
    while todo:
        each, base = todo.pop()
        at = base + each.offset
        if each.marker and data[at : at + len(each.marker)] != each.marker:
            return False
        if each.count == 1:
            todo.extend((member, at) for member in each.members)
    return True


def _find_end(devices: bytes, start: int, header: _Header) -> int:
    """Find a section's footer: one behind which something known begins."""
    footer = _footer(header)
    at = devices.find(footer, start)
    while at >= 0:
        after = at + len(footer)
        while after < len(devices) and devices[after] == _COMMAND:
            if after + 5 > len(devices):
                break
            after += 5 + struct.unpack_from(">H", devices, after + 3)[0]
        following = _header(devices, after)
        if after == len(devices) or (
            following is not None and following.name.isprintable()
        ):
            return at
        at = devices.find(footer, at + 1)
    raise _damaged(f"the end of {header.name} cannot be found", start)


def _certain(layout: tuple[_Layout, ...], data: bytes) -> tuple[_Layout, ...]:
    """Keep the fields before the first whose size may be a wrong one."""
    kept: list[_Layout] = []
    for each in layout:
        unequal = each.count > 1 and not _is_scalar(each.type, each.size)
        if unequal or each.end > len(data):
            break
        if not _markers_fit((each,), data):
            break
        kept.append(each)
    return tuple(kept)


def _run_state_place(device: Device) -> tuple[int, int]:
    """Return offset and length of the run state's text in its section.

    ``migration/global_state.c``: be32 size, then a buffer of 100 bytes, of
    which later versions use the first 32 for the text.
    """
    length = min(len(device.data) - 4, _RUN_STATE_BYTES)
    if length < 8:
        raise _damaged("globalstate is too short", device.offset)
    return 4, length


# ------------------------------------------------------------- description


def _object(pairs: list[tuple[str, Any]]) -> dict[Any, Any]:
    """Make a JSON object; repeated sets of keys are kept beside it, in order."""
    made: dict[Any, Any] = dict(pairs)
    if len(made) != len(pairs):
        sets: list[dict[str, Any]] = []
        for key, value in pairs:
            if key == "vmsd_name":
                sets.append({})
            if sets:
                sets[-1][key] = value
        made[_REPEATED] = sets
    return made


def _describe(description: bytes) -> _Described:
    """Turn the JSON into layouts, by name and instance of the device."""
    if not description:
        return {}
    if len(description) > _MAX_DESCRIPTION:
        raise errors.Damaged("device description: it is longer than any of QEMU's")
    try:
        document = json.loads(description, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise errors.Damaged(f"device description: no JSON ({error})") from error
    described: _Described = {}
    for device in _list(document, "devices"):
        name, instance = _get(device, "name", str), _get(device, "instance_id", int)
        layout, size = _structure(device, 0)
        kind = device.get("vmsd_name", "")
        key = (name, instance & 0xFFFFFFFF)
        described[key] = (kind if isinstance(kind, str) else "", layout, size)
    return described


def _get(where: object, key: str, kind: type[T]) -> T:
    value = where.get(key) if isinstance(where, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise errors.Damaged(f"device description: {key!r} is missing or wrong")
    return value


def _list(where: object, key: str) -> list[Any]:
    return _get(where, key, list)


def _count(where: dict[Any, Any], key: str) -> int:
    value = _get(where, key, int)
    # Nothing in a stream is longer than that, and sums stay small numbers.
    if not 0 <= value < 1 << 32:
        raise errors.Damaged(f"device description: {key!r} is out of range")
    return value


def _structure(
    described: dict[Any, Any], depth: int
) -> tuple[tuple[_Layout, ...], int]:
    """Lay out fields, then sub-sections; returns them and their size."""
    if depth > _MAX_DEPTH:
        raise errors.Damaged("device description: structures are nested too deep")
    made: list[_Layout] = []
    at = 0
    for each in _list(described, "fields"):
        layout = _field(each, at, depth)
        made.append(layout)
        at = layout.end
    made = _numbered(made)
    if "subsections" in described:
        for sub in _list(described, "subsections"):
            name = _get(sub, "vmsd_name", str)
            encoded = name.encode("utf-8", "surrogatepass")
            if len(encoded) > 255:
                raise errors.Damaged("device description: a name is too long")
            marker = struct.pack(">BB", _SUBSECTION, len(encoded)) + encoded
            marker += struct.pack(">I", _count(sub, "version"))
            members, size = _structure(sub, depth + 1)
            members = tuple(
                replace(member, offset=member.offset + len(marker))
                for member in members
            )
            layout = _Layout(
                name=name,
                type="subsection",
                offset=at,
                size=len(marker) + size,
                members=members,
                marker=marker,
            )
            made.append(layout)
            at = layout.end
    return tuple(made), at


def _numbered(made: list[_Layout]) -> list[_Layout]:
    """Number the elements of arrays that are described in several pieces.

    QEMU makes names unique, so neighbours of one name are one array: its
    elements one by one, or (9.2 on) runs of NULL and others. Of a piece of one
    element, as the last always is from 9.2 on, the index is left out.
    """
    numbered: list[_Layout] = []
    for _, group in itertools.groupby(made, key=lambda layout: layout.name):
        pieces = list(group)
        if len(pieces) == 1:
            numbered += pieces
            continue
        index = 0
        for piece in pieces:
            numbered.append(replace(piece, first_index=index))
            index += piece.count
    return numbered


def _field(each: object, at: int, depth: int) -> _Layout:
    """Lay out one field at ``at``."""
    name = _get(each, "name", str)
    kind = _get(each, "type", str)
    assert isinstance(each, dict)  # noqa: S101 - _get() has seen to it
    size = _count(each, "size")
    count, index = 1, None
    if "array_len" in each:
        count, index = _count(each, "array_len"), 0
    elif "index" in each:
        index = _count(each, "index")
    members: tuple[_Layout, ...] = ()
    nested = each.get("struct", each if "fields" in each else None)
    if isinstance(nested, dict) and "fields" in nested:
        members = _members(nested, kind, size, depth + 1)
    if count > 1:
        # So that each step through an array takes bytes.
        members = tuple(_without_empty(members))
    return _Layout(
        name=name,
        type=kind,
        offset=at,
        size=size,
        count=count,
        first_index=index,
        members=members,
    )


def _without_empty(members: tuple[_Layout, ...]) -> Iterator[_Layout]:
    for member in members:
        if member.size * member.count:
            yield replace(member, members=tuple(_without_empty(member.members)))


def _members(
    nested: dict[Any, Any], kind: str, size: int, depth: int
) -> tuple[_Layout, ...]:
    """Lay out what a structure or a list has inside; () if that does not fit.

    ``migration/vmstate-types.c``: a list (qtailq, qlist) is 1 and an element,
    again and again, then 0; a gtree has be32 nodes before, and before each value
    a be64 key or a structure that is the key.
    """
    sets = nested.get(_REPEATED)
    if kind not in ("qtailq", "qlist", "gtree"):
        members, total = _structure(nested, depth)
        return members if total == size else ()
    elements = [
        _structure(each, depth)
        for each in (sets if isinstance(sets, list) else [nested])
        if "fields" in each
    ]
    gtree = kind == "gtree"
    for key_bytes, a_group in ((0, 1), (8, 1), (0, 2)):
        if (key_bytes or a_group == 2) != gtree:
            continue
        at = 4 if gtree else 0
        made: list[_Layout] = []
        for index, (members, total) in enumerate(elements):
            if index % a_group == 0:
                at += 1 + key_bytes
            made.append(
                _Layout(
                    name="",
                    type="struct",
                    offset=at,
                    size=total,
                    first_index=index,
                    members=members,
                )
            )
            at += total
        if at + 1 == size:
            return tuple(made)
    return ()


# ------------------------------------------------------------------ access


def _is_scalar(kind: str, size: int) -> bool:
    match = _INTEGER.fullmatch(kind)
    if match:
        return size == int(match[2]) // 8
    if kind in _FLOATS:
        return size in (4, 8)
    return (kind == "timer" and size == 8) or (kind == "bool" and size == 1)


def _value(kind: str, data: bytes) -> Value:
    if kind == "nullptr":
        return None
    if not _is_scalar(kind, len(data)):
        return data
    if kind == "bool":
        return bool(data[0])
    signed = kind == "timer" or kind.startswith("int")
    # vmstate_info_uint64_equal calls itself "int64 equal".
    return int.from_bytes(data, "big", signed=signed and kind != "int64 equal")


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path + name


def _leaves(
    layout: tuple[_Layout, ...], path: str, base: int
) -> Iterator[tuple[str, _Layout, int]]:
    """Yield all fields without members: path, layout, offset in the section."""
    for each in layout:
        name = _joined(path, each.name)
        for element in range(each.count):
            at = base + each.offset + element * each.size
            full = name
            if each.first_index is not None:
                full = f"{name}[{each.first_index + element}]"
            if each.members:
                yield from _leaves(each.members, full, at)
            elif each.size:
                yield full, each, at
            else:
                break


_INDEX = re.compile(r"\[([0-9]{1,10})\]")


def _find(
    layout: tuple[_Layout, ...], path: str, base: int
) -> tuple[_Layout, int, int] | None:
    """Find a path; returns layout, offset in the section, number of elements."""
    for each in layout:
        if not path.startswith(each.name):
            continue
        rest = path[len(each.name) :]
        at, count = base + each.offset, each.count
        if each.first_index is not None:
            match = _INDEX.match(rest)
            if match:
                element = int(match[1]) - each.first_index
                if not 0 <= element < each.count:
                    continue
                at += element * each.size
                count = 1
                rest = rest[match.end() :]
            elif each.count == 1 and each.first_index:
                continue
        if not rest:
            return each, at, count
        if count == 1 and each.members:
            found = _find(each.members, rest.removeprefix("."), at)
            if found is not None:
                return found
    return None
