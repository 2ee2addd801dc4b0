# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the source of a postcopy migration says, and what it is answered.

No I/O: bytes are built from a snapshot, and bytes are parsed. Sources: QEMU's
``migration/savevm.c`` (commands, configuration), ``migration/ram.c``
(``parse_ramblock``, ``ramblock_recv_bitmap_send``), ``migration/migration.c``
(return path), ``docs/devel/migration/postcopy.rst``.

The order is::

    opening()                     PONG of PING_READY
    package()                     the guest runs; the pager has the socket

and in recovery::

    recv_bitmap() for each block  a bitmap for each
    resume()                      RESUME_ACK; the pager has the socket
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from qemu_pagesaver import errors

if TYPE_CHECKING:
    from qemu_pagesaver.native import StreamInfo

TARGET_PAGE_SIZE = 4096
# MAX_VM_CMD_PACKAGED_SIZE of savevm.c, 7.2 and 10.0 (16 MiB before 2.11).
PACKAGE_MAX = (1 << 32) - 1

PING_OPEN = 1
PING_READY = 2

_MAGIC = b"QEVM"
_SECTION_START = b"\x01"
_COMMAND = b"\x08"
_FOOTER = b"\x7e"
_RAM_NAME = b"ram"
_RAM_MEM_SIZE = 0x04
_RAM_EOS = 0x10
_BITMAP_END = 0x0123456789ABCDEF
_LOADED = 3
_RESUME_ACK = 1
_DISCARD_VERSION = 0


class Command(IntEnum):
    """Commands of the stream (enum qemu_vm_cmd of savevm.c)."""

    OPEN_RETURN_PATH = 1
    PING = 2
    POSTCOPY_ADVISE = 3
    POSTCOPY_LISTEN = 4
    POSTCOPY_RUN = 5
    POSTCOPY_RAM_DISCARD = 6
    PACKAGED = 7
    POSTCOPY_RESUME = 9
    RECV_BITMAP = 10


class Reply(IntEnum):
    """Messages of the return path (enum mig_rp_message_type)."""

    SHUT = 1
    PONG = 2
    REQ_PAGES_ID = 3
    REQ_PAGES = 4
    RECV_BITMAP = 5
    RESUME_ACK = 6
    SWITCHOVER_ACK = 7


# Length of the data of each message: at least, at most.
_REPLY_LENGTHS = {
    Reply.SHUT: (4, 4),
    Reply.PONG: (4, 4),
    Reply.REQ_PAGES_ID: (8 + 4 + 1 + 1, 8 + 4 + 1 + 255),
    Reply.REQ_PAGES: (12, 12),
    Reply.RECV_BITMAP: (2, 256),
    Reply.RESUME_ACK: (4, 4),
    Reply.SWITCHOVER_ACK: (0, 0),
}


@dataclass(frozen=True, kw_only=True)
class Block:
    """A RAM block; ``page_size`` of the memory that backs it at the destination."""

    name: str
    length: int
    page_size: int


