"""Scores of a model as several settings of test-time training make it, in a folder for each."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_coverage.commands.console import is_main_process, say
from hf_coverage.report.provenance import running_command

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from hf_coverage.functional.ttt_config import TTTConfig
    from hf_coverage.measure.reference import Reference

__all__ = ["score_rules"]

_PLAIN = "plain"


def score_rules(
    model: "PreTrainedModel",
    rows: "Dataset",
    rules: Sequence["TTTConfig"],
    reference: "Reference",
    folder: Path,
    *,
    facts: dict[str, Any],
    tokenizer: Any,
    shard_rows: int | None = None,
    **options: Any,
) -> list[list[float]]:
    """Score plain decoding and each rule into a folder of its own; every process of a job calls it.

    Args:
        model: the model.
        rows: the corpus.
        rules: the rules.
        reference: what the corpus knows of its rows.
        folder: where the score folders go.
        facts: what is written beside the scores.
        tokenizer: the model's.
        shard_rows: rows per file; None: more where they are scored in one pass than where token by token.
        options: see `score_responses`.

    Returns:
        Log p(y|x) of all rows, for each rule and then for plain decoding.

    Raises:
        ValueError: if no response is long enough for a step to matter.
    """
    from hf_coverage.measure.reference import write_reference
    from hf_coverage.measure.scoring import score_responses
    from hf_coverage.select.ttt_settings import rule_name

    only_responses = not any(rule.on_prompt for rule in rules)
    found = []
    # Plain decoding comes last: a model whose head cannot make a step is refused before anything is scored.
    for index, rule in enumerate([*rules, None], start=1):
        name = _PLAIN if rule is None else rule_name(rule)
        own = folder / name.replace(", ", "_").replace(" ", "-")
        say(f"{index} of {len(rules) + 1}: {name}")
        usual = 1024 if rule is None or rule.scope == "head" else 16
        options["shard_rows"] = usual if shard_rows is None else shard_rows
        scored = score_responses(
            model, tokenizer, rows, ttt=rule, output_dir=own, progress=is_main_process(), **options
        )
        if is_main_process():
            write_reference(own, reference, {"name": name, "command": running_command()} | facts)
        if only_responses and max(scored["num_tokens"][:]) < 2:
            raise ValueError(
                "every response is one token long, and test-time training changes what comes after it: give longer "
                "responses."
            )
        found.append(scored["logprob"][:])
    return found
