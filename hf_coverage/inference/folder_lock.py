"""A folder that one process writes to at a time, and whoever comes second is told who that is."""

import errno
import json
import logging
import os
import shlex
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from hf_coverage.inference.files import made_folder

__all__ = ["LOCK_FILES", "folder_lock"]

_LOCK, _OWNER = LOCK_FILES = (".hf-coverage.lock", ".hf-coverage.lock.json")
"""What a lock leaves in its folder while it is held, or when its process was killed: no content of the folder."""

_PATIENCE = 0.2  # seconds: who is about to leave is not worth an error
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)

logger = logging.getLogger(__name__)


_blocks: Counter[Path] = Counter()
_locks: dict[Path, ExitStack] = {}
"""Of the folders that this process holds: for how many blocks, and what lets go of them."""


@contextmanager
def folder_lock(folder: str | os.PathLike[str], purpose: str | None = None) -> Iterator[None]:
    """Keep other processes out of a folder for as long as a block runs.

    The operating system holds the lock, and lets go of it when the process ends, however it ends. A folder that is not
    there is made, and taken away again if the block leaves nothing in it. The process itself may hold a folder several
    times over, as a command does and the functions that it calls; it lets go when the last block ends.

    Args:
        folder: The folder; one that may not be written to needs no lock.
        purpose: What this process does there, for those that are kept out; None: its command line.

    Raises:
        BlockingIOError: If another process holds it, saying which.
        NotADirectoryError: If it is a file.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "scores"
        >>> with folder_lock(folder, "scoring"):
        ...     folder.is_dir()
        True
        >>> folder.exists()
        False
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} must be a folder to write to, but is a file: choose another one.")
    if folder.is_dir() and not os.access(folder, os.W_OK):
        yield
        return
    if not _blocks[folder]:
        lock = ExitStack()
        lock.enter_context(_alone(folder, purpose or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])))
        _locks[folder] = lock
    _blocks[folder] += 1
    try:
        yield
    finally:
        _blocks[folder] -= 1
        if not _blocks[folder]:
            _locks.pop(folder).close()


@contextmanager
def _alone(folder: Path, purpose: str) -> Iterator[None]:
    """The lock itself, for the first of this process's blocks."""
    lock = FileLock(folder / _LOCK)
    with ExitStack() as made:
        try:
            _acquire(lock, folder, made)
            if lock.is_locked:
                owner = {"host": socket.gethostname(), "pid": os.getpid(), "command": purpose}
                owner["since"] = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
                (folder / _OWNER).write_text(json.dumps(owner), encoding="utf-8")
            yield
        finally:
            if lock.is_locked:
                # While it is held: once it is not, the files may be another process's.
                for name in (_OWNER, _LOCK):
                    with suppress(OSError):
                        (folder / name).unlink()
                lock.release()


def _acquire(lock: FileLock, folder: Path, made: ExitStack) -> None:
    """Take a lock in a folder, which is made for it if it is not there."""
    while True:
        made.enter_context(made_folder(folder))
        try:
            lock.acquire(timeout=_PATIENCE)
        except Timeout:
            raise BlockingIOError(_occupied(folder)) from None
        except FileNotFoundError:  # who held it before took the folder away
            continue
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            (folder / _LOCK).unlink(missing_ok=True)
            logger.warning("The file system of %s has no locks: see to it that nothing else writes there.", folder)
        return


def _occupied(folder: Path) -> str:
    try:
        owner = json.loads((folder / _OWNER).read_text(encoding="utf-8"))
        who = "process {pid} on {host}, since {since}, for `{command}`".format(**owner)
    except (OSError, ValueError, KeyError, TypeError):  # it has only begun to, or is about to leave
        who = "another process"
    return f"{folder} is being written to by {who}: wait until that is done, or choose another folder."
