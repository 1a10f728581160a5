"""The explanations that every report carries: how a profile is read, what is an estimate and what only a bound."""

from collections.abc import Sequence

from hf_coverage.functional.checks import ReferenceKind

__all__ = ["how_to_read", "what_is_known"]

_MEANING = {
    "density": (
        "Cov_N is the share of the reference's responses y that are at least N times less likely under the model than "
        "under the reference, D(y|x) >= N p(y|x). Lower is better."
    ),
    "single_answer": (
        "Cov_N is the share of prompts whose one right answer has a probability of at most 1/N under the model. "
        "Lower is better."
    ),
    "samples": (
        "The upper bound on Cov_N is the share of the reference's responses whose probability under the model is at "
        "most 1/N. Lower is better."
    ),
    "answer": (
        "Answer-level Cov_N is the share of prompts whose answer is at least N times less likely under the model than "
        "under the reference, whatever the reasoning that leads to it. Lower is better."
    ),
}

_READING = (
    "miss_N is the chance that N samples miss such a response, averaged over the reference: no reward makes Best-of-N "
    "with N samples lose more. It is smoother than Cov_N, so that it tells models apart on fewer rows.",
    "Best-of-N with about N samples, and reinforcement learning on such samples, cannot count on the responses in "
    "Cov_N: they are too rare to be drawn.",
    "The profile falls as N grows. Where it reaches zero early, a few samples are enough; where it stays up at large "
    "N, the model has given those responses up and more samples will not bring them back.",
    "KL is the mean of the log ratio whose tail Cov_N is. Cross-entropy and KL can improve while Cov_N gets worse: "
    "the mean gains on common responses what the tail loses on rare ones.",
)

_KNOWN = {
    "density": "Cov_N and KL are estimates: the reference's own log-probability of every response is known.",
    "single_answer": (
        "Cov_N and KL are estimates: each prompt has one right answer, so the reference gives it probability 1."
    ),
    "samples": (
        "The corpus holds samples of the reference and not its probabilities, so Cov_N and KL cannot be estimated "
        "from it. What is shown is an upper bound (a probability is at most 1); the true Cov_N can be far lower."
    ),
    "answer": (
        "Answer-level Cov_N is an estimate: an answer's probability is a mean over sampled reasoning, with a sampling "
        "error of its own that the intervals do not contain."
    ),
}

_INTERVALS = (
    "Brackets and bands are 95 % confidence intervals for the finite number of prompts; rows that share a prompt "
    "count as dependent. Those of KL and cross-entropy are Student's and their level nominal: such a mean has no "
    "bound, and may hang on responses too rare to be seen. They do not speak of another corpus or another training "
    "seed. Two models on the same rows "
    "differ more surely than two overlapping intervals suggest: the paired comparison is the test."
)

_BUDGET = (
    "A Best-of-N budget is the least number of samples whose miss_N is at most the loss allowed: enough whatever the "
    "reward in [0, 1]. The estimate takes the measured miss_N as exact; the guaranteed number rests on an upper "
    "confidence bound that holds for any number of prompts. The necessary number is the other side: with fewer, some "
    "reward exists on which Best-of-N loses more than asked."
)


_VERDICTS = (
    "Pass@N is the chance that a verifier accepts at least one of N samples of a prompt; 1 - Pass@N is what is lost. "
    "Lower is better.",
    "signal_G is the share of prompts whose group of G samples does not get one reward for all: what RL that compares "
    "the rewards of a group can learn from. It says whether RL begins to learn, and not where it ends.",
)

_JUDGED = (
    "Both are estimates without bias from the samples that were judged, of the model as it was sampled from: they say "
    "nothing of more samples, nor of another verifier.",
    "Brackets and bands are 95 % confidence intervals for the finite number of prompts. Two models on the same "
    "prompts differ more surely than two overlapping intervals suggest.",
)


def how_to_read(kinds: Sequence[ReferenceKind]) -> list[str]:
    """Sentences that explain the numbers of a profile, or verdicts, to somebody who has not read the paper."""
    if not kinds:
        return [*_VERDICTS]
    return [*(_MEANING[kind] for kind in kinds), *_READING]


def what_is_known(kinds: Sequence[ReferenceKind], *, budget: bool = True) -> list[str]:
    """Sentences that say which of the numbers are estimates and which are only bounds."""
    if not kinds:
        return [*_JUDGED]
    return [*(_KNOWN[kind] for kind in kinds), _INTERVALS, *([_BUDGET] if budget else [])]
