# SPDX-License-Identifier: LGPL-2.1-or-later
"""A workload of the locality benchmark: Python imports much and computes.

`python3 importer.py NAME MB`: as walker.c, NAME.in and NAME.out are FIFOs. The
process holds MB of records and has imported nothing when it says that it is
ready. Asked, it imports what the page cache has of the standard library and
computes over its records.
"""

import os
import sys
import time

MODULES = (
    "argparse asyncio bz2 calendar concurrent.futures configparser csv ctypes "
    "decimal difflib doctest email.message email.mime.multipart email.parser fractions "
    "ftplib gzip hashlib html.parser http.client http.cookiejar http.server imaplib "
    "importlib.metadata inspect ipaddress json logging.config lzma mailbox "
    "multiprocessing.pool optparse pathlib pdb pickle plistlib pprint profile pydoc "
    "random sched shelve smtplib socketserver sqlite3 ssl statistics string subprocess "
    "tarfile tempfile textwrap timeit tracemalloc typing unittest.mock urllib.request "
    "uuid wsgiref.simple_server xml.dom.minidom xml.etree.ElementTree xml.sax "
    "xmlrpc.server zipfile"
)
WORDS = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron")
RECORD_BYTES = 1000  # about, with all that Python needs for it


def make_records(count: int) -> list[list[str]]:
    """Make records that differ from each other, by formula."""
    records = []
    state = 1
    for i in range(count):
        words = [str(i)]
        for _ in range(12):
            state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
            words.append(WORDS[state >> 61] + str(state >> 44))
        records.append(words)
    return records


def compute(records: list[list[str]]) -> int:
    """Read all words; what comes out depends on every one."""
    from zlib import crc32

    return sum(crc32(" ".join(words).encode()) for words in records)


def own_pages() -> int:
    """Return the resident pages that belong to no file."""
    with open("/proc/self/statm") as file:  # noqa: PTH123
        _, resident, shared, *_ = file.read().split()
    return int(resident) - int(shared)


def main() -> None:
    """Prepare, then answer for ever."""
    name, megabytes = sys.argv[1], int(sys.argv[2])
    records = make_records(megabytes * (1 << 20) // RECORD_BYTES)
    right = compute(records)
    answer = f"ready {os.getpid()}"
    while True:
        # Not by pathlib, which is one of the modules to be imported.
        with open(f"{name}.out", "w") as out:  # noqa: PTH123
            out.write(answer + "\n")
        with open(f"{name}.in") as line:  # noqa: PTH123
            line.readline()
        had = own_pages()
        start = time.monotonic_ns()
        for module in MODULES.split():
            __import__(module)
        imported = time.monotonic_ns()
        wrong = int(compute(records) != right)
        end = time.monotonic_ns()
        answer = (
            f"modules={len(sys.modules)} wrong={wrong} "
            f"import-ns={imported - start} ns={end - start} new={own_pages() - had}"
        )


if __name__ == "__main__":
    main()
