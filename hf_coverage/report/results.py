"""Results as JSON in the shape that users of lm-evaluation-harness know.

One entry a model under `results`, every metric as a pair `<metric>,none` and `<metric>_stderr,none`, and beside them
`config`, `versions`, `n-samples`, `higher_is_better`, `date` and `git_hash` under the same names.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_coverage.decode.best_of_n_result import BestOfNResult
from hf_coverage.functional.checks import metric_key
from hf_coverage.inference.files import write_atomically, written_whole
from hf_coverage.measure.profile import CoverageProfile
from hf_coverage.report.provenance import git_hash, versions

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = [
    "METRIC_VERSION",
    "coverage_results",
    "success_results",
    "write_results",
    "write_samples",
    "write_success_samples",
]

METRIC_VERSION = 1
"""Raised when the same log-probabilities would give another number."""


def coverage_results(
    profiles: Sequence[CoverageProfile],
    n: Sequence[float],
    *,
    config: Mapping[str, Any] | None = None,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Metrics of models as a dictionary that `write_results` can write.

    Args:
        profiles: One a model, under different names.
        n: The N to report.
        config: What was run: models, corpus, seeds; kept as it is.
        confidence: Level of the intervals.

    Returns:
        The results. Beyond lm-evaluation-harness, `intervals` holds `[low, high]` for every Cov_N and miss_N.

    Raises:
        ValueError: If two profiles have one name.

    Example:
        >>> profile = CoverageProfile.from_logprobs([-1.0, -9.0], [-1.0, -1.0], name="a")
        >>> coverage_results([profile], [16])["results"]["a"]["cov_16,none"]
        0.5
    """
    names = [profile.name for profile in profiles]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"`profiles` must have different names, but two are called {twice!r}; give each its `name`.")
    metrics = {profile.name: profile.metrics(n) for profile in profiles}
    passes = {profile.name: _passes(profile, n) for profile in profiles}
    return {
        "results": {name: _paired(name, values) | passes[name] for name, values in metrics.items()},
        "intervals": {profile.name: _intervals(profile, n, confidence) for profile in profiles},
        "confidence": confidence,
        "configs": {
            profile.name: {"reference": profile.kind, "num_rows": profile.num_rows, "num_prompts": profile.num_groups}
            for profile in profiles
        },
        "higher_is_better": {
            name: {key: False for key in values if not key.endswith("_stderr")}
            | {key.partition(",")[0]: True for key in passes[name]}
            for name, values in metrics.items()
        },
        "n-samples": {
            profile.name: {"original": profile.num_rows, "effective": profile.num_rows} for profile in profiles
        },
        "config": dict(config or {}),
    } | _surroundings(names)


