"""Tasks of `reasoning_gym` as corpora with one right answer a prompt, and their own verifiers."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import reasoning_gym
from datasets import Dataset

from hf_coverage import single_answer_corpus

__all__ = ["Entry", "draw_entries", "entry_corpus", "prompt_of"]

Entry = dict[str, Any]
"""A question, its answer and its metadata, as `reasoning_gym` gives them and wants them back for scoring."""


def draw_entries(task: Mapping[str, Any], rows: int, *, seed: int, besides: Iterable[Entry] = ()) -> list[Entry]:
    """Draw distinct questions of a task.

    Args:
        task: `name` of the task and its options, for `reasoning_gym.create_dataset`.
        rows: how many.
        seed: of the task's generator.
        besides: entries whose questions must not come again.

    Raises:
        ValueError: if the task has too few different questions.
    """
    taken = {entry["question"] for entry in besides}
    entries: list[Entry] = []
    tries = 20 * rows
    for entry in reasoning_gym.create_dataset(**task, size=tries, seed=seed):
        if entry["question"] not in taken:
            taken.add(entry["question"])
            entries.append(entry)
        if len(entries) == rows:
            return entries
    raise ValueError(f"{task['name']} gave {len(entries)} new questions in {tries} tries: ask for fewer `rows`.")


def entry_corpus(entries: Sequence[Entry]) -> Dataset:
    """Make the corpus of plain prompts and right answers; `append_eos=True` belongs to it wherever it is encoded.

    The columns `answer` and `metadata` are what the task's own verifier wants.
    """
    prompts = [prompt_of(entry) for entry in entries]
    corpus = single_answer_corpus(prompts, [f" {entry['answer']}" for entry in entries])
    corpus = corpus.add_column("answer", [entry["answer"] for entry in entries])
    return corpus.add_column("metadata", [json.dumps(entry["metadata"]) for entry in entries])


def prompt_of(entry: Entry) -> str:
    """What the model is given."""
    return f"{entry['question']}\nAnswer:"
