"""A run's checkpoints while they are written, whoever writes them: which are whole, and which were not seen before."""

import re
from collections.abc import Collection
from pathlib import Path

__all__ = ["RunFolder", "step_of"]

_LOADED_FROM = ("config.json", "adapter_config.json")


def step_of(name: str) -> int | None:
    """The step in a checkpoint's name, its last number; None for what has none.

    Example:
        >>> step_of("checkpoint-500"), step_of("epoch2_step30"), step_of("best")
        (500, 30, None)
    """
    numbers = re.findall(r"\d+", name)
    return int(numbers[-1]) if numbers else None


class RunFolder:
    """A folder in which a run writes checkpoints, looked at again and again.

    A checkpoint is a folder with a step in its name and a configuration in it. It may be half-written: it is given out
    when its files are what they were at the look before, and if it could not be loaded all the same, not again before
    they have changed. Links are left out, for what they lead to is there itself.

    Args:
        folder: The run's; it need not be there yet.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> (folder / "step-10").mkdir()
        >>> _ = (folder / "step-10" / "config.json").write_text("{}")
        >>> run = RunFolder(folder)
        >>> run.settled(), [path.name for path in run.settled()], run.settled(known=["step-10"])
        ([], ['step-10'], [])
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._before: dict[Path, dict[str, list[int]]] = {}
        self._refused: dict[Path, dict[str, list[int]]] = {}

    def settled(self, known: Collection[str] = ()) -> list[Path]:
        """Look again: the checkpoints, by step, that are new and have not changed since the last look."""
        from hf_coverage.select.checkpoints import checkpoint_signature

        now = {}
        for path in self._checkpoints():
            try:
                now[path] = checkpoint_signature(path)
            except FileNotFoundError:  # it is being written, or taken away
                continue
        ready = [path for path, files in now.items() if path.name not in known and self._before.get(path) == files]
        self._before = now
        return sorted((path for path in ready if now[path] != self._refused.get(path)), key=_by_step)

    def refuse(self, path: Path) -> None:
        """Do not give out a checkpoint again before its files have changed."""
        self._refused[path] = self._before.get(path, {})

    def _checkpoints(self) -> list[Path]:
        found = list(self.folder.iterdir()) if self.folder.is_dir() else []
        return [
            path
            for path in found
            if step_of(path.name) is not None
            and not path.is_symlink()
            and any((path / name).is_file() for name in _LOADED_FROM)
        ]


def _by_step(path: Path) -> tuple[int, str]:
    return step_of(path.name) or 0, path.name