def success_results(
    result: BestOfNResult, n: Sequence[int], *, config: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What Best-of-N achieves as a dictionary that `write_results` can write and lm-evaluation-harness can show.

    Args:
        result: Rewards of a model's samples.
        n: The N to report.
        config: What was run; kept as it is.

    Returns:
        The results, with `errors`: how many responses could not be judged, by why.

    Example:
        >>> result = BestOfNResult.from_rewards([[1.0, 0.0], [1.0, 1.0]], name="a")
        >>> success_results(result, [2])["results"]["a"]["pass@2,none"]
        1.0
    """
    metrics = result.metrics(n)
    better = {key: key != "failed" for key in metrics if not key.endswith("_stderr")}
    return {
        "results": {result.name: _paired(result.name, metrics)},
        "errors": result.errors,
        "config": dict(config or {}),
        "n-samples": {result.name: {"original": result.num_prompts, "effective": result.num_prompts}},
        "higher_is_better": {result.name: better},
    } | _surroundings([result.name])


def write_results(folder: str | PathLike[str], results: Mapping[str, Any]) -> Path:
    """Write results as `results_<date>.json` into a folder, which is made where it does not exist.

    The file is strict JSON: an infinite number is the text "inf" and one that is not known "N/A".

    Returns:
        The file's path.
    """
    target = Path(folder) / f"results_{re.sub(':', '-', datetime.now().isoformat())}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_strict(results), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(target, text + "\n")
    return target


def write_samples(results: Path, profile: CoverageProfile) -> Path:
    """Write a model's rows as `samples_<model>_<date>.jsonl` beside its results.

    Args:
        results: What `write_results` returned.
        profile: The model's profile.

    Returns:
        The file's path. A line is `{"doc_id", "log_ratio", "logprob", "group", "weight"}`, what is not known left out.
    """
    target = _samples_path(results, profile.name)
    columns = (profile.log_ratios, profile.logprobs, profile.groups, profile.weights)
    names = ("log_ratio", "logprob", "group", "weight")
    known = {key: column.tolist() for key, column in zip(names, columns) if column is not None}
    with written_whole(target) as part, part.open("w", encoding="utf-8") as file:
        for row, values in enumerate(zip(*known.values())):
            file.write(json.dumps(_strict({"doc_id": row} | dict(zip(known, values))), allow_nan=False) + "\n")
    return target


def write_success_samples(
    results: Path, result: BestOfNResult, corpus: "Dataset", responses: Mapping[tuple[int, int], str], column: str
) -> Path:
    """Write the samples of Best-of-N as `samples_<model>_<date>.jsonl` beside its results, a line a prompt.

    Args:
        results: What `write_results` returned.
        result: Their rewards.
        corpus: What they were sampled for.
        responses: Their texts, by the number of the prompt and of the sample.
        column: Column of right answers; where there is none, `target` is null.

    Returns:
        The file's path. A line has the entries that lm-evaluation-harness logs: `doc_id` (the row), `doc`, `target`,
        `arguments`, `resps`, `filtered_resps`, `filter`, `metrics` and hashes; and `reward`, one a sample.
    """
    target = _samples_path(results, result.name)
    plain = corpus.with_format(None)
    with written_whole(target) as part, part.open("w", encoding="utf-8") as file:
        for prompt, (row, rewards) in enumerate(zip(result.rows.tolist(), result.rewards.tolist())):
            doc = plain[row]
            texts = [responses[prompt, sample] for sample in range(result.k)]
            gold = doc.get(column)
            solved = None if result.threshold is None else [reward >= result.threshold for reward in rewards]
            first = {} if solved is None else {"pass@1": sum(solved) / len(solved)}
            line = {
                "doc_id": row,
                "doc": doc,
                "target": gold,
                "arguments": {"gen_args_0": {"arg_0": doc["prompt"], "arg_1": result.settings}},
                "resps": [texts],
                "filtered_resps": texts,
                "filter": "none",
                "metrics": [*first, "reward"],
                "doc_hash": _hash(doc),
                "prompt_hash": _hash(doc["prompt"]),
                "target_hash": _hash(gold),
            }
            file.write(json.dumps(_strict(line | first | {"reward": rewards}), ensure_ascii=False) + "\n")
    return target


def _hash(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, indent=2, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _samples_path(results: Path, name: str) -> Path:
    plain = re.sub(r"\W", "_", name)
    return results.with_name(f"samples_{plain}_{results.stem.removeprefix('results_')}.jsonl")


def _surroundings(names: Sequence[str]) -> dict[str, Any]:
    """What lm-evaluation-harness wants to know of every result, and what somebody else needs to get the same."""
    return {
        "group_subtasks": {name: [] for name in names},
        "versions": dict.fromkeys(names, METRIC_VERSION),
        "n-shot": dict.fromkeys(names, 0),
        "git_hash": git_hash(),
        "date": datetime.now().timestamp(),
    } | {f"{name}_version": version for name, version in versions().items()}


def _paired(name: str, metrics: Mapping[str, float]) -> dict[str, Any]:
    return {"alias": name} | {f"{key},none": value for key, value in metrics.items()}


def _passes(profile: CoverageProfile, n: Sequence[float]) -> dict[str, float]:
    """Exact Pass@N of independent and stratified samples, where the intervals of single right answers are known."""
    if profile.kind != "single_answer" or profile.interval_lows is None:
        return {}
    levels = [value for value in n if value == int(value)]
    return {
        f"pass@{metric_key(value)},{kind}": profile.pass_at(value, kind)
        for value in levels
        for kind in ("independent", "stratified")
    }


def _intervals(profile: CoverageProfile, n: Sequence[float], confidence: float) -> dict[str, list[float]]:
    covs = {f"{profile.key(value)},none": list(profile.interval(value, confidence)) for value in n}
    return covs | {f"{profile.miss_key(value)},none": list(profile.miss_interval(value, confidence)) for value in n}


def _strict(value: Any) -> Any:
    """The same value without the numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return _strict(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "N/A" if math.isnan(value) else str(value)
    return value
