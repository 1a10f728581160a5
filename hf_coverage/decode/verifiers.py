"""Verifiers: callables that say what a response is worth.

The protocol is that of TRL's reward functions, `verifier(prompts=..., completions=..., **columns) -> list[float]`, so
those of `GRPOTrainer` work as they are. `prompts`, `completions` and `completion_ids` are lists with one entry a
response, and so is each column of the corpus. Text prompts have text completions; chat prompts have completions that
are one assistant message in a list; prompts of token ids have lists of token ids. A function gets what its signature
names, or everything where it takes `**kwargs`.

What follows are verifiers ready to use. This module is imported in the process that verifiers run in: it is light.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import math
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_coverage import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "ExactMatch",
    "MathVerify",
    "ReasoningGym",
    "RewardModel",
    "Verifier",
    "completion_text",
    "is_harmless",
    "named_verifier",
    "nothing_evaluated",
]


class Verifier(ABC):
    """A verifier that comes with the package; your own can be any callable.

    Attributes:
        name: What it is called in tables and folders.
        columns: Columns of the corpus that it reads.
        runs_here: Whether it runs in this process, in batches, and not in a worker.
    """

    name: str
    columns: tuple[str, ...] = ()
    runs_here = False

    @abstractmethod
    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float]:
        """One reward a response."""

    def right_responses(self, **columns: Sequence[Any]) -> list[str]:
        """Text that has to get 1, one for each row of these columns: it is judged before anything is sampled.

        Where an answer of the corpus is not right by itself, no response can be. None are known by default.
        """
        return []

    def key(self) -> list[Any]:
        """What decides the verdicts of a verifier of this package, JSON-serialisable; others are hashed as they are.

        Here the class's source and its settings: a change elsewhere that changes verdicts has to change the class.
        """
        return [inspect.getsource(type(self)), vars(self)]


class ExactMatch(Verifier):
    """1 where a response is the right answer, whitespace around both aside; token ids are compared as they are.

    Args:
        column: the column that holds the answer.

    Example:
        >>> ExactMatch()(completions=[" 12", "13"], answer=["12", "12"])
        [1.0, 0.0]
    """

    name = "exact-match"
    runs_here = True

    def __init__(self, column: str = "answer") -> None:
        self.columns = (column,)

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float]:
        """1 or 0 a response."""
        answers = columns[self.columns[0]]
        return [float(_comparable(given) == _comparable(right)) for given, right in zip(completions, answers)]


class MathVerify(Verifier):
    r"""1 where a response's final answer is mathematically equal to the corpus's: 1/2 is 0.5 and \frac{1}{2}.

    Answers are read whole or not at all (see `mathematics`), and `math-verify` compares them. An answer of the corpus
    that cannot be read, or is not equal to itself, is refused before anything is sampled.

    There is no time limit within: run it with a `timeout`, since the library's own signals only work in a main thread
    and do not stop a loop in C.

    Args:
        column: The column that holds the answer: LaTeX, a plain expression or a number, alone, in `\boxed{}`, or
            behind `####`.

    Raises:
        ImportError: If `math-verify` is not installed.
    """

    name = "math-verify"

    def __init__(self, column: str = "answer") -> None:
        try:
            importlib.import_module("math_verify")
            from hf_coverage.decode import mathematics
        except ImportError as error:
            raise ImportError("`MathVerify` needs math-verify: `pip install math-verify`.") from error
        self.columns = (column,)
        self._mathematics = mathematics
        # Samples of one prompt share few answers, and SymPy takes hundredths of a second to compare two.
        self._agree = functools.lru_cache(maxsize=1024)(mathematics.answers_agree)

    def __reduce__(self) -> Any:
        return type(self), self.columns

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float]:
        """1 or 0 a response.

        Raises:
            ValueError: If an answer of the corpus is no mathematics.
        """
        return [self._compare(*pair) for pair in zip(completions, columns[self.columns[0]])]

    def right_responses(self, **columns: Sequence[Any]) -> list[str]:
        """The answers themselves."""
        return [rf"\boxed{{{self._mathematics.gold_answer(str(answer))}}}" for answer in columns[self.columns[0]]]

    def key(self) -> list[Any]:
        """How answers are read, and the versions of what compares them."""
        used = _versions("math-verify", "latex2sympy2-extended", "sympy")
        return [inspect.getsource(self._mathematics), self.columns, used]

    def _compare(self, completion: Any, answer: Any) -> float:
        gold = self._mathematics.gold_answer(str(answer))
        known = isinstance(answer, str) or (isinstance(answer, (int, float)) and math.isfinite(answer))
        if not (known and self._mathematics.readings(gold)):
            raise ValueError(f"the answer {answer!r} of the corpus cannot be read as mathematics")
        given = self._mathematics.final_answers(completion_text(completion))
        return float(any(self._agree(gold, piece) for piece in given))


class ReasoningGym(Verifier):
    r"""The score that a `reasoning_gym` task gives a response itself, in [0, 1], 1 being right.

    Some tasks of reasoning_gym evaluate the response as Python, a few of them by `eval`. Text is never executed here:
    for such tasks a response that is neither a literal nor a plain arithmetic expression is scored while nothing can
    be evaluated, which makes it a wrong one.

    Args:
        task: The task's name, such as `"spell_backward"`.
        tag: The answer is what stands in the last `<tag>...</tag>` of the response, and a response without has none;
            None: the whole response, stripped.
        config: The task's own settings, where scoring depends on them.

    The corpus needs the columns `answer` and `metadata` of the task's entries; `metadata` may be JSON text, which
    keeps what a table cannot hold: `json.dumps(entry["metadata"])`. Tuples and integer keys, which neither keeps, are
    made again where an entry of the task itself has them. A corpus whose own answers are not right by the task is
    refused before anything is sampled.

    Raises:
        ImportError: If `reasoning-gym` is not installed.
        ValueError: If there is no such task.
    """

    columns = ("answer", "metadata")

    def __init__(self, task: str, *, tag: str | None = None, **config: Any) -> None:
        try:
            import reasoning_gym
        except ImportError as error:
            raise ImportError("`ReasoningGym` needs reasoning-gym: `pip install reasoning-gym`.") from error
        self.name = f"reasoning-gym:{task}"
        self._made_of = task, tag, config
        self._tag = tag
        self._dataset = reasoning_gym.create_dataset(task, size=1, seed=0, **config)
        self._example = self._dataset[0]
        # What the installed version does, and not a list of what some version did.
        scorer = inspect.getsource(type(self._dataset).score_answer)
        self._evaluates = re.search(r"\b(eval|exec|parse_expr|sympify)\(", scorer) is not None

    def __reduce__(self) -> Any:
        task, tag, config = self._made_of
        return functools.partial(type(self), tag=tag, **config), (task,)

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float]:
        """The task's score a response."""
        entries = [
            {"answer": right, "metadata": self._metadata(facts)}
            for right, facts in zip(columns["answer"], columns["metadata"])
        ]
        return [float(self._score(given, entry)) for given, entry in zip(completions, entries)]

    def right_responses(self, **columns: Sequence[Any]) -> list[str]:
        """The tasks' own answers; none where the task has none, or does not give its own 1."""
        own = self._example["answer"]
        if not isinstance(own, str) or self._dataset.score_answer(own, self._example) != 1:
            return []
        before, after = ("", "") if self._tag is None else (f"<{self._tag}>", f"</{self._tag}>")
        return [f"{before}{answer}{after}" for answer in columns["answer"]]

    def key(self) -> list[Any]:
        """Task, tag, the task's settings, and the version of the package that scores."""
        return [*self._made_of, _versions("reasoning-gym")]

    def _metadata(self, facts: Any) -> Any:
        facts = json.loads(facts) if isinstance(facts, str) else facts
        return _with_types_of(self._example["metadata"], facts)

    def _score(self, completion: Any, entry: dict[str, Any]) -> float:
        text: str | None = completion_text(completion).strip()
        if self._tag is not None:
            found = re.findall(f"<{re.escape(self._tag)}>(.*?)</{re.escape(self._tag)}>", text or "", re.DOTALL)
            text = found[-1].strip() if found else None
        if not self._evaluates or text is None or is_harmless(text):
            return self._dataset.score_answer(text, entry)
        with nothing_evaluated():
            return self._dataset.score_answer(text, entry)


