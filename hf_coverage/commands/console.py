"""What the commands print: on the main process alone, tables where a person reads them."""

import errno
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer
from typing import Any

from rich.console import Console
from rich.text import Text

from hf_coverage.report.table import Table, legend, rich_tables

__all__ = [
    "is_main_process",
    "print_error",
    "print_interrupted",
    "print_table",
    "printing",
    "say",
    "say_next",
    "waiting",
]

_WIDE = 200  # columns for output that goes to a file, where nothing limits a line
_PATIENCE = 2.0  # seconds without a word

_quiet = False
_kept: dict[str, Any] | None = None  # what `--json` prints when all is done

# What the library raises for input that cannot be used, in words of its own.
_EXPECTED = (ValueError, TypeError, OSError, ImportError, RuntimeError)
_ASK = (
    "A number may be far too large, or a file damaged; if neither is, this is a fault of hf-coverage, and "
    "`hf-coverage --debug`, before the same command, shows where."
)


# What to do about an error of the system, where it does not say so itself.
_REMEDIES = {
    errno.ENOSPC: "Make room, or choose another `--output-dir`",
    errno.EDQUOT: "Make room, or choose another `--output-dir`",
    errno.EACCES: "Change the permissions, or choose another place",
    errno.EPERM: "Change the permissions, or choose another place",
    errno.EROFS: "Choose another place",
}
_AGAIN = "and run the same command again: what was finished is kept."
_MEMORY = "Lower `--batch-tokens` or `--batch-size` where there is one, or take a smaller `--dtype`"


def is_main_process() -> bool:
    """Whether this process prints and writes; known from the launcher's environment, before torch is loaded."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def printing(*, quiet: bool, as_json: bool) -> Iterator[None]:
    """What is said and shown meanwhile is printed, or not at all, or in the end as one JSON object.

    The object has `text`, the lines, and `tables`, each with its `caption`, `columns` and `rows`; an interval is
    `[value, low, high]`, and a number that JSON does not have is null. Of a command that fails nothing is printed.
    """
    global _quiet, _kept
    _quiet, _kept = quiet or as_json, {"text": [], "tables": []} if as_json else None
    try:
        yield
        if _kept is not None and is_main_process():
            print(_json(_kept))
    finally:
        _quiet, _kept = False, None


def say(*texts: str) -> None:
    """Print lines of plain text."""
    if _kept is not None:
        _kept["text"] += texts
    if is_main_process() and not _quiet:
        for text in texts:
            Console().print(Text(text), soft_wrap=True)


def say_next(*words: object) -> None:
    """Print which command to run next: the words of a command line, quoted where a shell needs it."""
    say(f"Next: {shlex.join(str(word) for word in words)}")


def print_table(table: Table, *, transpose: bool = False) -> None:
    """Print a table, see `rich_tables`, and below it what it shows and what its symbols mean."""
    if _kept is not None:
        columns = [column.title for column in table.headers]
        _kept["tables"].append({"caption": table.caption, "columns": columns, "rows": table.rows})
    if not is_main_process() or _quiet:
        return
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDE)
    for part in rich_tables(table, width=console.width, transpose=transpose):
        console.print(part)
    below = " ".join(text for text in (table.caption, legend(table)) if text)
    if below:
        console.print(Text(below, style="italic"))


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say on the standard error what takes so long, where it takes more than two seconds."""
    timer = Timer(_PATIENCE, lambda: Console(stderr=True).print(Text(f"{what} ..."), soft_wrap=True))
    timer.daemon = True
    if is_main_process() and not _quiet:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _json(facts: dict[str, Any]) -> str:
    from hf_coverage.inference.files import strict_json

    return strict_json(facts).rstrip()


def print_error(error: BaseException) -> None:
    """Print an error on one line of the standard error."""
    where = "" if is_main_process() else f" (process {os.environ['RANK']})"
    message = " ".join(str(error).split()) or type(error).__name__
    remedy = _REMEDIES.get(error.errno or 0) if isinstance(error, OSError) else None
    if _memory_is_short(error):
        message = f"out of memory ({message})" if "out of memory" not in message.lower() else message
        remedy = _MEMORY
    if remedy is not None:
        message = f"{message.removesuffix('.')}. {remedy}, {_AGAIN}"
    elif not isinstance(error, _EXPECTED):
        message = f"{type(error).__name__}: {message}. {_ASK}"
    line = Text.assemble(("Error", "bold red"), where, ": ", message)
    Console(stderr=True).print(line, soft_wrap=True)


def _memory_is_short(error: BaseException) -> bool:
    if not isinstance(error, (MemoryError, RuntimeError)):
        return False  # without torch, which takes seconds to load
    from hf_coverage.inference.forward import is_out_of_memory

    return is_out_of_memory(error)


def print_interrupted() -> None:
    """Say how to go on with a command after Ctrl-C."""
    if is_main_process():
        text = "Interrupted. Run the same command again to go on: what was finished is kept."
        Console(stderr=True).print(text, soft_wrap=True)
