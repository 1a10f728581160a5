"""The checkpoints of a Trainer's run: which may be deleted, and how one is loaded."""

import shutil
from collections.abc import Collection
from pathlib import Path

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

__all__ = ["check_arguments", "checkpoint_folder", "delete_old_checkpoints", "load_weights"]


def checkpoint_folder(args: TrainingArguments, step: int) -> Path:
    """Where the Trainer saves a step."""
    return Path(args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def check_arguments(
    args: TrainingArguments, *, metric: str, is_best_metric: bool, save_total_limit: int | None, load_winner: bool
) -> None:
    """Refuse arguments of a training that would lose the winner of its tournament, or load another model in its place.

    Args:
        args: the training's.
        metric: a metric by which the tournament could be the Trainer's choice.
        is_best_metric: whether it is.
        save_total_limit: the callback's own limit.
        load_winner: whether the winner is to be loaded at the end.

    Raises:
        ValueError: if so; says what to do.
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
        folder: the run's.
        limit: how many may stay.
        kept: those that stay in any case.
        now: the step of the latest; those of later steps are an earlier run's, and the oldest of all.
    """
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    found = (path.name.removeprefix(prefix) for path in folder.glob(f"{prefix}*"))
    steps = sorted((int(step) for step in found if step.isdigit()), key=lambda step: (step <= now, step))
    free = [path for path in (folder / f"{prefix}{step}" for step in steps) if path not in kept]
    for path in free[: max(0, len(steps) - limit)]:
        shutil.rmtree(path)


def load_weights(trainer: Trainer, checkpoint: Path) -> None:
    """Load a checkpoint into the Trainer's model, adapters and shards included, as it loads its best one."""
    best = trainer.state.best_model_checkpoint
    try:
        trainer.state.best_model_checkpoint = str(checkpoint)
        trainer._load_best_model()
    finally:
        trainer.state.best_model_checkpoint = best
