"""Model cards with coverage in their metadata, written through `huggingface_hub`."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_coverage import __version__
from hf_coverage.decode.best_of_n_result import BestOfNResult
from hf_coverage.inference.files import write_atomically, written_whole
from hf_coverage.measure.profile import CoverageProfile
from hf_coverage.report.summary import profile_table, summarize_profiles
from hf_coverage.report.table import Table, escape_markdown
from hf_coverage.report.wording import how_to_read, what_is_known

__all__ = ["TAG", "coverage_eval_results", "success_eval_results", "write_model_card", "write_model_index"]

TAG = "hf-coverage"
"""The tag that all cards written here carry, and by which one is known that may be written over."""

_PICTURE = "coverage_profile.png"


def write_model_card(
    folder: str | PathLike[str],
    profile: CoverageProfile,
    *,
    corpus: str,
    provenance: Mapping[str, object],
    n: Sequence[float] = (2, 4, 8, 16),
    others: Sequence[CoverageProfile] = (),
    regret: float = 0.1,
    description: str = "",
    tables: Sequence[Table] = (),
    corpus_fingerprint: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model's card, `README.md` and its profile plot, with one model-index entry for each coverage.

    Args:
        folder: The model's folder; made where it does not exist.
        profile: The model's profile, whose `name` is the model's.
        corpus: Name of the reference corpus: a dataset's id on the Hub where it has one.
        provenance: What `provenance()` gave; its `command` is shown as the way to the same numbers.
        n: The N to report.
        others: Profiles of other models for the table and the plot, such as the model this one was made from.
        regret: The loss of expected reward, in (0, 1), that the Best-of-N budget allows.
        description: What the model is, in Markdown.
        tables: Further tables, such as a run's checkpoints.
        corpus_fingerprint: Hash of the corpus's token ids.
        metadata: Further fields of the card, such as `license`, `base_model`, `language` or `tags`.

    Returns:
        The card's path.

    Raises:
        FileExistsError: If the folder has a card that was not written here.

    Example:
        >>> import tempfile
        >>> profile = CoverageProfile.from_logprobs([-1.0, -9.0], [-1.0, -1.0], name="tiny")
        >>> path = write_model_card(
        ...     tempfile.mkdtemp(), profile, corpus="org/prompts", provenance={"command": "hf-coverage report scores"}
        ... )
        >>> ModelCard.load(path).data.eval_results[0].metric_name
        'Cov_2 (lower is better)'
    """
    target = Path(folder) / "README.md"
    _refuse_foreign(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    profile.plot(target.parent / _PICTURE, others=others, marks=n)
    table = profile_table([profile, *others], n, regret=regret)
    size = f"{profile.num_rows:,} responses to {profile.num_groups:,} prompts"
    mark = f"; fingerprint of its token ids `{corpus_fingerprint}`" if corpus_fingerprint else ""
    card = ModelCard.from_template(
        _card_data(profile, n, corpus, corpus_fingerprint, metadata or {}),
        template_str=resources.files(__package__).joinpath("templates/model_card.md.j2").read_text(encoding="utf-8"),
        title=escape_markdown(profile.name),
        description=description,
        summary=[escape_markdown(text) for text in summarize_profiles([profile, *others], n, regret=regret)],
        table=table.to_markdown(),
        caption=table.caption,
        alt=f"{profile.quantity} over N, lower is better",
        picture=_PICTURE,
        tables=[_with_caption(extra) for extra in tables],
        reading=how_to_read([profile.kind]),
        known=what_is_known([profile.kind]),
        corpus=f"{escape_markdown(corpus)}: {size}{mark}.",
        command=_fenced(str(provenance.get("command", ""))),
        origin=Table(["", ""], [[k, str(v)] for k, v in provenance.items() if k != "command"]).to_markdown(),
        version=__version__,
    )
    with written_whole(target) as part:
        card.save(part)
    return target


def coverage_eval_results(
    profile: CoverageProfile, n: Sequence[float], *, corpus: str, corpus_fingerprint: str | None = None
) -> list[EvalResult]:
    """Entries of a card's model-index: coverage at each N, KL and cross-entropy, where they are finite.

    Args:
        profile: The model's profile.
        n: The N to report.
        corpus: Name of the reference corpus.
        corpus_fingerprint: Hash of the corpus's token ids.
    """
    facts = {"num_rows": profile.num_rows, "num_prompts": profile.num_groups, "fingerprint": corpus_fingerprint}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=re.sub(r"[^\w./-]+", "-", corpus).strip("-"),
            dataset_name=corpus,
            dataset_args={name: fact for name, fact in facts.items() if fact is not None},
            metric_type=key,
            metric_name=f"{name} (lower is better)",
            metric_value=round(value, 6),
            metric_args=arguments,
        )
        for key, name, value, arguments in _entries(profile, n)
        if math.isfinite(value)
    ]


