# SPDX-License-Identifier: LGPL-2.1-or-later
"""``host-validate``: whether this host can do it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qemu_pagesaver.cli.output import Output, printable

if TYPE_CHECKING:
    import argparse

    from qemu_pagesaver.host_validate import Finding

HELP = "check whether this host can save and restore on demand"
DESCRIPTION = (
    "Check userfaultfd, KVM, huge pages, QEMU binaries, places and limits, as the "
    "user who runs this. Exit code 1: something needed is lacking."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument(
        "--qemu",
        action="append",
        default=[],
        metavar="BINARY",
        help="a QEMU to look at; may be given again (default: those in PATH)",
    )
    parser.add_argument(
        "--spool-dir", metavar="DIR", help="where saves will spool pages"
    )


def run(args: argparse.Namespace, out: Output) -> int:
    """Look, print, answer."""
    from qemu_pagesaver.host_validate import host_validate  # noqa: PLC0415

    validation = host_validate(qemu=args.qemu, spool_dir=args.spool_dir)
    document = {
        "ok": validation.ok,
        "checks": [
            {
                "name": finding.name,
                "state": finding.state,
                "text": finding.text,
                "remedy": finding.remedy,
            }
            for finding in validation.findings
        ],
    }
    lines = [line for finding in validation.findings for line in _lines(finding)]
    out.result(document, "\n".join(lines))
    return 0 if validation.ok else 1


def _lines(finding: Finding) -> list[str]:
    lines = [f"{finding.state:<8} {finding.name}: {printable(finding.text)}"]
    if finding.remedy:
        lines.append(f"{'':<8} -> {printable(finding.remedy)}")
    return lines
