# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line: finds the verb, runs it, turns errors into exit codes.

A verb is a module of this package (``host-validate`` is ``host_validate``) with

    HELP: str                               one line, for the list of verbs
    def add_arguments(parser) -> None
    def run(args, out: Output) -> int       the exit code

and may have ``DESCRIPTION: str`` (more text for its ``--help``) and
``TAKES_COMMAND = True``: then what follows ``--`` is ``args.command``, a list of
strings, or None where there is no ``--``.

Only the verb that runs is imported, so that one verb costs no other's start-up.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import io
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, cast

from qemu_pagesaver import errors
from qemu_pagesaver.cli.output import Output, ResultNotTaken

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

VERBS = (
    "save",
    "restore",
    "recover",
    "status",
    "finish",
    "info",
    "check",
    "compare",
    "map",
    "convert",
    "host-validate",
)
PROGRAM = "qemu-pagesaver"
_SIGNALLED = 128


class _Verb(Protocol):
    HELP: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Output], int]


class _Parser(argparse.ArgumentParser):
    """Raises UsageError where argparse would print and exit."""

    def error(self, message: str) -> NoReturn:
        raise errors.UsageError(
            f"{self.prog}: {message}", hint=f"See `{self.prog} --help`."
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; never raises."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name that the terminal's character set lacks is no reason to fail.
            stream.reconfigure(errors="backslashreplace")
    terminated, restore_signals = _handle_sigterm()
    out = Output(json=_has_flag(arguments, "--json"))
    try:
        code = _run(arguments, out)
    except KeyboardInterrupt:
        code = out.failure(
            errors.Interrupted("interrupted", hint="Everything is as it was found.")
        )
    except ResultNotTaken:
        code = _SIGNALLED + signal.SIGPIPE
    except errors.PagesaverError as error:
        code = out.failure(error)
    except MemoryError:
        code = out.failure(errors.OutOfMemory("out of memory"))
    except OSError as error:
        code = out.failure(errors.from_os_error(error, "failed"))
    except Exception as error:  # a user never sees a traceback
        if out.verbosity > 1:
            traceback.print_exc()
        code = out.failure(_unexpected(error))
    finally:
        out.close()
        restore_signals()
    if terminated and code == errors.Interrupted.exit_code:
        return _SIGNALLED + signal.SIGTERM
    return code


def _run(arguments: list[str], out: Output) -> int:
    name, verb = _find_verb(arguments)
    command: list[str] | None = None
    if getattr(verb, "TAKES_COMMAND", False) and "--" in arguments:
        at = arguments.index("--")
        command = arguments[at + 1 :]
        arguments = arguments[:at]
    parser = _build_parser(name, verb)
    try:
        args = parser.parse_args(arguments)
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    if verb is None:
        raise errors.UsageError(
            "no verb is given", hint=f"One of: {', '.join(VERBS)}; see --help."
        )
    args.command = command
    out.configure(
        verbosity=args.verbose - args.quiet,
        progress=args.progress,
        status_fd=args.status_fd,
    )
    return verb.run(args, out)


def _find_verb(arguments: Sequence[str]) -> tuple[str, _Verb | None]:
    """Return the verb among the arguments; only options can precede it."""
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--status-fd":
            skip = True
        elif not argument.startswith("-"):
            if argument not in VERBS:
                raise errors.UsageError(
                    f"{argument!r} is no verb", hint=f"One of: {', '.join(VERBS)}."
                )
            return argument, _import(argument)
    return "", None


def _import(name: str) -> _Verb:
    module = importlib.import_module(f"qemu_pagesaver.cli.{name.replace('-', '_')}")
    return cast("_Verb", module)


def _build_parser(name: str, verb: _Verb | None) -> _Parser:
    """Build the parser; with all verbs in it where none is named."""
    parser = _Parser(
        prog=PROGRAM,
        description="Save QEMU guests page by page, and run them again before "
        "their memory is read.",
        epilog="Exit codes: 0 ok; 1 the answer is no; 2 used wrongly; from 10 "
        "failures by class; 130 interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_version())
    _add_common(parser, top=True)
    verbs = parser.add_subparsers(metavar="VERB", dest="verb", parser_class=_Parser)
    for each in (name,) if verb is not None else VERBS:
        module = verb if verb is not None else _import(each)
        sub = verbs.add_parser(
            each,
            help=module.HELP,
            description=getattr(module, "DESCRIPTION", module.HELP),
            allow_abbrev=False,
        )
        module.add_arguments(sub)
        _add_common(sub, top=False)
    return parser


class _Count(argparse.Action):
    """``-v``, before the verb, after it, or both."""

    def __init__(self, option_strings: list[str], dest: str, **more: object) -> None:
        super().__init__(option_strings, dest, nargs=0, **more)  # type: ignore[arg-type]

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002 - argparse's signature
        namespace: argparse.Namespace,
        values: object,  # noqa: ARG002
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        setattr(namespace, self.dest, (getattr(namespace, self.dest, None) or 0) + 1)


def _add_common(parser: argparse.ArgumentParser, *, top: bool) -> None:
    """Add what every verb has; defaults only at the top, where they are kept."""
    group = parser.add_argument_group("output")

    def default(value: object) -> object:
        return value if top else argparse.SUPPRESS

    group.add_argument(
        "--json",
        action="store_true",
        default=default(value=False),
        help="print the result as one JSON document",
    )
    group.add_argument(
        "-q",
        "--quiet",
        action=_Count,
        default=default(0),
        help="errors only on stderr",
    )
    group.add_argument(
        "-v",
        "--verbose",
        action=_Count,
        default=default(0),
        help="say more on stderr; twice: also tracebacks",
    )
    group.add_argument(
        "-p",
        "--progress",
        action="store_true",
        default=default(value=False),
        help="show progress where stderr is no terminal, too",
    )
    group.add_argument(
        "--status-fd",
        type=int,
        metavar="N",
        default=default(None),
        help="write events to this open descriptor, as JSON lines",
    )


def _version() -> str:
    try:
        return f"{PROGRAM} {importlib.metadata.version('qemu-pagesaver')}"
    except importlib.metadata.PackageNotFoundError:
        return f"{PROGRAM} (not installed)"


def _has_flag(arguments: Sequence[str], flag: str) -> bool:
    """Say whether a flag stands before any ``--``; needed before parsing."""
    for argument in arguments:
        if argument == "--":
            return False
        if argument == flag:
            return True
    return False


def _unexpected(error: Exception) -> errors.PagesaverError:
    text = " ".join(str(error).split()) or "no text"
    return errors.PagesaverError(
        f"internal error: {type(error).__name__}: {text}",
        hint="This is a bug; run it again with -vv and report what it prints.",
    )


def _handle_sigterm() -> tuple[list[int], Callable[[], None]]:
    """Let SIGTERM and SIGHUP clean up as Ctrl-C does.

    Returns a list that is not empty once one of them came, and what undoes it.
    """
    came: list[int] = []
    before: dict[int, Any] = {}

    def handler(number: int, _frame: object) -> None:
        came.append(number)
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background job
            signal.signal(signal.SIGINT, signal.default_int_handler)
        # asyncio turns SIGINT, and only that, into a cancellation.
        signal.raise_signal(signal.SIGINT)

    def restore() -> None:
        for number, old in before.items():
            signal.signal(number, old)

    try:
        for each in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(each) is signal.SIG_DFL:
                before[each] = signal.signal(each, handler)
    except ValueError:
        pass  # not the main thread: the caller has the signals
    return came, restore