def success_eval_results(
    result: BestOfNResult, n: Sequence[int], *, data: str, data_fingerprint: str | None = None
) -> list[EvalResult]:
    """Entries of a card's model-index: Pass@N and the reward of the best of N samples.

    Args:
        result: What Best-of-N achieves with the model.
        n: The N to report.
        data: Name of the problems: a dataset's id on the Hub where it has one.
        data_fingerprint: Hash of the problems.

    Example:
        >>> result = BestOfNResult.from_rewards([[1.0, 0.0], [1.0, 1.0]])
        >>> [(one.metric_type, one.metric_value) for one in success_eval_results(result, [2], data="org/problems")]
        [('pass@2', 1.0), ('best_of_2', 1.0)]
    """
    facts = {"num_prompts": result.num_prompts, "samples": result.k, "fingerprint": data_fingerprint}
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=re.sub(r"[^\w./-]+", "-", data).strip("-"),
            dataset_name=data,
            dataset_args={name: fact for name, fact in facts.items() if fact is not None},
            metric_type=key,
            metric_name=f"{key}, judged by {result.verifier} (higher is better)",
            metric_value=round(value, 6),
        )
        for key, value in result.metrics(n).items()
        if key != "failed" and not key.endswith("_stderr") and math.isfinite(value)
    ]


def write_model_index(path: str | PathLike[str], name: str, entries: Sequence[EvalResult]) -> Path:
    """Write a card's model-index as YAML, to be put between the `---` lines of a model's README.md.

    Args:
        path: The file.
        name: The model's name.
        entries: What `coverage_eval_results` or `success_eval_results` gave.
    """
    data = ModelCardData(model_name=name, eval_results=list(entries))
    write_atomically(Path(path), data.to_yaml() + "\n")
    return Path(path)


def _entries(profile: CoverageProfile, n: Sequence[float]) -> Iterator[tuple[str, str, float, dict[str, Any]]]:
    metrics = profile.metrics(n)
    for value in n:
        key, name = profile.key(value), profile.label(value)
        ends = [round(end, 6) for end in profile.interval(value)]
        yield (
            key,
            name[0].upper() + name[1:],
            metrics[key],
            {"n": int(value) if float(value).is_integer() else value, "interval_95": ends},
        )
    for key, name in (("kl", "KL, nats"), ("sequence_cross_entropy", "Sequence cross-entropy, nats")):
        if key in metrics:
            error = metrics[f"{key}_stderr"]
            yield key, name, metrics[key], {"stderr": round(error, 6)} if math.isfinite(error) else {}


def _card_data(
    profile: CoverageProfile, n: Sequence[float], corpus: str, fingerprint: str | None, metadata: Mapping[str, Any]
) -> ModelCardData:
    tags = [TAG, *(tag for tag in metadata.get("tags", ()) if tag != TAG)]
    defaults = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    results = coverage_eval_results(profile, n, corpus=corpus, corpus_fingerprint=fingerprint)
    return ModelCardData(**(defaults | dict(metadata) | {"tags": tags}), model_name=profile.name, eval_results=results)


def _refuse_foreign(target: Path) -> None:
    if target.exists() and TAG not in (ModelCard.load(target).data.get("tags") or ()):
        raise FileExistsError(
            f"`folder` has a card already that hf_coverage did not write, {target}: choose another folder, or move it."
        )


def _with_caption(table: Table) -> str:
    return f"{escape_markdown(table.caption)}\n\n{table.to_markdown()}" if table.caption else table.to_markdown()


def _fenced(command: str) -> str:
    """A shell command as a code block whose fence is longer than any that the command contains."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", command)), default=0))
    return f"{fence}bash\n{command}\n{fence}"
