"""`hf-coverage suggest`: step size, lambda and minibatch of the theorems for a model and its data."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_coverage.commands.console import is_main_process, print_table, say, say_next
from hf_coverage.commands.inputs import leave_job, load_model, read_corpus
from hf_coverage.commands.options import BatchTokens, CorpusOptions, output_folder
from hf_coverage.functional.step_sizes import TrainingPlan
from hf_coverage.inference.loading import ModelOptions, load_tokenizer
from hf_coverage.report.provenance import provenance

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from hf_coverage.report.step_sizes import Suggestion

__all__ = ["EXAMPLES", "suggest"]

EXAMPLES = """\
[bold]Examples[/]

hf-coverage suggest Qwen/Qwen3-0.6B --data corpus --n 16 --steps 1000 --gradient-norms 8

hf-coverage suggest ./checkpoint-500 --data corpus --n 16 --steps 1000 --batch-size 32 --teacher Qwen/Qwen3-1.7B

torchrun --nproc_per_node 2 -m hf_coverage suggest gpt2 --data corpus -n 16 --steps 1000
"""

_MINIBATCH = 8
"""Sequences in a minibatch whose gradient is measured, unless `--batch-size` or the corpus says otherwise."""


def suggest(
    model: Annotated[str, typer.Argument(help="Folder or Hub id of a causal language model.")],
    data: Annotated[str, typer.Option("--data", "--corpus", help="Prompts and responses: folder, file or Hub id.")],
    n: Annotated[float, typer.Option("--n", "-n", help="The N of Cov_N to train for, a real number above 1.")],
    steps: Annotated[int, typer.Option(min=1, help="T: how many steps the training will make.")],
    eps: Annotated[float, typer.Option(help="The Cov_N that is wanted; it sets the minibatch K.")] = 0.1,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="K: sequences in a minibatch; by default as many as `--eps` needs.")
    ] = None,
    radius: Annotated[
        float | None,
        typer.Option(help="R: the norm that the output head stays below; by default the norm that it has."),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Model that the responses come from, whose next-token distributions are D's.")
    ] = None,
    gradient_norms: Annotated[
        int,
        typer.Option(
            min=0, max=10_000, help="Measure the gradient's norm on that many minibatches, to put beside lambda."
        ),
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of those minibatches.")] = 0,
    output_dir: Annotated[
        Path,
        output_folder("Folder for the JSON, and for what an interrupted run goes on with."),
    ] = Path("suggest"),
    *,
    reading: CorpusOptions,
    loading: ModelOptions,
    batch_tokens: BatchTokens = 4096,
) -> None:
    """Suggest step size, lambda and minibatch for training a model for coverage.

    Measures what Theorems 5.1, 6.1 and 6.2 have to know of the model and its data: B, the largest norm of a feature,
    and the inherent variance of a response. Prints what they set, what they then promise of Cov_N, term by term, what
    they take for granted, and what practice does with it. For real models the promise is mostly empty; it says so.

    Writes suggestion.json.
    """
    plan = TrainingPlan(n, steps, eps, batch_size)
    if radius is not None and not 1e-30 <= radius <= 1e30:
        raise typer.BadParameter(
            f"`--radius` must be from 1e-30 to 1e30, but is {radius}: leave it out for the head's norm."
        )
    rows, _ = read_corpus(data, reading)
    suggestion = measure(
        load_model(model, loading),
        rows,
        plan,
        radius=radius,
        num_batches=gradient_norms,
        seed=seed,
        tokenizer=load_tokenizer(model, loading),
        teacher=None if teacher is None else load_model(teacher, loading.for_another_model()),
        append_eos=reading.append_eos,
        group_by=reading.group_by,
        batch_tokens=batch_tokens,
        output_dir=output_dir / "head_statistics",
    )
    leave_job()
    if is_main_process():
        show(suggestion)
        say(f"All numbers are in {_write(suggestion, output_dir, model=model, data=data, teacher=teacher)}.")
        say("Train with these, and let each checkpoint be judged as it comes.")
        say_next("hf-coverage", "choose", "RUN", "--follow", "--data", data)


def measure(
    model: "PreTrainedModel",
    rows: "Dataset",
    plan: TrainingPlan,
    *,
    tokenizer: Any,
    radius: float | None = None,
    num_batches: int = 0,
    seed: int = 0,
    **scoring: Any,
) -> "Suggestion":
    """Measure what the theorems need; every process of a job calls it.

    Args:
        model: The model.
        rows: The corpus.
        plan: What is wanted.
        tokenizer: The model's.
        radius: R; None for the norm of the output head.
        num_batches: How many minibatches' gradients to measure.
        seed: Of those minibatches.
        scoring: See `measure_inherent_variance`.
    """
    from hf_coverage.measure.corpus import encode_corpus
    from hf_coverage.measure.inherent_variance import gradient_norms, measure_inherent_variance, require_linear_head
    from hf_coverage.report.step_sizes import Suggestion

    head = require_linear_head(model)
    found = measure_inherent_variance(model, tokenizer, rows, progress=is_main_process(), **scoring)
    radius = head.norm if radius is None else radius
    size = min(plan.batch_size or _MINIBATCH, len(rows))
    norms: list[float] = []
    if num_batches:
        encoded = encode_corpus(rows, tokenizer, append_eos=scoring.get("append_eos", False))
        norms = gradient_norms(model, encoded, batch_size=size, num_batches=num_batches, seed=seed).tolist()
    return Suggestion(found, radius, plan, bool(head.shared_with), norms, size if norms else 0)


def show(suggestion: "Suggestion") -> None:
    """Print a suggestion."""
    print_table(suggestion.measured_table(), transpose=True)
    print_table(suggestion.sizes_table(), transpose=True)
    say(suggestion.verdict())
    say("What this takes for granted:", *(f"- {text}" for text in suggestion.assumptions()))
    say("What practice does with it:", *(f"- {text}" for text in suggestion.practice()))


def _write(suggestion: "Suggestion", folder: Path, **origin: Any) -> Path:
    from hf_coverage.inference.files import strict_json

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "suggestion.json"
    strict_json({"format": 1, **suggestion.facts(), "origin": provenance(**origin)}, path)
    return path
