"""What the commands print: on the main process alone, tables where a person reads them."""

import errno
import os
import sys

from rich.console import Console
from rich.text import Text

from hf_coverage.report.table import Table, rich_table

__all__ = ["is_main_process", "print_error", "print_interrupted", "print_table", "say"]

_WIDE = 200  # columns for output that goes to a file, where nothing limits a line

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


def say(*texts: str) -> None:
    """Print lines of plain text."""
    if is_main_process():
        for text in texts:
            Console().print(Text(text), soft_wrap=True)


def print_table(table: Table, *, transpose: bool = False) -> None:
    """Print a table, see `rich_table`."""
    if is_main_process():
        Console(width=None if sys.stdout.isatty() else _WIDE).print(rich_table(table, transpose=transpose))


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