def _counted(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return bytes((len(raw),)) + raw


def command(number: Command, payload: bytes = b"") -> bytes:
    """Return a command of the stream."""
    return _COMMAND + struct.pack(">HH", number, len(payload)) + payload


def ping(value: int) -> bytes:
    """Return a PING, which is answered by a PONG with the same value."""
    return command(Command.PING, struct.pack(">I", value))


def without_capabilities(configuration: bytes) -> bytes:
    """Return a configuration section without the list of capabilities.

    The destination compares some of the source's capabilities with its own
    (``configuration_validate_capabilities``: x-ignore-shared, mapped-ram) and
    refuses names that it does not know. The list tells how the snapshot was
    made, not how it is delivered; without it all count as off, as ours are.
    """
    try:
        at = 5 + struct.unpack_from(">I", configuration, 1)[0]
        kept = [configuration[:at]]
        while at < len(configuration):
            end = _subsection_end(configuration, at)
            if _subsection_name(configuration, at) != b"configuration/capabilities":
                kept.append(configuration[at:end])
            at = end
    except (struct.error, LookupError):
        # Not known to us, so neither is where it ends: QEMU shall judge it.
        return configuration
    return b"".join(kept)


def _subsection_name(data: bytes, at: int) -> bytes:
    return data[at + 2 : at + 2 + data[at + 1]]


def _subsection_end(data: bytes, at: int) -> int:
    """Return where a sub-section of the configuration ends.

    Raises:
        LookupError: It is not known.
    """
    body = at + 2 + data[at + 1] + 4
    match _subsection_name(data, at):
        case b"configuration/target-page-bits":
            return body + 4
        case b"configuration/uuid":
            return body + 16
        case b"configuration/capabilities":
            (count,) = struct.unpack_from(">I", data, body)
            body += 4
            for _ in range(count):
                body += 1 + data[body]
            if body <= len(data):
                return body
    raise LookupError


def opening(
    *,
    stream: StreamInfo,
    configuration: bytes,
    blocks: Sequence[Block],
    page_sizes: Sequence[int],
    host_page_size: int,
) -> bytes:
    """Return everything up to the moment when QEMU may be told to listen.

    Args:
        stream: How the snapshot's stream was framed.
        configuration: Its CONFIGURATION, from the byte 0x07 on.
        blocks: All RAM blocks, in the order of the snapshot.
        page_sizes: Page sizes of all of the destination's migratable blocks.
        host_page_size: Of the destination's host.
    """
    parts = [_MAGIC, struct.pack(">I", stream.stream_version)]
    parts.append(without_capabilities(configuration))
    parts.append(command(Command.OPEN_RETURN_PATH))
    parts.append(ping(PING_OPEN))
    summary = 0
    for size in page_sizes:
        summary |= size
    parts.append(
        command(Command.POSTCOPY_ADVISE, struct.pack(">QQ", summary, TARGET_PAGE_SIZE))
    )
    parts.append(_block_list(stream, blocks, host_page_size))
    # QEMU populates ROM blocks when it starts, and without any discard it blocks
    # on itself for ever (10.0.2: postcopy_ram_prepare_discard runs after the state
    # was set). So every block is discarded whole.
    parts += [_discard(block) for block in blocks]
    parts.append(ping(PING_READY))
    return b"".join(parts)


def _block_list(
    stream: StreamInfo, blocks: Sequence[Block], host_page_size: int
) -> bytes:
    total = sum(block.length for block in blocks)
    default = max(host_page_size, TARGET_PAGE_SIZE)
    parts = [
        _SECTION_START,
        struct.pack(">I", stream.ram_section_id),
        bytes((len(_RAM_NAME),)) + _RAM_NAME,
        struct.pack(">II", stream.ram_instance, stream.ram_version),
        struct.pack(">Q", total | _RAM_MEM_SIZE),
    ]
    for block in blocks:
        parts.append(_counted(block.name) + struct.pack(">Q", block.length))
        if block.page_size != default:
            parts.append(struct.pack(">Q", block.page_size))
    parts.append(struct.pack(">Q", _RAM_EOS))
    if stream.footers:
        parts.append(_FOOTER + struct.pack(">I", stream.ram_section_id))
    return b"".join(parts)


def _discard(block: Block) -> bytes:
    payload = bytes((_DISCARD_VERSION,)) + _counted(block.name) + b"\0"
    payload += struct.pack(">QQ", 0, block.length)
    return command(Command.POSTCOPY_RAM_DISCARD, payload)


def package(devices: bytes) -> bytes:
    """Return the PACKAGED command: listen, device state, a ping, run.

    The PONG says that the devices are loaded. Their load may ask for pages, and
    QEMU reads no more of these after the end of RAM: the pager waits for it.

    Args:
        devices: Everything between the end of RAM and EOF, commands included.

    Raises:
        StreamUnsupported: The device state is larger than QEMU accepts.
    """
    listen = command(Command.POSTCOPY_LISTEN)
    run = command(Command.POSTCOPY_RUN)
    loaded = ping(_LOADED)
    length = len(listen) + len(devices) + len(loaded) + len(run)
    if length > PACKAGE_MAX:
        raise errors.StreamUnsupported(
            f"the device state has {len(devices)} bytes, more than QEMU takes at once",
            hint="`convert` the snapshot, and give the stream to QEMU's -incoming.",
        )
    header = command(Command.PACKAGED, struct.pack(">I", length))
    return b"".join((header, listen, devices, loaded, run))


def recv_bitmap(block: str) -> bytes:
    """Return the question which pages of a block QEMU has (recovery)."""
    return command(Command.RECV_BITMAP, _counted(block))


def resume() -> bytes:
    """Return the command that goes on after a recovery."""
    return command(Command.POSTCOPY_RESUME)


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message of the return path.

    Attributes:
        type: What it is.
        value: Of SHUT, PONG and RESUME_ACK, else 0.
        block: Name of the RAM block where the message has one, else "".
        bitmap: Of RECV_BITMAP: bit n (least significant first) is page n.
        raw: All its bytes.
    """

    type: Reply
    value: int
    block: str
    bitmap: bytes
    raw: bytes


class ReturnPath:
    """Parses the return path: bytes in any split, messages out.

    Args:
        blocks: Length in bytes of each RAM block, which bounds its bitmap.
    """

    def __init__(self, blocks: dict[str, int]) -> None:
        self._blocks = blocks
        self._buffer = bytearray()
        self._offset = 0

    @property
    def rest(self) -> bytes:
        """The bytes of a message that is not complete yet."""
        return bytes(self._buffer)

    def push(self, data: bytes) -> Iterator[Message]:
        """Yield the messages that ``data`` completes.

        A consumer that stops early finds the rest in :attr:`rest`.

        Raises:
            PeerNonsense: No QEMU says that.
        """
        self._buffer += data
        while (message := self._next()) is not None:
            del self._buffer[: len(message.raw)]
            self._offset += len(message.raw)
            yield message

    def _next(self) -> Message | None:
        if len(self._buffer) < 4:
            return None
        number, length = struct.unpack_from(">HH", self._buffer)
        try:
            kind = Reply(number)
        except ValueError:
            raise self._nonsense(f"message type {number}") from None
        least, most = _REPLY_LENGTHS[kind]
        if not least <= length <= most:
            raise self._nonsense(f"{kind.name} of {length} bytes")
        end = 4 + length
        if len(self._buffer) < end:
            return None
        body = bytes(self._buffer[4:end])
        value, block, bitmap = 0, "", b""
        if kind in (Reply.SHUT, Reply.PONG, Reply.RESUME_ACK):
            (value,) = struct.unpack(">I", body)
        elif kind is Reply.REQ_PAGES_ID:
            block = self._name(kind, body[12:])
        elif kind is Reply.RECV_BITMAP:
            block = self._name(kind, body)
            found = self._bitmap(block, end)
            if found is None:
                return None
            bitmap, end = found
        return Message(
            type=kind,
            value=value,
            block=block,
            bitmap=bitmap,
            raw=bytes(self._buffer[:end]),
        )

    def _name(self, kind: Reply, raw: bytes) -> str:
        if raw[0] != len(raw) - 1:
            raise self._nonsense(f"{kind.name} with a name of a wrong length")
        return raw[1:].decode("utf-8", "surrogateescape")

    def _bitmap(self, block: str, at: int) -> tuple[bytes, int] | None:
        """Return the bitmap that follows a RECV_BITMAP, and where it ends."""
        if block not in self._blocks:
            raise self._nonsense(f"a bitmap of the unknown RAM block {block!r}")
        if len(self._buffer) < at + 8:
            return None
        (size,) = struct.unpack_from(">Q", self._buffer, at)
        pages = -(-self._blocks[block] // TARGET_PAGE_SIZE)
        if size != (pages + 63) // 64 * 8:
            raise self._nonsense(
                f"a bitmap of {size} bytes for the {pages} pages of {block}"
            )
        end = at + 8 + size + 8
        if len(self._buffer) < end:
            return None
        (mark,) = struct.unpack_from(">Q", self._buffer, end - 8)
        if mark != _BITMAP_END:
            raise self._nonsense(f"a bitmap of {block} without its end mark")
        return bytes(self._buffer[at + 8 : end - 8]), end

    def _nonsense(self, what: str) -> errors.PeerNonsense:
        return errors.PeerNonsense(
            f"QEMU sent nonsense on the return path: {what} (at offset {self._offset})"
        )


def check_resume_ack(message: Message) -> None:
    """Refuse a RESUME_ACK that does not acknowledge.

    Raises:
        PeerNonsense: It does not.
    """
    if message.value != _RESUME_ACK:
        raise errors.PeerNonsense(f"QEMU answered resume with {message.value}")