class RewardModel(Verifier):
    """The scalar that a reward model gives to prompt and response: a sequence classifier with one label.

    Text is joined, chat messages pass through the reward model's own chat template, as TRL does it.

    Args:
        model: Folder, Hub id, or the model; it stays on its device.
        tokenizer: Its tokenizer; None loads it from the same folder or id.
        device: Where to put a model that is loaded; None: an accelerator if there is one.

    Raises:
        TypeError: If a model comes without its tokenizer.
        ValueError: If it has more than one label, or no trained head.
    """

    name = "reward-model"
    columns = ("prompts",)
    runs_here = True

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        device: str | None = None,
    ) -> None:
        if isinstance(model, str):
            self.model, self.tokenizer = _load_reward_model(model, tokenizer, device)
        elif tokenizer is None:
            raise TypeError("`tokenizer` must be given with a model that is loaded already.")
        else:
            self.model, self.tokenizer = model.eval(), tokenizer
        if self.model.config.num_labels != 1:
            raise ValueError(f"A reward model has one label, but this one has {self.model.config.num_labels}.")

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float]:
        """The logit of each response."""
        import torch

        texts = [self._text(prompt, completion) for prompt, completion in zip(columns["prompts"], completions)]
        rows = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        length = max(map(len, rows))
        # The classifier reads the last token before the padding, so both must agree on what padding is.
        pad = self.model.config.get_text_config().pad_token_id
        if pad is None and len(rows) > 1:
            return [reward for row in zip(columns["prompts"], completions) for reward in self._alone(*row)]
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows], device=self.model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=self.model.device)
        with torch.inference_mode():
            return self.model(input_ids=ids, attention_mask=mask).logits[:, 0].float().tolist()

    def key(self) -> list[Any]:
        """Fingerprints of the model and its tokenizer, and the version of what runs them."""
        from hf_coverage.inference.fingerprint import config_fingerprint, tokenizer_fingerprint, weight_fingerprint

        model = [weight_fingerprint(self.model), config_fingerprint(self.model), str(self.model.dtype)]
        return [*model, tokenizer_fingerprint(self.tokenizer), _versions("torch", "transformers")]

    def _alone(self, prompt: Any, completion: Any) -> list[float]:
        return self([completion], prompts=[prompt])

    def _text(self, prompt: Any, completion: Any) -> str:
        if isinstance(prompt, str) and isinstance(completion, str):
            return prompt + completion
        if isinstance(prompt[0], dict):
            return str(self.tokenizer.apply_chat_template([*prompt, *completion], tokenize=False))
        raise TypeError("a reward model reads text or chat messages, and the corpus holds token ids")


