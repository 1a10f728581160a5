"""The coverage profile Cov_N as a metric of the `evaluate` library."""

from collections.abc import Iterable
from typing import Any

import datasets
import evaluate

# The loader of `evaluate` tells users without this package to `pip install` what the trailing comment names.
from hf_coverage.functional import checks, coverage_profile, miss_profile, statistics  # From: hf-coverage

_DESCRIPTION = """
Coverage profile of a language model: Cov_N is the share of the reference's responses that the model gives N times less
probability than the reference does, so that about N samples will not find them. Lower is better. It says what
cross-entropy cannot: whether Best-of-N and reinforcement learning still find the good responses.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions: log-probabilities log p(y|x) of whole responses under the model, in nats; -inf is legal.
    references: log-probabilities log D(y|x) of the same responses under the reference they were sampled from, in nats;
        0 where the response is the prompt's single right answer.
    n: the N of Cov_N, real numbers >= 1.
    groups: the prompt of each row, or any label of it, where prompts repeat. Rows of one prompt are not independent:
        standard errors and intervals then treat the prompt as what was sampled.
    confidence: two-sided confidence level of the intervals, 0.95 by default; of those of kl and
        sequence_cross_entropy, which are Student's, it is nominal.
Returns:
    cov_<n>: share of rows with log D - log p >= log n, for each n; lower is better.
    miss_<n>: mean of (1 - min(1, p/D))^n, for each n: no reward makes Best-of-N with n samples lose more; lower is
        better. It is smoother than cov_<n> and tells models apart on fewer rows.
    kl: mean of log D - log p, nats; inf where a response has probability 0.
    sequence_cross_entropy: mean of -log p, nats a response.
    Each of them also with its standard error <key>_stderr and its interval from <key>_low to <key>_high; NaN where
    there is none.
Raises:
    ValueError: if there are no rows, or a log-probability is NaN, missing or above 0, or a reference is -inf.
Examples:
    >>> import evaluate
    >>> import hf_coverage
    >>> metric = evaluate.load(hf_coverage.evaluate_module("coverage"))
    >>> results = metric.compute(predictions=[-1.0, -2.0, -9.0, -1.0], references=[-1.0, -1.0, -1.0, -1.0], n=[2, 16])
    >>> results["cov_2"], results["cov_16"], results["kl"], results["sequence_cross_entropy"]
    (0.5, 0.25, 2.25, 3.25)
    >>> round(results["cov_16_low"], 4), round(results["cov_16_high"], 4)
    (0.0063, 0.8059)
"""

_CITATION = """\
@article{chen2025coverage,
  title={The Coverage Principle: How Pre-Training Enables Post-Training},
  author={Chen, Fan and Huang, Audrey and Golowich, Noah and Malladi, Sadhika and Block, Adam and Ash, Jordan T. and
    Krishnamurthy, Akshay and Foster, Dylan J.},
  journal={arXiv preprint arXiv:2510.15020},
  year={2025}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class Coverage(evaluate.Metric):
    """Coverage profile, KL and cross-entropy from sequence log-probabilities."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            module_type="metric",
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
            reference_urls=["https://arxiv.org/abs/2510.15020"],
        )

    def _compute(
        self,
        predictions: list[float],
        references: list[float],
        n: float | Iterable[float] = (2, 4, 8, 16),
        groups: Iterable[Any] | None = None,
        confidence: float = 0.95,
    ) -> dict[str, float]:
        logprobs = checks.check_logprobs(predictions, name="predictions")
        log_ratios = checks.check_logprobs(references, name="references", allow_minus_infinity=False) - logprobs
        codes = None if groups is None else statistics.group_codes(groups)
        n = list(n) if isinstance(n, Iterable) else [n]
        results: dict[str, float] = {}
        for value in n:
            hits = coverage_profile.reached(log_ratios, value)
            interval = statistics.proportion_interval(hits, groups=codes, confidence=confidence)
            results |= _entries(checks.coverage_key(value), statistics.clustered_mean(hits, groups=codes), interval)
        for value in n:
            missed = miss_profile.miss_values(log_ratios, value)
            interval = statistics.bounded_mean_interval(missed, groups=codes, confidence=confidence)
            results |= _entries(checks.miss_key(value), statistics.clustered_mean(missed, groups=codes), interval)
        for key, values in (("kl", log_ratios), ("sequence_cross_entropy", -logprobs)):
            estimate = statistics.clustered_mean(values, groups=codes)
            results |= _entries(key, estimate, statistics.mean_interval(estimate, confidence))
        return results


def _entries(key: str, estimate: statistics.MeanEstimate, interval: tuple[float, float]) -> dict[str, float]:
    low, high = interval
    values = {"": estimate.mean, "_stderr": estimate.standard_error, "_low": low, "_high": high}
    return {key + suffix: float(value) for suffix, value in values.items()}
