"""Pure functions on tensors and arrays: no state, no files, no Hugging Face.

All public names of the modules are here too. A module is loaded when the first of its names is used, so that
`import hf_coverage.functional` imports neither torch nor scipy. No module has the name of one of its functions:
`from hf_coverage.functional import coverage` is the function, whatever was imported before.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_coverage.functional.adaptive_choice import *
    from hf_coverage.functional.arithmetic_codes import *
    from hf_coverage.functional.best_of_n import *
    from hf_coverage.functional.binomial_mixture import *
    from hf_coverage.functional.bounds import *
    from hf_coverage.functional.checks import *
    from hf_coverage.functional.choice import *
    from hf_coverage.functional.coverage_profile import *
    from hf_coverage.functional.coverage_watch import *
    from hf_coverage.functional.distillation import *
    from hf_coverage.functional.exploration import *
    from hf_coverage.functional.fast_weights import *
    from hf_coverage.functional.gradients import *
    from hf_coverage.functional.group_rewards import *
    from hf_coverage.functional.head_training import *
    from hf_coverage.functional.logprobs import *
    from hf_coverage.functional.miss_profile import *
    from hf_coverage.functional.monte_carlo import *
    from hf_coverage.functional.objectives import *
    from hf_coverage.functional.paired import *
    from hf_coverage.functional.predictiveness import *
    from hf_coverage.functional.prefix_tree import *
    from hf_coverage.functional.random_walk import *
    from hf_coverage.functional.row_steps import *
    from hf_coverage.functional.statistics import *
    from hf_coverage.functional.step_sizes import *
    from hf_coverage.functional.tournament import *
    from hf_coverage.functional.tournament_challenges import *
    from hf_coverage.functional.tournament_guarantee import *
    from hf_coverage.functional.tournament_racing import *
    from hf_coverage.functional.tournament_soft import *
    from hf_coverage.functional.tournament_standing import *
    from hf_coverage.functional.ttt_config import *

_HOMES = {
    "adaptive_choice": (
        "Evidence",
        "LossRace",
        "comparable_means",
        "gather_evidence",
        "prompt_order",
        "race_by_loss",
        "shown_within",
    ),
    "arithmetic_codes": (
        "CodeState",
        "Decoded",
        "TokenParts",
        "check_intervals",
        "decode_token",
        "nested_codes",
        "response_intervals",
        "stratified_codes",
        "stratified_pass_probabilities",
        "token_parts",
    ),
    "best_of_n": (
        "best_of_blocks",
        "best_of_n_reward",
        "pass_at_n",
    ),
    "binomial_mixture": (
        "BetaLaw",
        "PowerLaw",
        "SuccessLaw",
        "check_counts",
        "fit_beta_law",
        "fit_power_law",
        "fit_success_law",
        "success_range",
    ),
    "bounds": (
        "BestOfNBudget",
        "best_of_n_budget",
        "best_of_n_regret_bound",
        "best_of_n_regret_floor",
        "chain_rule_bound",
        "coverage_bound_from_hellinger",
        "coverage_bound_from_kl",
        "coverage_bound_from_stopped_kl",
        "exact_pass_at_n",
        "kl_bound_from_coverage",
        "largest_coverage_rate",
        "least_regret_bound",
        "pass_probabilities",
        "squared_hellinger",
    ),
    "checks": (
        "ROUNDING",
        "TIE_TOLERANCE",
        "FloatArray",
        "IntArray",
        "ReferenceKind",
        "check_confidence",
        "check_count",
        "check_log_ratios",
        "check_logprobs",
        "check_n",
        "check_regret",
        "coverage_key",
        "metric_key",
        "miss_key",
    ),
    "choice": (
        "Decision",
        "check_losses",
        "decide",
    ),
    "coverage_profile": (
        "coverage",
        "coverage_interval",
        "log_ratios",
        "reached",
        "smallest_n",
        "stopped_kl",
    ),
    "coverage_watch": (
        "BestEvaluation",
        "WatchState",
        "Worsening",
        "prompts_to_warn",
        "update_watch",
    ),
    "distillation": (
        "TokenRows",
        "distillation_losses",
    ),
    "exploration": (
        "elliptical_bonus",
        "elliptical_selection",
        "sparse_projection",
    ),
    "fast_weights": (
        "Cut",
        "FastWeights",
        "fast_error_bound",
        "fast_logits",
        "fast_step",
        "grow_fast_weights",
        "new_fast_weights",
    ),
    "gradients": (
        "global_norm",
        "local_tensor",
        "normalize_",
        "normalize_coordinates_",
        "project_",
        "stable_norm",
        "tensor_norms",
    ),
    "group_rewards": (
        "GroupSignal",
        "equal_reward_probability",
        "group_signal",
        "pass_at_k_rewards",
    ),
    "head_training": (
        "POSITIONS",
        "adapt_head",
        "apply_fast_weights",
        "branch_fast_weights",
        "follow_tokens",
        "squared_head_norm",
    ),
    "logprobs": (
        "collision_probability",
        "linear_head_logprobs",
        "log_softmax",
        "logsumexp",
        "sequence_logprobs",
        "token_kl",
        "token_logprobs",
    ),
    "miss_profile": (
        "SampleBudget",
        "coverage_bound_from_miss",
        "miss",
        "miss_bound_from_coverage",
        "miss_interval",
        "miss_upper_bound",
        "miss_values",
        "sample_budget",
    ),
    "monte_carlo": ("log_mean_exp",),
    "objectives": (
        "coverage_loss",
        "coverage_loss_factor",
        "distillation_weights",
    ),
    "paired": (
        "PairedDifference",
        "paired_coverage_difference",
        "paired_kl_difference",
        "paired_loss_difference",
        "paired_miss_difference",
        "rows_to_tell_apart",
    ),
    "predictiveness": (
        "RankCorrelations",
        "rank_correlations",
    ),
    "prefix_tree": (
        "Prefix",
        "PrefixTree",
        "check_values",
        "leaf_law",
        "leaf_target",
        "total_variation",
    ),
    "random_walk": (
        "Judged",
        "guided_law",
        "guided_probabilities",
        "metropolis_acceptance",
        "output_law",
        "stationary_law",
        "transition_matrix",
        "visit_law",
        "walk_probabilities",
    ),
    "row_steps": (
        "row_norms",
        "step_rows_",
    ),
    "statistics": (
        "MeanEstimate",
        "bounded_mean_interval",
        "bounded_mean_p_value",
        "bounded_mean_upper_bound",
        "clustered_mean",
        "group_codes",
        "holm_p_values",
        "mean_interval",
        "proportion_interval",
        "row_weights",
    ),
    "step_sizes": (
        "LinearProblem",
        "NormalizedStepSizes",
        "PracticalSweep",
        "StepSizes",
        "TrainingPlan",
        "distillation_step_sizes",
        "normalized_step_sizes",
        "practical_sweep",
        "token_level_step_sizes",
    ),
    "tournament": (
        "OnPolicy",
        "challenge_rates",
        "hold_tournament",
        "separating_n",
    ),
    "tournament_challenges": (
        "ChallengeCounts",
        "RowLayout",
        "count_challenges",
        "row_layout",
    ),
    "tournament_guarantee": (
        "offset_guarantee",
        "simple_guarantee",
        "soft_guarantee",
    ),
    "tournament_racing": (
        "Race",
        "race",
    ),
    "tournament_soft": (
        "envelope",
        "envelope_losses",
        "hold_soft_tournament",
        "soft_challenge_rates",
        "soft_losses",
    ),
    "tournament_standing": (
        "Rates",
        "Standing",
        "Tally",
        "TieBreak",
        "stand",
    ),
    "ttt_config": (
        "LORA_RANK",
        "Center",
        "StepRule",
        "TTTCache",
        "TTTConfig",
        "TTTScope",
        "is_count",
    ),
}

_MODULES = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