def completion_text(completion: Any) -> str:
    """The text of a completion: itself, or what its one chat message says.

    Raises:
        TypeError: For token ids.

    Example:
        >>> completion_text([{"role": "assistant", "content": "12"}])
        '12'
    """
    if isinstance(completion, list) and completion and isinstance(completion[-1], dict):
        completion = completion[-1]["content"]
    if not isinstance(completion, str):
        raise TypeError("this verifier reads text, and the corpus holds token ids; give its prompts as text")
    return completion


def _with_types_of(example: Any, value: Any) -> Any:
    """The value with the tuples and the integer keys that an example of its kind has, at every depth."""
    if isinstance(example, (list, tuple)) and isinstance(value, (list, tuple)):
        # Entries at one place are alike in a tuple, and all are in a list, whose length may be another.
        models = example if len(example) == len(value) else [example[0]] * len(value) if example else value
        return type(example)(_with_types_of(*pair) for pair in zip(models, value))
    if not (isinstance(example, dict) and isinstance(value, dict) and example):
        return value
    if all(isinstance(key, int) for key in example):
        model = next(iter(example.values()))
        # A table gives every row the keys of all rows, and None where a row had none.
        return {int(key): _with_types_of(model, item) for key, item in value.items() if item is not None}
    return {key: _with_types_of(example[key], item) if key in example else item for key, item in value.items()}


def _comparable(completion: Any) -> Any:
    if isinstance(completion, list) and not (completion and isinstance(completion[-1], dict)):
        return completion
    return completion_text(completion).strip()


def _versions(*packages: str) -> dict[str, str]:
    return {"hf-coverage": __version__} | {package: metadata.version(package) for package in packages}


def _load_reward_model(name: str, tokenizer: Any, device: str | None) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, facts = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1, output_loading_info=True)
    if facts["missing_keys"]:
        raise ValueError(
            f"{name} is no reward model: it has no weights for {', '.join(sorted(facts['missing_keys']))}."
        )
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.to(device or accelerator).eval(), tokenizer or AutoTokenizer.from_pretrained(name)


