"""Small fine-tunings on tasks of `reasoning_gym`, several seeds of each, to choose checkpoints of.

    python -m recipes.choice.finetune --config recipes/choice/reasoning.yaml --tasks gcd number_sequence --seeds 0 1

Each is a run of `recipes.reasoning.finetune` in `<output_dir>/<task>-seed<seed>`; all other arguments go there too.
The seeds of a task share what the layers below give. What was stopped goes on where it was when the same command is
given again, and what is there already is left alone.
"""

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from recipes.pretrain import last_checkpoint
from recipes.reasoning.finetune import Recipe, fine_tune, kept_settings, prepare, read_recipe
from recipes.settings import refuse_other_settings

TASKS: dict[str, dict[str, int]] = {
    "chain_sum": {"max_terms": 3, "max_digits": 2},
    "letter_counting": {},
    "number_sequence": {},
    "family_relationships": {},
    "simple_equations": {},
    "gcd": {},
}
"""The tasks and their options, where they are not the defaults."""


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/choice/reasoning"))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    args, rest = parser.parse_known_args()
    for task in args.tasks:
        recipes = [recipe_of(task, seed, args.output_dir, rest) for seed in args.seeds]
        for recipe in recipes:
            refuse_other_settings(recipe.output, kept_settings(recipe))
        unfinished = [recipe for recipe in recipes if not is_finished(recipe)]
        if unfinished:
            prepared = prepare(unfinished[0])
            for recipe in unfinished:
                fine_tune(recipe, prepared)


def recipe_of(task: str, seed: int, output: Path, rest: list[str]) -> Recipe:
    """The recipe of one run."""
    words = [*rest, "--seed", str(seed), "--output_dir", str(output / f"{task}-seed{seed}"), "--task.name", task]
    for name, value in TASKS[task].items():
        words += [f"--task.{name}", str(value)]
    return read_recipe(words, __doc__)


def is_finished(recipe: Recipe) -> bool:
    """Whether a run has come to the end of its training, with all that is measured at its last checkpoint."""
    checkpoint = last_checkpoint(Path(recipe.finetune.output_dir))
    if checkpoint is None:
        return False
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return bool(state["global_step"] == state["max_steps"])


if __name__ == "__main__":
    main()
