"""Callbacks that score a reference corpus during a training, and go on where a resumed run's checkpoint was."""

from abc import abstractmethod
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, load_from_disk
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy

from hf_coverage.inference.evaluation_callback import EvaluationCallback
from hf_coverage.inference.forward import inference
from hf_coverage.measure.corpus import reference_kind, validate_corpus
from hf_coverage.measure.engine import ScoringEngine, ScoringOptions
from hf_coverage.measure.run_corpus import RunCorpus
from hf_coverage.measure.scores import Scores
from hf_coverage.measure.scoring import score_encoded

__all__ = ["CorpusCallback"]


class CorpusCallback(EvaluationCallback, ExportableState):
    """Base of the callbacks that score a corpus at evaluations.

    In a run with checkpoints the tokens of the corpus are kept, from where a callback that
    `restore_callback_states_from_checkpoint` rebuilds takes them.

    Args:
        corpus: A reference corpus (see `validate_corpus`), or the folder of one written by `Dataset.save_to_disk`;
            None: the one that an earlier part of this run kept.
        tokenizer: Tokenises a corpus of text or chat; None: the Trainer's `processing_class`.
        append_eos: End every text completion with the EOS token.
        groups: Column that says which rows are not independent of each other.
        batch_tokens: Token positions that one forward pass of the scoring computes.
        logits_memory: Bytes that its logits may take.
        **when: `every_n_evals`, `every_n_steps` and `name` of `EvaluationCallback`.

    Raises:
        TypeError: If the corpus is not a `datasets.Dataset`, or a value in it has the wrong type.
        ValueError: If the corpus is not valid, or an argument is out of range.
    """

    def __init__(
        self,
        corpus: Dataset | str | PathLike[str] | None,
        *,
        tokenizer: PreTrainedTokenizerBase | None,
        append_eos: bool,
        groups: str,
        batch_tokens: int,
        logits_memory: int,
        **when: Any,
    ) -> None:
        super().__init__(**when)
        self.tokenizer = tokenizer
        self.append_eos = append_eos
        self.groups = groups
        self.batch_tokens = batch_tokens
        self.logits_memory = logits_memory
        self._corpus = load_from_disk(corpus) if isinstance(corpus, str | PathLike) else corpus
        if self._corpus is not None:
            _check_corpus(self._corpus, groups)
        self._run_corpus: RunCorpus | None = None
        self._reading: tuple[Any, ...] = ()

    @abstractmethod
    def kept_corpus(self, args: TrainingArguments) -> Path:
        """The file that keeps the tokens of the corpus."""

    @property
    @abstractmethod
    def progress(self) -> dict[str, Any]:
        """Where the callback is in its run, in terms of JSON; what a checkpoint remembers of it."""

    @progress.setter
    @abstractmethod
    def progress(self, progress: dict[str, Any]) -> None: ...

    @abstractmethod
    def begin(self) -> None:
        """Forget an earlier training."""

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """What `__init__` needs to build the callback again but for what this class knows, in terms of JSON."""

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` keeps: how to build the callback again, and where it is in its run."""
        arguments = {
            "corpus": None,
            "groups": self.groups,
            "every_n_evals": self.every_n_evals,
            "every_n_steps": self.every_n_steps,
            "name": self.name,
            "batch_tokens": self.batch_tokens,
            "logits_memory": self.logits_memory,
        }
        return {"args": arguments | self.arguments(), "attributes": {"progress": self.progress}}

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Tokenise the corpus, so that one that cannot be is refused before the training, not in it."""
        super().on_init_end(args, state, control, **kwargs)
        if self._corpus is not None:
            self.tokens(args, processing_class)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Begin anew, or go on where the checkpoint that is being resumed from was."""
        corpus = self.tokens(args, processing_class)
        self.require_the_same(self.state()["args"] | {"corpus": corpus.fingerprint})
        super().on_train_begin(args, state, control, **kwargs)
        if model is not None:
            self._check_fit(model, corpus)
        if args.should_save and args.save_strategy != SaveStrategy.NO:
            corpus.save(self.kept_corpus(args))
        self.begin()
        self._resume(state)
        # The Trainer saves the state of a callback only under a name that its state already holds, and fails on a
        # run that was begun without the callback.
        _saved_states(state).setdefault(type(self).__name__, self.state())

    def tokens(self, args: TrainingArguments, processing_class: Any) -> RunCorpus:
        """The tokenised corpus, the run's kept one where none was given; read once for each run and tokenizer."""
        tokenizer = self.tokenizer or _tokenizer_of(processing_class)
        if self._corpus is None:
            reading: tuple[Any, ...] = (self.kept_corpus(args),)
        else:
            reading = (tokenizer, getattr(tokenizer, "chat_template", None))
        if self._run_corpus is None or reading != self._reading:
            if self._corpus is None:
                self._run_corpus = RunCorpus.load(self.kept_corpus(args))
            else:
                self._run_corpus = RunCorpus.from_dataset(
                    self._corpus, tokenizer, append_eos=self.append_eos, groups=self.groups
                )
            self._reading = reading
        return self._run_corpus

    def score(self, model: torch.nn.Module, corpus: RunCorpus) -> Scores:
        """Score the corpus under the model as it is now; called by all processes, equal on all of them."""
        return score_encoded(model, corpus.encoded, batch_tokens=self.batch_tokens, logits_memory=self.logits_memory)

    def _check_fit(self, model: torch.nn.Module, corpus: RunCorpus) -> None:
        """Refuse before the training, not at its first evaluation, what the model cannot score."""
        options = ScoringOptions(batch_tokens=self.batch_tokens, logits_memory=self.logits_memory)
        with inference(model):
            ScoringEngine(model, None, options).check(corpus.encoded, range(len(corpus.encoded)))

    def _resume(self, state: TrainerState) -> None:
        """Take up the progress that a resumed run's checkpoint holds of this callback, if it holds any.

        It is read here, and not left to `restore_callback_states_from_checkpoint`, because that is off by default and
        confuses several callbacks of one class.
        """
        if state.global_step == 0:
            return
        stored = _saved_states(state).get(type(self).__name__, [])
        found = [entry["attributes"]["progress"] for entry in (stored if isinstance(stored, list) else [stored])]
        same = [entry for entry in found if self._is_own(entry)]
        if same:
            self.progress = same[-1]

    def _is_own(self, progress: dict[str, Any]) -> bool:
        """Whether progress is of this callback and not of another one of its class, or of another corpus."""
        return all(progress[key] == self.progress[key] for key in ("corpus", "name"))


def _saved_states(state: TrainerState) -> dict[str, Any]:
    """The states of callbacks by class name: a dict, or a list of dicts for several callbacks of a class."""
    return cast(dict[str, Any], state.stateful_callbacks)  # annotated as the list that its constructor takes


def _check_corpus(corpus: Any, groups: str) -> None:
    validate_corpus(corpus)
    if reference_kind(corpus) == "answer":
        raise ValueError(
            "`corpus` has answer-level scores (`answer_logprob`), which take sampling to obtain: use `score_answers` "
            "on checkpoints, or drop the column to watch whole responses."
        )
    if groups not in corpus.column_names:
        raise ValueError(f"`groups` must be a column of the corpus, one of {corpus.column_names}, but is {groups!r}.")


def _tokenizer_of(processing_class: Any) -> PreTrainedTokenizerBase | None:
    if isinstance(processing_class, ProcessorMixin):
        return processing_class.tokenizer
    return processing_class if isinstance(processing_class, PreTrainedTokenizerBase) else None