# The last line as SymPy writes what has no elementary form.
_FUNCTIONS = re.compile(
    "a?(sin|cos|tan)h?|cot|sec|csc|exp|log|ln|sqrt|pi|"
    "Integral|Derivative|Abs|sign|erfc?|erfi|gamma|lowergamma|uppergamma|Si|Ci|Ei|li|expint"
)
_guard = {"on": False}


def is_harmless(text: str) -> bool:
    """Whether evaluating a text can do nothing but compute: a Python literal, or arithmetic with one-letter variables.

    Example:
        >>> is_harmless("[['1', '2'], []]"), is_harmless("(3 + x)**2 / sqrt(2)"), is_harmless("exec(chr(49))")
        (True, True, False)
    """
    try:
        ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        names = re.findall(r"[^\W\d]\w*", text)
        return (
            re.fullmatch(r"[\w\s+\-*/^(),.]*", text, re.ASCII) is not None
            and "_" not in text
            and re.search(r"\.\s*[^\W\d]", text) is None  # an attribute
            and all(len(name) == 1 or _FUNCTIONS.fullmatch(name) for name in names)
        )
    return True


@contextmanager
def nothing_evaluated() -> Iterator[None]:
    """Let every attempt to execute code from text fail, by whatever name it is called.

    Example:
        >>> with nothing_evaluated():
        ...     eval("1 + 1")
        Traceback (most recent call last):
            ...
        PermissionError: A response was about to be executed as Python, which is not allowed.
    """
    _install()
    _guard["on"] = True
    try:
        yield
    finally:
        _guard["on"] = False


@cache
def _install() -> None:
    # An audit hook sees `eval`, `exec` and what libraries build on them; once there, it stays.
    sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "exec" and _guard["on"]:
        raise PermissionError("A response was about to be executed as Python, which is not allowed.")


def named_verifier(name: str, *, column: str = "answer", device: str | None = None) -> Callable[..., Any]:
    """The verifier of a name.

    Args:
        name: `exact-match`, `math-verify`, `reasoning-gym:TASK`, `reward-model:FOLDER_OR_ID`, or one's own callable as
            `module:function` or `file.py:function`.
        column: The column that holds the answer, for the first two.
        device: Where a reward model runs; None: an accelerator if there is one.

    Raises:
        ValueError: If there is no such verifier, or its module has no such callable.
        ImportError: If the package or module it needs cannot be imported.

    Example:
        >>> named_verifier("exact-match", column="completion").columns
        ('completion',)
        >>> named_verifier("math:sqrt")(4.0)
        2.0
    """
    kind, _, rest = name.rpartition(":") if name.rpartition(":")[0].endswith(".py") else name.partition(":")
    if name == "exact-match":
        return ExactMatch(column)
    if name == "math-verify":
        return MathVerify(column)
    if kind == "reasoning-gym" and rest:
        return ReasoningGym(rest)
    if kind == "reward-model" and rest:
        return RewardModel(rest, device=device)
    if not rest:
        raise ValueError(
            f"`verifier` {name!r} is not known: give exact-match, math-verify, reasoning-gym:TASK, "
            "reward-model:MODEL, or your own callable as module:function or file.py:function."
        )
    module = _import_file(Path(kind)) if kind.endswith(".py") else _import(kind, Path.cwd())
    verifier = vars(module).get(rest)
    if not callable(verifier):
        where = getattr(module, "__file__", None) or "built into Python"
        raise ValueError(f"`verifier` {name!r}: {kind} has no callable {rest!r} ({where}).")
    return verifier


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"`verifier`: there is no file {path}.")
    if "." in path.stem:
        raise ValueError(f"`verifier`: a module's name has no dots, so {path} cannot be imported; rename the file.")
    module = _import(path.stem, path.resolve().parent)
    origin = getattr(module, "__file__", None)
    if origin is None or Path(origin).resolve() != path.resolve():
        raise ValueError(
            f"`verifier`: {path.stem} is another module, {origin or 'built into Python'}; rename the file {path}."
        )
    return module


def _import(name: str, folder: Path) -> Any:
    if not all(name.split(".")):
        raise ValueError(f"`verifier`: {name!r} is no module's name; give module:function or file.py:function.")
    # The process that judges is given this path too, and imports the module by the same name.
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # whatever a module raises, it is of no use then
        raise ImportError(f"`verifier`: {name} cannot be imported ({type(error).__name__}: {error}).") from error
