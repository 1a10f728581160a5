"""Measure whether a language model still covers the good responses: the coverage profile Cov_N for `transformers`.

The public names are loaded on first use, so that `import hf_coverage` imports neither torch nor transformers.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_coverage.decode.backtracking import GuidedResponses, ValueGuidedDecoder
    from hf_coverage.decode.best_of_n import evaluate_best_of_n, judge_best_of_n
    from hf_coverage.decode.best_of_n_result import BestOfNResult
    from hf_coverage.decode.exploration import ExplorationReward, response_features, select_diverse
    from hf_coverage.decode.pass_at_k_reward import PassAtKReward
    from hf_coverage.decode.prefix_walkers import CallBudget
    from hf_coverage.decode.stratified import StratifiedSamplingMixin, stratified_generate
    from hf_coverage.decode.success import SuccessProfile
    from hf_coverage.decode.success_callback import SuccessCallback
    from hf_coverage.functional.ttt_config import StepRule, TTTConfig
    from hf_coverage.inference.remote import RemoteModel
    from hf_coverage.measure.answers import score_answers
    from hf_coverage.measure.builders import sample_corpus, single_answer_corpus, teacher_scored_corpus, windows_corpus
    from hf_coverage.measure.callback import CoverageCallback, CoverageWarning
    from hf_coverage.measure.inherent_variance import InherentVariance, measure_inherent_variance
    from hf_coverage.measure.profile import CoverageProfile
    from hf_coverage.measure.score_table import ScoreTable
    from hf_coverage.measure.scoring import score_responses, score_rules
    from hf_coverage.optim.distillation import DistillationMixin
    from hf_coverage.optim.groups import layer_groups
    from hf_coverage.optim.normalized import NormalizedGradient
    from hf_coverage.optim.objectives import CoverageLoss, log_linear_n
    from hf_coverage.optim.sgd import NormalizedSGD
    from hf_coverage.optim.token_level import token_level_sgd
    from hf_coverage.optim.trainer import SequenceLossMixin, normalized_optimizer
    from hf_coverage.report.card import write_model_card
    from hf_coverage.report.html import write_html_report
    from hf_coverage.select.callback import TournamentCallback
    from hf_coverage.select.choose import Choice, choose
    from hf_coverage.select.predictiveness import PredictivenessResult, predictiveness
    from hf_coverage.select.result import TournamentResult
    from hf_coverage.select.tournament import tournament
    from hf_coverage.select.ttt_choice import TTTChoice
    from hf_coverage.select.ttt_settings import ttt_grid
    from hf_coverage.select.ttt_step_size import measure_step_size
    from hf_coverage.select.tune_ttt import tune_ttt
    from hf_coverage.ttt.generate import ttt_generate
    from hf_coverage.ttt.mixin import TestTimeTrainingMixin
    from hf_coverage.ttt.processor import TTTLogitsProcessor

__version__ = "0.1.0"

_HOMES = {
    "BestOfNResult": "decode.best_of_n_result",
    "CallBudget": "decode.prefix_walkers",
    "Choice": "select.choose",
    "CoverageCallback": "measure.callback",
    "CoverageLoss": "optim.objectives",
    "CoverageProfile": "measure.profile",
    "CoverageWarning": "measure.callback",
    "DistillationMixin": "optim.distillation",
    "ExplorationReward": "decode.exploration",
    "GuidedResponses": "decode.backtracking",
    "InherentVariance": "measure.inherent_variance",
    "NormalizedGradient": "optim.normalized",
    "NormalizedSGD": "optim.sgd",
    "PassAtKReward": "decode.pass_at_k_reward",
    "PredictivenessResult": "select.predictiveness",
    "RemoteModel": "inference.remote",
    "ScoreTable": "measure.score_table",
    "SequenceLossMixin": "optim.trainer",
    "StepRule": "functional.ttt_config",
    "StratifiedSamplingMixin": "decode.stratified",
    "SuccessCallback": "decode.success_callback",
    "SuccessProfile": "decode.success",
    "TTTChoice": "select.ttt_choice",
    "TTTConfig": "functional.ttt_config",
    "TTTLogitsProcessor": "ttt.processor",
    "TestTimeTrainingMixin": "ttt.mixin",
    "TournamentCallback": "select.callback",
    "TournamentResult": "select.result",
    "ValueGuidedDecoder": "decode.backtracking",
    "choose": "select.choose",
    "evaluate_best_of_n": "decode.best_of_n",
    "judge_best_of_n": "decode.best_of_n",
    "layer_groups": "optim.groups",
    "log_linear_n": "optim.objectives",
    "measure_inherent_variance": "measure.inherent_variance",
    "measure_step_size": "select.ttt_step_size",
    "normalized_optimizer": "optim.trainer",
    "predictiveness": "select.predictiveness",
    "response_features": "decode.exploration",
    "sample_corpus": "measure.builders",
    "score_answers": "measure.answers",
    "score_responses": "measure.scoring",
    "score_rules": "measure.scoring",
    "select_diverse": "decode.exploration",
    "single_answer_corpus": "measure.builders",
    "stratified_generate": "decode.stratified",
    "teacher_scored_corpus": "measure.builders",
    "token_level_sgd": "optim.token_level",
    "tournament": "select.tournament",
    "ttt_generate": "ttt.generate",
    "ttt_grid": "select.ttt_settings",
    "tune_ttt": "select.tune_ttt",
    "windows_corpus": "measure.builders",
    "write_html_report": "report.html",
    "write_model_card": "report.card",
}

__all__ = [
    "BestOfNResult",
    "CallBudget",
    "Choice",
    "CoverageCallback",
    "CoverageLoss",
    "CoverageProfile",
    "CoverageWarning",
    "DistillationMixin",
    "ExplorationReward",
    "GuidedResponses",
    "InherentVariance",
    "NormalizedGradient",
    "NormalizedSGD",
    "PassAtKReward",
    "PredictivenessResult",
    "RemoteModel",
    "ScoreTable",
    "SequenceLossMixin",
    "StepRule",
    "StratifiedSamplingMixin",
    "SuccessCallback",
    "SuccessProfile",
    "TTTChoice",
    "TTTConfig",
    "TTTLogitsProcessor",
    "TestTimeTrainingMixin",
    "TournamentCallback",
    "TournamentResult",
    "ValueGuidedDecoder",
    "choose",
    "evaluate_best_of_n",
    "evaluate_module",
    "generate_module",
    "judge_best_of_n",
    "layer_groups",
    "log_linear_n",
    "measure_inherent_variance",
    "measure_step_size",
    "normalized_optimizer",
    "predictiveness",
    "response_features",
    "sample_corpus",
    "score_answers",
    "score_responses",
    "score_rules",
    "select_diverse",
    "single_answer_corpus",
    "stratified_generate",
    "teacher_scored_corpus",
    "token_level_sgd",
    "tournament",
    "ttt_generate",
    "ttt_grid",
    "tune_ttt",
    "windows_corpus",
    "write_html_report",
    "write_model_card",
]


def evaluate_module(name: str) -> str:
    """Folder of an `evaluate` module of this package, for `evaluate.load`.

    Args:
        name: `"coverage"` (a metric) or `"coverage_comparison"` (a comparison of two models).

    Returns:
        The folder's path.

    Raises:
        ValueError: If there is no module of that name.

    Example:
        >>> Path(evaluate_module("coverage")).name
        'coverage'
    """
    return _folder("evaluate_modules", name)


def generate_module(name: str) -> str:
    """Folder of a decoding method of this package, for `generate(custom_generate=...)` or to be pushed to the Hub.

    Args:
        name: `"stratified_sampling"` or `"test_time_training"`.

    Returns:
        The folder's path; `generate` asks for `trust_remote_code=True` beside it.

    Raises:
        ValueError: If there is no method of that name.

    Example:
        >>> Path(generate_module("test_time_training")).name
        'test_time_training'
    """
    return _folder("generate_modules", name)


def _folder(kind: str, name: str) -> str:
    modules = Path(__file__).parent / kind
    names = sorted(folder.name for folder in modules.iterdir() if (folder / "README.md").is_file())
    if name not in names:
        raise ValueError(f"`name` must be one of {', '.join(names)}, but is {name!r}.")
    return str(modules / name)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
