"""Tasks of lm-evaluation-harness as rows of prompts and responses: what it would ask, and what it would score."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

__all__ = ["TaskOptions", "task_rows"]

_SCORED = ("multiple_choice", "loglikelihood")
"""Kinds of tasks in which the harness itself scores a response."""


class TaskOptions(NamedTuple):
    """How a task's prompts are written.

    Attributes:
        num_fewshot: Examples before each question; None for the task's own number.
        target: Field of a document that is its response; None for the task's target.
        include_path: Folder of further tasks.
        system_prompt: What comes first.
        chat: Whether the prompt is rendered by the tokenizer's chat template.
        multiturn: Whether examples are turns of the chat.
        limit: How many documents.
        seed: Of the choice of examples.
    """

    num_fewshot: int | None = None
    target: str | None = None
    include_path: str | None = None
    system_prompt: str | None = None
    chat: bool = False
    multiturn: bool = False
    limit: int | None = None
    seed: int = 0


def task_rows(name: str, options: TaskOptions, tokenizer: PreTrainedTokenizerBase | None = None) -> Dataset:
    """The prompts of a task as the harness writes them, each with its response.

    Where the harness scores responses (multiple choice), it is the right one, the very text that is scored. Where it
    lets a model write, it is the field that is named, or else the task's target, if the task itself counts that as a
    right response: a bare answer where a solution is asked for, or test code, is none.

    Args:
        name: The task's name.
        options: How its prompts are written.
        tokenizer: Renders chats.

    Returns:
        Dataset with `prompt`, `completion` and `doc_id`.

    Raises:
        ValueError: If there is no such task, it has no responses, or its target is none.
    """
    from datasets import Dataset

    task = _load(name, options.include_path)
    kind = task.OUTPUT_TYPE
    if kind not in (*_SCORED, "generate_until"):
        raise ValueError(f"`--from lm-eval:{name}` has no prompts and responses: it is a {kind} task.")
    if options.num_fewshot is not None:
        task.set_config("num_fewshot", options.num_fewshot)
    task.set_fewshot_seed(options.seed)
    task.build_all_requests(
        limit=options.limit,
        rank=0,
        world_size=1,
        system_instruction=options.system_prompt,
        apply_chat_template=options.chat,
        fewshot_as_multiturn=options.multiturn,
        chat_template=_renderer(tokenizer) if options.chat else None,
    )
    delimiter = "" if options.chat else task.config.target_delimiter
    rows: list[dict[str, Any]] = []
    for instance in task.instances:
        if kind == "multiple_choice" and instance.idx != _right(task, instance.doc):
            continue
        if options.target is not None:
            completion = delimiter + _field(name, instance.doc, options.target)
        elif kind in _SCORED:
            completion = instance.args[1]
        else:
            completion = delimiter + _target(name, task, instance)
        rows.append({"prompt": instance.args[0], "completion": completion, "doc_id": instance.doc_id})
    return Dataset.from_list(rows)


def _load(name: str, include_path: str | None) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("tasks of lm-evaluation-harness need it: pip install 'lm-eval>=0.4.9'") from error
    manager = TaskManager(include_path=include_path)
    if name not in manager.all_tasks:
        raise ValueError(
            f"`--from lm-eval:{name}`: the harness knows no such task; `lm-eval ls tasks` lists those that it knows, "
            "and `--include-path` adds a folder of them."
        )
    tasks = manager.load([name])["tasks"]
    if list(tasks) != [name]:
        raise ValueError(f"`--from lm-eval:{name}` is a group: give one of its tasks, {', '.join(sorted(tasks)[:8])}.")
    return tasks[name]


def _renderer(tokenizer: PreTrainedTokenizerBase | None) -> Callable[..., str]:
    """The chat template as the harness calls it."""
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError(
            "`--apply-chat-template` needs a tokenizer with a chat template: give one with `--tokenizer`."
        )

    def render(chat: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return tokenizer.apply_chat_template(
            chat,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    return render


def _right(task: Any, doc: dict[str, Any]) -> int:
    """Which of the choices of a document is right."""
    found = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(found, str):
        found = task.doc_to_choice(doc).index(found)
    if not isinstance(found, int):
        raise ValueError(f"several choices of a document are right ({found!r}), so it has no one response.")
    return found


def _field(name: str, doc: dict[str, Any], field: str) -> str:
    found = doc.get(field)
    if not isinstance(found, str):
        raise ValueError(
            f"`--target` must be a field of text of {name}'s documents, whose fields are {sorted(doc)}, but is "
            f"{field!r}."
        )
    return found


def _target(name: str, task: Any, instance: Any) -> str:
    target = task.doc_to_target(instance.doc)
    fault = _fault(task, instance, target)
    if fault is not None:
        raise ValueError(
            f"`--from lm-eval:{name}`: the target of a document is {str(target)[:60]!r}, which is no response to its "
            f"prompt: {fault}. Name the field that is one with `--target`, one of {sorted(instance.doc)}."
        )
    return target


def _fault(task: Any, instance: Any, target: Any) -> str | None:
    """Why a target is no response; None where the task counts it as right when a model writes it."""
    if not isinstance(target, str):
        return "it is no text"
    if task.config.unsafe_code:
        return "the task runs code, of which it is a part"
    instance.resps = [target]
    task._instances, every = [instance], task._instances
    try:
        task.apply_filters()
        verdicts = [task.process_results(instance.doc, [found]) for found in instance.filtered_resps.values()]
    except Exception as error:  # whatever a task's own code raises on what it was not made for
        return f"the task cannot judge it ({type(error).__name__}: {error})"
    finally:
        task._instances = every
    if any(isinstance(value, int | float) and value >= 1 for found in verdicts for value in found.values()):
        return None
    return "the task itself does not count it as right"
