"""What the theorems suggest for a model and a corpus, as tables and sentences, with what they take for granted."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from hf_coverage.functional.checks import metric_key
from hf_coverage.functional.step_sizes import (
    FEATURES,
    MINIBATCH,
    VARIANCE,
    LinearProblem,
    NormalizedStepSizes,
    PracticalSweep,
    StepSizes,
    TrainingPlan,
    distillation_step_sizes,
    normalized_step_sizes,
    practical_sweep,
    token_level_step_sizes,
)
from hf_coverage.measure.inherent_variance import InherentVariance
from hf_coverage.report.table import Cell, Column, Interval, Table, format_number

__all__ = ["Suggestion"]

_THEOREMS: dict[str, tuple[str, Callable[[LinearProblem, TrainingPlan], StepSizes]]] = {
    "5.1": ("normalised SGD", normalized_step_sizes),
    "6.1": ("token-level SGD, test-time training", token_level_step_sizes),
    "6.2": ("distillation, stopped gradient", distillation_step_sizes),
}
_START = 2
"""Which of a sweep's step sizes to begin with: the middle one."""


@dataclass(frozen=True)
class Suggestion:
    """Step sizes for a model and a corpus by Theorems 5.1, 6.1 and 6.2.

    Attributes:
        found: The constants of the output head on the corpus.
        radius: R of the ball that the head is taken to stay in.
        plan: What is wanted.
        tied: Whether the head's matrix is the input embedding too.
        gradient_norms: Norms of minibatches' gradients, where they were measured.
        gradient_batch: How many sequences those minibatches have.

    Example:
        >>> from hf_coverage.functional.statistics import MeanEstimate
        >>> variance = MeanEstimate(95_000.0, 670.0, num_groups=18)
        >>> found = InherentVariance(60.0, variance, variance, has_teacher=False, num_rows=89, mean_length=64.0)
        >>> suggestion = Suggestion(found, radius=720.0, plan=TrainingPlan(n=16, steps=1000))
        >>> suggestion.normalized.dominant, suggestion.normalized.is_vacuous
        ('feature norm', True)
        >>> suggestion.verdict().split(":")[0]
        'The bounds are vacuous'

    References:
        arXiv 2510.15020, Theorems 5.1, 6.1 and 6.2.
    """

    found: InherentVariance
    radius: float
    plan: TrainingPlan
    tied: bool = False
    gradient_norms: Sequence[float] = ()
    gradient_batch: int = 0

    @property
    def problem(self) -> LinearProblem:
        """What the theorems are given."""
        return self.found.problem(self.radius)

    @property
    def normalized(self) -> NormalizedStepSizes:
        """What Theorem 5.1 sets."""
        return normalized_step_sizes(self.problem, self.plan)

    @property
    def sizes(self) -> dict[str, StepSizes]:
        """Step sizes by the theorem's number."""
        return {theorem: function(self.problem, self.plan) for theorem, (_, function) in _THEOREMS.items()}

    @property
    def sweep(self) -> PracticalSweep | None:
        """What practice tries; None where no gradient norm was measured."""
        return practical_sweep(self.normalized, median(self.gradient_norms)) if self.gradient_norms else None

    def measured_table(self) -> Table:
        """B, the inherent variance in both forms, the effective length."""
        found, problem = self.found, self.problem
        columns: list[Column | str] = ["output head", "responses", "tokens of a response"]
        columns += ["max ||h||", "R", "B = R max ||h||"]
        cells: list[Cell] = ["tied" if self.tied else "its own", found.num_rows, found.mean_length]
        cells += [found.feature_norm, self.radius, problem.bound]
        for name, form in (("sample", found.sampled), ("expectation", found.expected)):
            columns.append(f"s2 of a response, {name} form{' (used)' if form is found.estimate else ''}")
            cells.append(Interval(form.mean, *found.interval(form)))
        columns += ["s2 of a token", "effective length s2 / max ||h||^2, tokens"]
        cells += [found.per_token, problem.effective_length]
        caption = f"s2 with Student's interval over {found.estimate.num_groups:,} groups of rows; it enters as R^2 s2."
        return Table(columns, [cells], caption)

    def sizes_table(self) -> Table:
        """What each theorem sets, and what it promises, term by term."""
        rows: list[list[Cell]] = []
        for theorem, sizes in self.sizes.items():
            lam = sizes.lam if isinstance(sizes, NormalizedStepSizes) else None
            terms = [sizes.terms.get(name) for name in (VARIANCE, FEATURES, MINIBATCH)]
            settings: list[Cell] = [f"{sizes.lr:.3g}", lam, sizes.batch_size]
            rows.append([f"{theorem}: {_THEOREMS[theorem][0]}", *settings, *terms, sizes.total, sizes.dominant])
        columns = ["theorem", "eta (lr)", "lambda", "K", "variance term", "feature norm term"]
        caption = (
            f"N = {metric_key(self.plan.n)}, T = {self.plan.steps:,}, eps = {self.plan.eps:g}. "
            "Up to constants, which are 1 here, Cov_N is at most the sum of the terms: sqrt(s2 / (T log N)), B^2 / T "
            "and B / (K log N); for 6.1 sqrt(s2 / T) / log N and B^2 / (T log N)."
        )
        return Table([*columns, "minibatch term", "sum", "largest"], rows, caption)

    def assumptions(self) -> list[str]:
        """What the theorems take for granted, and how far it holds here."""
        variance = (
            "s2 uses the teacher's next-token distributions; the responses are taken to be the teacher's."
            if self.found.has_teacher
            else "s2 needs D's next-token distribution, which the corpus does not tell: the model's own stands in. "
            "The sample form is then too large on average, which errs on the careful side; the expectation form is "
            "what the model itself believes."
        )
        tied = " The head is the input embedding too, which the theorems do not have." if self.tied else ""
        return [
            "The model is log-linear: the output head alone is trained, over hidden states h that stay as they are. "
            f"For training all layers, which changes h, nothing is proved.{tied}",
            f"The data are such a model: some head of norm at most R = {format_number(self.radius)} gives D itself, "
            "and training stays in that ball.",
            "max ||h|| is the largest on this corpus; the theorems take the largest there is.",
            variance,
            "Each step draws a fresh minibatch of D; its gradient is a sum over tokens and a mean over sequences.",
        ]

    def verdict(self) -> str:
        """Whether the theorems say anything here, and what they would need to."""
        name, eps = f"Cov_{metric_key(self.plan.n)}", self.plan.eps
        needed = normalized_step_sizes(self.problem, replace(self.plan, batch_size=None))
        wanted = (
            f"For no term of Theorem 5.1 to exceed {eps:g} it takes T = {needed.steps_needed:.2g} steps with "
            f"minibatches of K = {needed.batch_size:,} sequences."
        )
        useful = [theorem for theorem, sizes in self.sizes.items() if not sizes.is_vacuous]
        if not useful:
            return (
                f"The bounds are vacuous: every sum is at least 1, and {name} is a probability. Of what training will "
                f"reach here the theorems say nothing. In 5.1 the largest term is the {self.normalized.dominant}'s. "
                f"{wanted}"
            )
        return (
            f"With constants of 1 the sum is below 1 for {' and '.join(useful)}: there the bound on {name} may say "
            f"something. The proofs' constants are larger, so this guarantees nothing. {wanted}"
        )

    def practice(self) -> list[str]:
        """What is done with these numbers."""
        first, sweep = self.normalized, self.sweep
        theorem = (
            "As Theorem 5.1 has it, for the head alone: NormalizedSGD(model.get_output_embeddings().parameters(), "
            f"lr={first.lr:.3g}, lam={first.lam:.3g}, radius={self.radius:.4g})"
        )
        if sweep is None:
            return [
                theorem,
                "Practice trains all parameters, and lambda has to be small beside the gradient's norm for steps to "
                "be normalised at all. Measure that norm: --gradient-norms 8.",
            ]
        norm = median(self.gradient_norms)
        closer = ": its steps are closer to plain SGD's than to normalised ones" if first.lam > norm else ""
        return [
            theorem,
            f"The gradient over all parameters has norm {norm:.3g}, the median of {len(self.gradient_norms)} "
            f"minibatches of {self.gradient_batch} sequences ({min(self.gradient_norms):.3g} to "
            f"{max(self.gradient_norms):.3g}). The theorem's lambda is {first.lam / norm:.2g} times that{closer}.",
            "Practice trains all parameters, takes lambda small beside the norm, so that every step is about lr "
            "long, and sweeps lr from the theorem's upwards, judged by Cov_N on held-out rows: lr = "
            f"{', '.join(f'{lr:.2g}' for lr in sweep.lrs)}.",
            f"A start: NormalizedSGD(model.parameters(), lr={sweep.lrs[_START]:.2g}, lam={sweep.lam:.2g}), in the "
            "Trainer with max_grad_norm=0 and SequenceLossMixin, so that the norm is that of the method's gradient.",
        ]

    def facts(self) -> dict[str, Any]:
        """Everything as numbers and text, for JSON."""
        found, problem = self.found, self.problem
        theorems = {
            theorem: {"method": _THEOREMS[theorem][0], **asdict(sizes)}
            | {"sum": sizes.total, "dominant": sizes.dominant, "is_vacuous": sizes.is_vacuous}
            for theorem, sizes in self.sizes.items()
        }
        return {
            "plan": asdict(self.plan),
            "measured": {
                "rows": found.num_rows,
                "tokens_per_response": found.mean_length,
                "max_hidden_norm": found.feature_norm,
                "radius": self.radius,
                "feature_bound": problem.bound,
                "inherent_variance": found.estimate.mean,
                "inherent_variance_form": "expectation" if found.has_teacher else "sample",
                "inherent_variance_interval": found.interval(),
                "inherent_variance_per_token": found.per_token,
                "sample_form": found.sampled._asdict(),
                "expectation_form": found.expected._asdict(),
                "effective_length": problem.effective_length,
                "tied": self.tied,
            },
            "theorems": theorems,
            "gradient_norms": list(self.gradient_norms),
            "gradient_batch_size": self.gradient_batch or None,
            "practice": None if self.sweep is None else self.sweep._asdict(),
            "assumptions": self.assumptions(),
            "verdict": self.verdict(),
        }
