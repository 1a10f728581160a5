"""What somebody else needs to get the same numbers: the command, the versions, the state of the code."""

import shlex
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from hf_coverage import __version__

__all__ = ["git_hash", "provenance", "versions"]

_LIBRARIES = ("torch", "transformers", "datasets", "numpy")


def versions() -> dict[str, str]:
    """Versions of this package, of Python and of the libraries that numbers depend on, without importing them."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"hf_coverage": __version__, "python": python} | {name: metadata.version(name) for name in _LIBRARIES}


def git_hash() -> str | None:
    """The commit of the repository that the process runs in; None outside of one, or without git."""
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None


def provenance(command: str | None = None, **facts: object) -> dict[str, object]:
    """Everything that a result should say of its origin, ready for `write_html_report` and `write_model_card`.

    Args:
        command: The command that made it; None takes the running program's.
        facts: What only the caller knows, such as the seed or the corpus's fingerprint; None is left out.

    Returns:
        The command, the facts, the date, the versions and, inside a git repository, the commit.

    Example:
        >>> origin = provenance("hf-coverage profile scores/a", seed=0)
        >>> origin["command"], origin["seed"]
        ('hf-coverage profile scores/a', 0)
    """
    origin = {"command": command or running_command()} | facts
    origin |= {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "git commit": git_hash()}
    origin["versions"] = ", ".join(f"{name} {version}" for name, version in versions().items())
    return {name: value for name, value in origin.items() if value is not None}


def running_command() -> str:
    """The running program and its arguments as one would type them, without the path to the program."""
    program = Path(sys.argv[0])
    name = "hf-coverage" if program.name in ("hf-coverage", "__main__.py", "cli.py") else program.name
    return shlex.join([name, *sys.argv[1:]])
