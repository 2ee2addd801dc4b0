# SPDX-License-Identifier: LGPL-2.1-or-later
"""One restore in a process of its own, ready before the clock starts.

Says `ready` when everything is imported, reads one line from stdin (the options,
JSON), restores, and prints the result's document.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from qemu_pagesaver.report import Silent
from qemu_pagesaver.restore import restore_async


class Printer(Silent):
    """Tells the parent what happens, a JSON line an event."""

    def event(self, name: str, **fields: object) -> None:
        print(json.dumps({"event": name, **fields}), flush=True)


async def main() -> None:
    print(json.dumps({"event": "ready"}), flush=True)
    options: dict[str, Any] = json.loads(sys.stdin.readline())
    file = options.pop("file")
    result = await restore_async(file, report=Printer(), **options)
    print(json.dumps({"event": "result", **result.document()}), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
