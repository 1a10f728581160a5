"""The paired comparison of two models' coverage as a comparison of the `evaluate` library."""

from collections.abc import Iterable
from typing import Any

import datasets
import evaluate

# The loader of `evaluate` tells users without this package to `pip install` what the trailing comment names.
from hf_coverage.functional import checks, coverage_profile, miss_profile, paired, statistics  # From: hf-coverage

_DESCRIPTION = """
Compares the coverage of two language models on the same reference responses. Cov_N is the share of the responses that
a model gives N times less probability than the reference does, so that about N samples will not find them; lower is
better. The two models are compared row by row, which finds differences that two separate intervals would hide.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions1: log-probabilities log p(y|x) of whole responses under the first model, in nats; -inf is legal.
    predictions2: log-probabilities of the same responses under the second model, in nats; -inf is legal.
    references: log-probabilities log D(y|x) of the same responses under the reference they were sampled from, in nats;
        0 where the response is the prompt's single right answer.
    n: the N of Cov_N, real numbers >= 1.
    groups: the prompt of each row, or any label of it, where prompts repeat. Rows of one prompt are not independent:
        intervals and p-values then treat the prompt as what was sampled.
    confidence: two-sided confidence level of the intervals, 0.95 by default; of that of kl, which is Student's, it is
        nominal.
Returns:
    cov_<n>_1, cov_<n>_2: Cov_N of the first and of the second model, for each n; lower is better.
    cov_<n>_difference: the first minus the second; positive means that the first model covers less.
    miss_<n>_1, miss_<n>_2, miss_<n>_difference: the same of miss_N, which no reward makes Best-of-N with N samples
        lose more than; it tells models apart on fewer rows.
    kl_1, kl_2, kl_difference: the same of the mean of log D - log p, nats; inf where a response has probability 0.
    Each difference also with its interval from <key>_low to <key>_high and <key>_p, its two-sided p-value; NaN where
    there is none. The p-values are of one test each: with many n, expect the smallest to be small by chance.
Raises:
    ValueError: if there are no rows, or a log-probability is NaN, missing or above 0, or a reference is -inf.
Examples:
    >>> import evaluate
    >>> import hf_coverage
    >>> comparison = evaluate.load(hf_coverage.evaluate_module("coverage_comparison"), module_type="comparison")
    >>> results = comparison.compute(
    ...     predictions1=[-1.0, -9.0, -9.0, -1.0],
    ...     predictions2=[-1.0, -2.0, -9.0, -1.0],
    ...     references=[-1.0, -1.0, -1.0, -1.0],
    ...     n=16,
    ... )
    >>> results["cov_16_1"], results["cov_16_2"], results["cov_16_difference"], results["kl_difference"]
    (0.5, 0.25, 0.25, 1.75)
    >>> results["cov_16_difference_low"] < 0 < results["cov_16_difference_high"], results["cov_16_difference_p"] > 0.05
    (True, True)
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
class CoverageComparison(evaluate.Comparison):
    """Paired differences of coverage and KL from sequence log-probabilities of two models."""

    def _info(self) -> evaluate.ComparisonInfo:
        value = datasets.Value("float64")
        return evaluate.ComparisonInfo(
            module_type="comparison",
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions1": value, "predictions2": value, "references": value}),
            reference_urls=["https://arxiv.org/abs/2510.15020"],
        )

    def _compute(
        self,
        predictions1: list[float],
        predictions2: list[float],
        references: list[float],
        n: float | Iterable[float] = (2, 4, 8, 16),
        groups: Iterable[Any] | None = None,
        confidence: float = 0.95,
    ) -> dict[str, float]:
        reference = checks.check_logprobs(references, name="references", allow_minus_infinity=False)
        ratios1 = reference - checks.check_logprobs(predictions1, name="predictions1")
        ratios2 = reference - checks.check_logprobs(predictions2, name="predictions2")
        codes = None if groups is None else statistics.group_codes(groups)
        n = list(n) if isinstance(n, Iterable) else [n]
        results: dict[str, float] = {}
        for difference, level, key in (
            (paired.paired_coverage_difference, coverage_profile.coverage, checks.coverage_key),
            (paired.paired_miss_difference, miss_profile.miss, checks.miss_key),
        ):
            for value in n:
                test = difference(ratios1, ratios2, value, groups=codes, confidence=confidence)
                results |= _entries(key(value), (level(ratios1, value), level(ratios2, value)), test)
        test = paired.paired_kl_difference(ratios1, ratios2, groups=codes, confidence=confidence)
        return results | _entries("kl", (ratios1.mean(), ratios2.mean()), test)


def _entries(key: str, levels: tuple[float, float], test: paired.PairedDifference) -> dict[str, float]:
    values = {"_1": levels[0], "_2": levels[1], "_difference": test.difference, "_difference_low": test.low}
    values |= {"_difference_high": test.high, "_difference_p": test.p_value}
    return {key + suffix: float(value) for suffix, value in values.items()}
