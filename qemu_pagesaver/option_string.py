# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU's option strings (`a=b,c=d`, or JSON) as values; no I/O.

What is not changed is written back byte for byte. Sources: QEMU's
util/qemu-option.c and util/keyval.c (a comma in a value is doubled, the first
item may lack its key, a bare word is a flag, `no` before it turns it off).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class Item:
    """One property.

    Attributes:
        key: Dotted, where it lies in a structure.
        value: Text, or whatever JSON has.
        raw: Its text on the command line, if it had one.
        is_bare: It is written without its key, which is implied.
    """

    key: str
    value: Any
    raw: str | None = None
    is_bare: bool = False

    def __str__(self) -> str:
        """Return it as it stands on a command line that is not JSON."""
        if self.raw is not None:
            return self.raw
        value = escape(self.text())
        return value if self.is_bare and "=" not in value else f"{self.key}={value}"

    def text(self) -> str:
        """Return the value as QEMU's key=value syntax has it."""
        if isinstance(self.value, bool):
            return "on" if self.value else "off"
        return "" if self.value is None else str(self.value)


@dataclass(frozen=True, kw_only=True)
class OptionString:
    """The argument of one option: properties in order, keys dotted."""

    items: tuple[Item, ...]
    is_json: bool = False
    original: str | None = None

    @classmethod
    def parse(cls, text: str, *, implied: str = "") -> Self:
        """Parse an argument; ``implied`` is the key that the first item may lack.

        Raises:
            ValueError: The argument begins like JSON and is none, or a key has a
                comma: QEMU's own parsers do not agree on what that is.
        """
        if text.startswith("{"):
            items = tuple(_flatten(_load(text)))
            return cls(items=items, is_json=True, original=text)
        parts = _split(text)
        return cls(
            items=tuple(
                _parse_item(part, implied if first else "")
                for first, part in zip(
                    (True, *[False] * len(parts)), parts, strict=False
                )
            )
        )

    def __str__(self) -> str:
        """Return the text for the command line."""
        if self.original is not None:
            return self.original
        if self.is_json:
            return json.dumps(_unflatten(self.items))
        return ",".join(map(str, self.items))

    def _changed(self, items: tuple[Item, ...]) -> Self:
        if items == self.items:
            return self
        return replace(self, items=items, original=None)

    def get(self, key: str, default: str = "") -> str:
        """Return the value of a property as text; the last one counts."""
        for item in reversed(self.items):
            if item.key == key:
                return item.text()
        return default

    def has(self, key: str) -> bool:
        """Tell whether a property or a structure of that name is there."""
        return any(i.key == key or i.key.startswith(key + ".") for i in self.items)

    def is_on(self, key: str) -> bool:
        """Tell whether a boolean property is on."""
        return self.get(key) in ("on", "yes", "true", "y")

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yield keys and values as text."""
        for item in self.items:
            yield item.key, item.text()

    def with_(self, key: str, value: str | bool) -> Self:
        """Return a copy in which a property has a value (in its old place)."""
        items = [
            Item(key=key, value=value, is_bare=item.is_bare)
            if item.key == key
            else item
            for item in self.items
        ]
        if not any(item.key == key for item in items):
            items.append(Item(key=key, value=value))
        return self._changed(tuple(items))

    def without(self, *keys: str) -> Self:
        """Return a copy without these properties and structures."""
        return self._changed(
            tuple(
                item
                for item in self.items
                if not any(
                    item.key == key or item.key.startswith(key + ".") for key in keys
                )
            )
        )

    def replaced(self, key: str, old: str, new: str) -> Self:
        """Return a copy in which one value of a repeated property is another."""
        return self._changed(
            tuple(
                Item(key=key, value=new)
                if item.key == key and item.text() == old
                else item
                for item in self.items
            ),
        )

    def renamed(self, old: str, new: str) -> Self:
        """Return a copy in which a property has another key."""
        return self._changed(
            tuple(
                Item(key=new, value=item.value) if item.key == old else item
                for item in self.items
            ),
        )


def escape(text: str) -> str:
    """Return a value with its commas doubled."""
    return text.replace(",", ",,")


def _split(text: str) -> list[str]:
    """Split at single commas; the parts keep their doubled ones."""
    parts = [""]
    position = 0
    while position < len(text):
        comma = text.find(",", position)
        if comma < 0:
            comma = len(text)
        parts[-1] += text[position:comma]
        if text.startswith(",,", comma):
            parts[-1] += ",,"
            position = comma + 2
        elif comma < len(text):
            parts.append("")
            position = comma + 1
        else:
            position = comma
    return parts if parts[-1] or len(parts) == 1 else parts[:-1]


def _parse_item(raw: str, implied: str) -> Item:
    key, equals, value = raw.partition("=")
    if "," in key and not implied:
        raise ValueError(f"a comma in the key {key!r}")
    if equals and "," not in key:
        return Item(key=key, value=value.replace(",,", ","), raw=raw)
    if implied:
        return Item(key=implied, value=raw.replace(",,", ","), raw=raw, is_bare=True)
    if raw.startswith("no") and len(raw) > 2:
        return Item(key=raw[2:], value=False, raw=raw)
    return Item(key=raw, value=True, raw=raw)


def _load(text: str) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(text)
    except RecursionError:
        raise ValueError("JSON nested too deep") from None
    return document


def _flatten(document: object, prefix: str = "") -> Iterator[Item]:
    """Yield the leaves of a document; json.loads has bounded its depth."""
    if isinstance(document, dict | list) and document:
        pairs = document.items() if isinstance(document, dict) else enumerate(document)
        for key, value in pairs:
            if "." in str(key):
                raise ValueError(f"a dot in the key {key!r}")
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield Item(key=prefix, value=document)


def _unflatten(items: tuple[Item, ...]) -> object:
    root: dict[str, Any] = {}
    for item in items:
        *path, last = item.key.split(".")
        place = root
        for name in path:
            place = place.setdefault(name, {})
        place[last] = item.value
    return _lists(root)


def _lists(node: object) -> object:
    """Turn objects whose keys are 0, 1, 2, .. back into lists."""
    if not isinstance(node, dict):
        return node
    values = [_lists(value) for value in node.values()]
    if node and list(node) == [str(number) for number in range(len(node))]:
        return values
    return dict(zip(node, values, strict=True))
