"""Scores of a model as several settings of test-time training make it, in a folder for each."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hf_coverage.commands.console import is_main_process, say
from hf_coverage.report.provenance import running_command

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

    from hf_coverage.functional.ttt_config import TTTConfig
    from hf_coverage.measure.reference import Reference

__all__ = ["score_settings"]


def score_settings(
    model: "PreTrainedModel",
    rows: "Dataset",
    rules: Sequence["TTTConfig"],
    reference: "Reference",
    folder: Path,
    *,
    facts: dict[str, Any],
    tokenizer: Any,
    append_eos: bool,
    **options: Any,
) -> list[NDArray[np.float64]]:
    """Score plain decoding and each rule into a folder of its own; every process of a job calls it.

    Args:
        model: the model.
        rows: the corpus.
        rules: the rules.
        reference: what the corpus knows of its rows.
        folder: where the score folders go.
        facts: what is written beside the scores.
        tokenizer: the model's.
        append_eos: whether the end-of-sequence token is part of every response.
        options: see `score_rules`.

    Returns:
        Log p(y|x) of all rows, for each rule and then for plain decoding.

    Raises:
        ValueError: if no response is long enough for a step to matter.
    """
    from hf_coverage.measure.corpus import encode_corpus
    from hf_coverage.measure.reference import write_reference
    from hf_coverage.measure.scoring import PLAIN, score_rules
    from hf_coverage.select.ttt_settings import rule_name

    if not any(rule.on_prompt for rule in rules):
        encoded = encode_corpus(rows, tokenizer, append_eos=append_eos)
        if max(map(len, encoded.completions)) < 2:
            raise ValueError(
                "every response is one token long, and test-time training changes what comes after it: give longer "
                "responses."
            )
    named = {rule_name(rule): rule for rule in rules}
    folders = {name: name.replace(", ", "_").replace(" ", "-") for name in (PLAIN, *named)}
    # Plain decoding and all that the head does are one reading; each of the others is complete when it is done.
    heads = [name for name, rule in named.items() if rule.scope == "head"]
    readings = ([heads] if heads else []) + [[name] for name in named if name not in heads]
    found: dict[str, NDArray[np.float64]] = {}
    for index, names in enumerate(readings, start=1):
        say(f"{index} of {len(readings)}: {'; '.join(names if index > 1 else [PLAIN, *names])}")
        scores = score_rules(
            model,
            tokenizer,
            rows,
            {folders[name]: named[name] for name in names},
            append_eos=append_eos,
            output_dir=folder,
            progress=is_main_process(),
            **options,
        )
        for name in (PLAIN, *names):
            found[name] = scores[folders[name]].logprob
            if is_main_process():
                write_reference(
                    folder / folders[name], reference, {"name": name, "command": running_command()} | facts
                )
    return [found[name] for name in (*named, PLAIN)]
