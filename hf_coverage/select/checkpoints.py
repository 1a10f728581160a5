"""Checkpoint folders: telling them apart, knowing them again, and leaving the winner where tools find it."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from hf_coverage.inference.evaluation_callback import CoverageWarning
from hf_coverage.inference.files import write_atomically
from hf_coverage.inference.loading import hub_parts, some
from hf_coverage.select.choose import Choice
from hf_coverage.select.result import TournamentResult

__all__ = [
    "check_arguments",
    "checkpoint_folder",
    "checkpoint_signature",
    "delete_old_checkpoints",
    "distinct_names",
    "link_checkpoint",
    "load_weights",
    "write_best_checkpoint",
]

_TRAINING_STATE = (
    "optimizer*",
    "scheduler*",
    "rng_state*",
    "trainer_state*",
    "training_args*",
    "scaler*",
    "global_step*",
)


def distinct_names(paths: Sequence[str | os.PathLike[str]], *, parts: int = 1) -> list[str]:
    """Name paths by as few of their last parts as tell them all apart.

    Args:
        paths: Folders, each another one.
        parts: How many parts to use at least.

    Returns:
        One name each, parts joined by `/`.

    Raises:
        ValueError: If a folder is given twice.

    Example:
        >>> distinct_names(["runs/a/checkpoint-100", "runs/b/checkpoint-100"])
        ['a/checkpoint-100', 'b/checkpoint-100']
    """
    split = [_named_parts(os.fspath(path)) for path in paths]
    twice = next((path for path, own in zip(paths, split) if split.count(own) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice} is given twice: give each candidate once.")
    while True:
        names = ["/".join(own[-parts:]) for own in split]
        if len(set(names)) == len(names):
            return names
        parts += 1


def _named_parts(path: str) -> tuple[str, ...]:
    """What a path is called by: its parts, a revision of the Hub being the last of them."""
    place, revision = hub_parts(path.rstrip("/"))
    parts = Path(path if revision is None else place).absolute().parts
    return parts if revision is None else (*parts, revision.replace("/", "-"))


def checkpoint_signature(folder: str | os.PathLike[str]) -> dict[str, list[int]]:
    """Name, size and time of every file that a model is loaded from: equal as long as nobody touched the checkpoint.

    The state of the training, which `load` does not read, is left out. A name of the Hub has no files here, and so no
    signature.
    """
    path = Path(folder)
    files = sorted(file for file in path.glob("*") if file.is_file()) if path.is_dir() else []
    return {
        file.name: [file.stat().st_size, file.stat().st_mtime_ns]
        for file in files
        if not any(file.match(pattern) for pattern in _TRAINING_STATE)
    }


def write_best_checkpoint(
    path: str | os.PathLike[str], result: TournamentResult | Choice, checkpoints: Mapping[str, str | os.PathLike[str]]
) -> Path:
    """Write the winner among checkpoints as JSON, in the words of `trainer_state.json`.

    Args:
        path: The file, by custom `best_checkpoint.json`.
        result: The tournament, or the choice.
        checkpoints: The folder, or Hub id, of each candidate that can be loaded; the best of these is written.

    Returns:
        The file's path.

    Raises:
        ValueError: If no candidate has a checkpoint.
    """
    best = next((name for name in result.ranking if name in checkpoints), None)
    if best is None:
        raise ValueError(f"`checkpoints` must hold one of the candidates {list(result.names)}, but has none of them.")
    found = {name: str(checkpoints.get(name, name)) for name in result.names}
    sentence = result.sentence
    if best != result.winner:
        sentence += (
            f" {result.winner} has no checkpoint to load; of the {len(checkpoints)} that have one, {best} is the best."
        )
    record: dict[str, Any] = {
        "best_model_checkpoint": found[best],
        "best_metric": result.scores[best],
        "metric": result.metric_name,
        "greater_is_better": False,
        "tied_with": [found[name] for name in result.ties if name != best and best in result.ties],
        "cross_entropy_checkpoint": found.get(result.cross_entropy_choice or ""),
        "sentence": sentence,
        "scores": {found[name]: result.scores[name] for name in result.ranking},
    }
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return target


def link_checkpoint(link: str | os.PathLike[str], checkpoint: str | os.PathLike[str]) -> Path:
    """Make `link` a symbolic link to a checkpoint, in place of the link that was there.

    Raises:
        FileExistsError: If there is something other than a link.
        FileNotFoundError: If the checkpoint is no folder.
    """
    target = Path(link)
    if not Path(checkpoint).is_dir():
        raise FileNotFoundError(f"a link needs a folder to point to, but {checkpoint} is none.")
    if target.exists() and not target.is_symlink():
        raise FileExistsError(f"{target} exists and is no symbolic link: choose another `link`.")
    target.parent.mkdir(parents=True, exist_ok=True)
    # A link is put in place whole: a reader finds the old winner or the new one.
    unfinished = target.with_name(f".{target.name}.part")
    unfinished.unlink(missing_ok=True)
    unfinished.symlink_to(os.path.relpath(Path(checkpoint).absolute(), target.absolute().parent))
    unfinished.replace(target)
    return target


def checkpoint_folder(args: TrainingArguments, step: int) -> Path:
    """Where the Trainer saves a step."""
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def check_arguments(
    args: TrainingArguments, *, metric: str, is_best_metric: bool, save_total_limit: int | None, load_winner: bool
) -> None:
    """Refuse arguments of a training that would lose the winner of its tournament, or load another model in its place.

    Args:
        args: The training's.
        metric: A metric by which the tournament could be the Trainer's choice.
        is_best_metric: Whether it is.
        save_total_limit: The callback's own limit.
        load_winner: Whether the winner is to be loaded at the end.

    Raises:
        ValueError: If so; says what to do.
    """
    other = None if is_best_metric else args.metric_for_best_model
    if args.save_total_limit and save_total_limit:
        raise ValueError("`save_total_limit` is set in TrainingArguments and in the callback: leave one of them out.")
    if args.save_total_limit and other is not None:
        raise ValueError(
            f'With `metric_for_best_model="{other}"` the `save_total_limit` of TrainingArguments would delete the '
            f"tournament's winner: leave it out there and give `save_total_limit={args.save_total_limit}` to the "
            f'TournamentCallback, which keeps both, or choose by `metric_for_best_model="{metric}"`.'
        )
    if load_winner and args.save_strategy == SaveStrategy.NO:
        raise ValueError("`load_winner_at_end` needs checkpoints: set a `save_strategy` in TrainingArguments.")
    if load_winner and args.load_best_model_at_end and other is not None:
        raise ValueError(
            f'`load_winner_at_end` and `load_best_model_at_end` (by "{other}") would load two models: choose one.'
        )


def delete_old_checkpoints(folder: Path, limit: int, kept: Collection[Path], now: int) -> None:
    """Delete the oldest checkpoints beyond a limit, except some.

    Args:
        folder: The run's.
        limit: How many may stay.
        kept: Those that stay in any case.
        now: The step of the latest; those of later steps are an earlier run's, and the oldest of all.
    """
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    found = (path.name.removeprefix(prefix) for path in folder.glob(f"{prefix}*"))
    steps = sorted((int(step) for step in found if step.isdigit()), key=lambda step: (step <= now, step))
    free = [path for path in (folder / f"{prefix}{step}" for step in steps) if path not in kept]
    for path in free[: max(0, len(steps) - limit)]:
        try:
            shutil.rmtree(path)
        except OSError as error:  # a link, or not ours to remove: the training is worth more than the space
            warnings.warn(
                f"{path} is beyond `save_total_limit={limit}` and stays, for it cannot be removed ({error}): remove "
                "it by hand.",
                CoverageWarning,
                stacklevel=2,
            )


def load_weights(trainer: Trainer, checkpoint: Path) -> None:
    """Load a checkpoint into the Trainer's model, adapters and shards included, as it loads its best one.

    Raises:
        ValueError: If the checkpoint lacks weights, which the Trainer itself only warns of.
    """
    model: torch.nn.Module = trainer.model
    best, missing = trainer.state.best_model_checkpoint, []
    hook = model.register_load_state_dict_post_hook(lambda _, found: missing.append(set(found.missing_keys)))
    try:
        trainer.state.best_model_checkpoint = str(checkpoint)
        trainer._load_best_model()
    finally:
        hook.remove()
        trainer.state.best_model_checkpoint = best
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:  # which load in their own way, and all or nothing
        return
    lost = _lost(model, set.intersection(*missing)) if missing else ["all weights"]
    if lost:
        raise ValueError(
            f"The checkpoint {checkpoint} lacks {some(lost)}: the model would be part this checkpoint, part what it "
            "was when training ended. Load another checkpoint, or this one from a backup."
        )


def _lost(model: torch.nn.Module, missing: set[str]) -> list[str]:
    """Those of the weights that no shard had which are neither tied to another one nor the base of an adapter."""
    adapters = getattr(model, "peft_config", {})
    if any(config.is_prompt_learning for config in adapters.values()):  # PEFT loads these apart, and strictly
        return []
    if adapters:
        missing = {key for key in missing if adapters.keys() & set(key.split("."))}
    state = model.state_dict()
    loaded = {tensor.data_ptr() for key, tensor in state.items() if key not in missing}
    return sorted(key for key in missing if state[key].data_ptr() not in loaded)
