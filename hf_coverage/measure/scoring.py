"""log p(y|x) of any causal language model, on all processes of a job, within a set memory.

Each response token is predicted by the position before it; a response's score is the float64 sum of its
float32 token log-probabilities; prompt tokens do not count.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from huggingface_hub.utils import tqdm
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_coverage import __version__
from hf_coverage.functional.checks import check_count
from hf_coverage.functional.ttt_config import StepRule, TTTConfig
from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.inference.fingerprint import config_fingerprint, tokenizer_fingerprint, weight_fingerprint
from hf_coverage.inference.forward import inference, unwrap
from hf_coverage.inference.forward_batches import tokens_read
from hf_coverage.inference.loading import loaded_commit, loading_facts
from hf_coverage.inference.processes import on_main_process, writing_to
from hf_coverage.inference.remote import RemoteModel, require_its_tokenizer
from hf_coverage.measure.corpus import encode_corpus
from hf_coverage.measure.engine import ScoringEngine, ScoringOptions, ServedEngine, refuse_nan
from hf_coverage.measure.score_table import ScoreTable
from hf_coverage.measure.scores import Scores

__all__ = ["PLAIN", "Scores", "score_encoded", "score_responses", "score_rules"]

PLAIN = "plain"
"""What `score_rules` calls the model as it is."""


def score_encoded(
    model: nn.Module | RemoteModel,
    encoded: EncodedCorpus,
    *,
    batch_tokens: int = ScoringOptions.batch_tokens,
    logits_memory: int = ScoringOptions.logits_memory,
    share_prefixes: bool = True,
    per_token: bool = False,
    teacher: nn.Module | None = None,
    head_statistics: bool = False,
    ttt: StepRule | None = None,
    batch_invariant: bool = False,
    intervals: bool = False,
    progress: bool = False,
) -> Scores:
    """Score token ids: `log p(y|x) = sum_h log p(y_h | x, y_<h)`; `score_responses` explains the arguments.

    Args:
        model: Any causal language model.
        encoded: Token ids of prompts and completions.
        batch_tokens: Token positions computed in one forward pass.
        logits_memory: Bytes for logits.
        share_prefixes: Whether responses of one prompt share one run of it.
        per_token: Whether to return each token's log-probability.
        teacher: Causal language model of the same vocabulary to measure KL(teacher || model) against.
        head_statistics: Whether to measure the output head's input.
        ttt: Test-time training.
        batch_invariant: Whether to read each row in a pass of its own.
        intervals: Whether to find where each response's interval of arithmetic codes begins.
        progress: Whether to show a progress bar on the main process.

    Returns:
        Scores of all rows, on every process.

    Raises:
        ValueError: If a size, a token id, a row's length or the teacher's vocabulary does not fit the model, or the
            model returns NaN.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> _ = torch.manual_seed(0)
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11, n_positions=32))
        >>> encoded = EncodedCorpus(prompts=[[1, 2], [1, 2]], completions=[[3, 4, 5], [6]])
        >>> scores = score_encoded(model, encoded)
        >>> scores.logprob.round(1), scores.num_tokens
        (array([-7.1, -2.3]), array([3, 1]))
    """
    config = None if ttt is None else TTTConfig.of(ttt)
    options = ScoringOptions(
        batch_tokens, logits_memory, share_prefixes, per_token, head_statistics, config, batch_invariant, intervals
    )
    with _engine(model, teacher, options) as engine, _progress_bar(encoded, progress) as bar:
        return engine.score(encoded, range(len(encoded)), bar.update)


def score_responses(
    model: nn.Module | RemoteModel,
    tokenizer: PreTrainedTokenizerBase | None,
    corpus: Dataset,
    *,
    append_eos: bool = False,
    batch_tokens: int = ScoringOptions.batch_tokens,
    logits_memory: int = ScoringOptions.logits_memory,
    share_prefixes: bool = True,
    per_token: bool = False,
    teacher: nn.Module | None = None,
    head_statistics: bool = False,
    ttt: StepRule | None = None,
    batch_invariant: bool = False,
    intervals: bool = False,
    output_dir: str | os.PathLike[str] | None = None,
    shard_rows: int = 1024,
    rows: Sequence[int] | None = None,
    progress: bool = True,
) -> Dataset:
    """Add to each row of a corpus the log-probability that a model gives to its response.

        log p(y|x) = sum_h log p(y_h | x, y_<h)

    Response tokens alone count. The log-softmax runs in float32 whatever the dtype of the model, the sum in float64.
    Before the first row is scored the model is asked, on these rows and in a few passes, whether it is what this takes
    it for: whether a score depends on its row alone and on no later token, and whether going on from a cache changes
    nothing. What only fails when rows share a prompt, are padded or batched is done without.
    Call it on every process of a job (`torchrun`, `accelerate launch`): each row is scored on one of them and each
    process gets all rows, the same bits as one process gets with the same number of threads (a sharded model: the same
    to rounding). The model comes back as it was: its mode, configuration, gradients and the global random state.

    Args:
        model: Any causal language model of transformers; may be wrapped by DDP or FSDP. Or a `RemoteModel`, which can
            do `per_token` and `rows`, and for which batches are its server's business.
        tokenizer: Its tokenizer; may be None for a corpus of token ids.
        corpus: Dataset with `prompt` and `completion`: text, chat messages or token ids.
        append_eos: Whether the end-of-sequence token is part of every response; for text only.
        batch_tokens: Token positions computed in one forward pass, padding included; a longer row runs alone.
        logits_memory: Bytes for logits, with one float32 copy of them and the teacher's; longer responses are scored
            in segments.
        share_prefixes: Whether responses of one prompt continue from one run of it, where the architecture's cache
            can be shared; the result is equal, only faster.
        per_token: Whether to add `token_logprobs`, one float32 per response token.
        teacher: Causal language model of the same vocabulary; adds `token_kl`, for each response token
            KL(teacher || model) of the two next-token distributions before it (for the stopped KL).
        head_statistics: Whether to add, per row, `hidden_norm = max_t ||h_t||`, `inherent_variance = sum_t ||h_t||^2
            (1 - sum_v q_v^2)` and `sampled_variance = sum_t ||h_t||^2 (1 - 2 q_{y_t} + sum_v q_v^2)`, h_t the input
            of the output head. q is D's next-token distribution: the teacher's where one is given. Without a teacher
            the model's own is put in for it: see `measure.inherent_variance` for what that measures.
        ttt: Score the model that test-time training makes of this one, `log p_TTT(y|x)`, and how: every response (and
            its prompt, with `on_prompt`) moves parameters of its own from where the model's are. It is what
            `ttt_generate` samples from with the same settings; a `StepRule` alone is the head's. The head is followed
            on one pass over the responses; `"lora"` and `"all"` read them token by token, as slowly as decoding, and
            a position costs them 16 of `batch_tokens`. None: the model as it is.
        batch_invariant: Whether to read each row in a pass of its own, several times slower, so that its score is the
            same to the bit whatever else the corpus holds. Otherwise it differs by rounding between batchings: by some
            1e-5 nats a response in float32, by tenths of a nat in bfloat16 or float16 (0.17 was seen).
        intervals: Whether to add `interval_low`, where each response's interval of arithmetic codes begins: with its
            log-probability it says exactly how likely N stratified samples hold the response, see
            `functional.stratified_pass_probabilities`. Reads all logits twice more.
        output_dir: Folder of a `ScoreTable` to write, or to go on with after an interruption.
        shard_rows: Rows per shard of that table.
        rows: Which rows to score, each once, if not all. The table then holds these, and is whole as soon as all were
            asked for: whoever scores all of them later scores the others only.
        progress: Whether to show a progress bar, on the main process.

    Returns:
        The corpus, or the rows of it that were asked for, with columns `logprob` (float64, nats), `num_tokens` and
        what else was asked for; same order.

    Raises:
        TypeError: If the corpus is no `datasets.Dataset`.
        ValueError: If a row, a size, the teacher or `ttt` does not fit, the model is not causal or returns NaN, or
            `output_dir` holds the scores of something else.
        RuntimeError: If the architecture has no single output head over its hidden states.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> _ = torch.manual_seed(0)
        >>> config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11, bos_token_id=0, eos_token_id=1)
        >>> corpus = Dataset.from_dict({"prompt": [[1, 2], [1, 2]], "completion": [[3, 4, 5], [6]]})
        >>> scored = score_responses(GPT2LMHeadModel(config), None, corpus, progress=False)
        >>> scored["num_tokens"][:], [round(value, 1) for value in scored["logprob"]]
        ([3, 1], [-7.1, -2.4])

    References:
        arXiv 2510.15020, Equation (1) for log p(y|x), (8) for the inherent variance, (22) and (23) for test-time
        training, (50) for the stopped KL.
    """
    config = None if ttt is None else TTTConfig.of(ttt)
    options = ScoringOptions(
        batch_tokens, logits_memory, share_prefixes, per_token, head_statistics, config, batch_invariant, intervals
    )
    check_count(shard_rows, "shard_rows")
    require_its_tokenizer(model, tokenizer)
    encoded = encode_corpus(corpus, tokenizer, append_eos=append_eos)
    asked = None if rows is None else _checked_rows(rows, len(encoded))
    taken = sorted(set(corpus.column_names) & {field.name for field in fields(Scores)})
    if taken:
        raise ValueError(
            f"`corpus` must not have the column `{taken[0]}` that scoring adds; remove or rename it, for example "
            f"`corpus.remove_columns({taken})`."
        )
    opened = writing_to(output_dir)
    with opened, _engine(model, teacher, options) as engine, _progress_bar(encoded, progress, asked) as bar:
        if output_dir is None:
            scores = engine.score(encoded, range(len(encoded)) if asked is None else asked.tolist(), bar.update)
        else:
            settings = {"shard_rows": shard_rows, "options": _describe_options(options) | {"append_eos": append_eos}}
            metadata = _describe_run(model, teacher, tokenizer, encoded, settings, output_dir)
            table = on_main_process(lambda: ScoreTable.begin(output_dir, metadata))
            if asked is None:
                (scores,) = _score_into_tables(engine, encoded, [config], [table], bar, refused=[config])
            else:
                scores = _score_rows_into_table(engine, encoded, asked, table, bar)
    kept = corpus.with_format(None)
    if asked is not None:
        kept = Dataset.from_dict(kept[asked.tolist()], features=kept.features)
    return concatenate_datasets([kept, scores.to_dataset()], axis=1)


def score_rules(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    corpus: Dataset,
    rules: Mapping[str, StepRule],
    *,
    append_eos: bool = False,
    batch_tokens: int = ScoringOptions.batch_tokens,
    logits_memory: int = ScoringOptions.logits_memory,
    share_prefixes: bool = True,
    per_token: bool = False,
    batch_invariant: bool = False,
    output_dir: str | os.PathLike[str] | None = None,
    shard_rows: int | None = None,
    progress: bool = True,
) -> dict[str, Scores]:
    """Score what several rules of test-time training make of a model, and the model as it is.

    The numbers are those of `score_responses(..., ttt=rule)`, to the bit. What the output head does leaves everything
    before it as it is: all rules of `scope="head"` and the model itself take one reading of the corpus together. The
    others have one each.

    A rule may diverge: its steps lead to log-probabilities that are NaN, or `-inf` where the model's own are finite.
    That is a result, `tune_ttt` takes it for one, and does not keep other rules from theirs. NaN of the model itself
    is an error.

    Args:
        model: See `score_responses`.
        tokenizer: See there.
        corpus: See there.
        rules: The rules by name, the name of a folder; `plain` is taken.
        append_eos: See `score_responses`.
        batch_tokens: See there.
        logits_memory: Bytes for what the steps keep, and as many for the logits that rules share.
        share_prefixes: See `score_responses`.
        per_token: Whether to give `token_logprobs`, one float32 per response token.
        batch_invariant: See `score_responses`.
        output_dir: Folder of a folder for each rule, and of `plain`, with the `ScoreTable` that `score_responses`
            would write into it. What is there is not scored again, whichever of the two wrote it.
        shard_rows: Rows per shard of the tables: what an interruption costs. None: 1024, and 16 where responses are
            read token by token.
        progress: Whether to show a progress bar, on the main process.

    Returns:
        Scores of all rows by name on every process, `plain` first.

    Raises:
        ValueError: If a row, a size or a rule does not fit, the model is not causal or returns NaN, or a folder holds
            the scores of something else.
        RuntimeError: If the architecture has no single output head over its hidden states.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> _ = torch.manual_seed(0)
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11, n_positions=32))
        >>> corpus = Dataset.from_dict({"prompt": [[1, 2]], "completion": [[3, 3, 3, 3, 3]]})
        >>> rules = {f"lr {lr}": StepRule(lr) for lr in (0.1, 1.0)}
        >>> scores = score_rules(model, None, corpus, rules, progress=False)
        >>> {name: scored.logprob.round(1).tolist() for name, scored in scores.items()}
        {'plain': [-11.6], 'lr 0.1': [-9.3], 'lr 1.0': [-4.9]}

    References:
        arXiv 2510.15020, Equations (22) and (23).
    """
    if PLAIN in rules:
        raise ValueError(f"`rules` must not have the name {PLAIN!r}, which is that of the model as it is.")
    if shard_rows is not None:
        check_count(shard_rows, "shard_rows")
    configs = {name: TTTConfig.of(rule) for name, rule in rules.items()}
    plain = ScoringOptions(batch_tokens, logits_memory, share_prefixes, per_token, batch_invariant=batch_invariant)
    options = {PLAIN: plain} | {name: replace(plain, ttt=config) for name, config in configs.items()}
    readings = [[PLAIN, *(name for name, config in configs.items() if config.scope == "head")]]
    readings += [[name] for name, config in configs.items() if config.scope != "head"]
    encoded = encode_corpus(corpus, tokenizer, append_eos=append_eos)
    found: dict[str, Scores] = {}
    folders = {} if output_dir is None else {name: Path(output_dir) / name for name in options}
    with writing_to(*folders.values()), inference(model):
        # All of them first: a model that cannot make a step is refused before anything is scored.
        engines = [ScoringEngine(model, None, options[names[-1]]) for names in readings]
        tables: dict[str, ScoreTable] = {}
        if output_dir is not None:
            run = _describe_run(model, None, tokenizer, encoded, {"shard_rows": shard_rows, "options": {}})
            for name, own in options.items():
                slow = own.ttt is not None and own.ttt.scope != "head"
                metadata = run | {
                    "shard_rows": shard_rows or (16 if slow else 1024),
                    "options": _describe_options(own) | {"append_eos": append_eos},
                }
                tables[name] = on_main_process(partial(ScoreTable.begin, folders[name], metadata))
        for engine, names in zip(engines, readings):
            asked = [options[name].ttt for name in names]
            with _progress_bar(encoded, progress) as bar:
                if output_dir is None:
                    scores = engine.score_rules(encoded, range(len(encoded)), asked, bar.update)
                else:
                    own_tables = [tables[name] for name in names]
                    scores = _score_into_tables(engine, encoded, asked, own_tables, bar, refused=[None])
            found |= dict(zip(names, scores))
            refuse_nan(found[PLAIN], range(len(encoded)), None)
    return {name: found[name] for name in options}


@contextmanager
def _engine(
    model: nn.Module | RemoteModel, teacher: nn.Module | None, options: ScoringOptions
) -> Iterator[ScoringEngine | ServedEngine]:
    if isinstance(model, RemoteModel):
        yield ServedEngine(model, teacher, options)
        return
    with inference(*(module for module in (model, teacher) if module is not None)):
        yield ScoringEngine(model, teacher, options)


def _score_into_tables(
    engine: ScoringEngine | ServedEngine,
    corpus: EncodedCorpus,
    rules: Sequence[TTTConfig | None],
    tables: Sequence[ScoreTable],
    bar: tqdm,
    *,
    refused: Sequence[TTTConfig | None],
) -> list[Scores]:
    """Score the shards that are missing, and read the others; NaN of some rules is refused, and not written."""
    missing = on_main_process(lambda: [table.missing() for table in tables])
    parts: list[list[Scores]] = [[] for _ in tables]
    for index in range(tables[0].num_shards):
        rows = tables[0].shard_rows(index)
        todo = [place for place, gaps in enumerate(missing) if index in gaps]
        held = {place: on_main_process(partial(tables[place].look_up, np.asarray(rows))) for place in todo}
        known = np.logical_and.reduce([known for known, _ in held.values()]) if todo else np.ones(len(rows), bool)
        others = [row for row, is_known in zip(rows, known) if not is_known] if known.any() else rows
        scored: Sequence[Scores | None] = [None] * len(todo)
        if len(others):
            scored = engine.score_rules(corpus, others, [rules[place] for place in todo], bar.update)
        found = {place: _merged(known, held[place], new) for place, new in zip(todo, scored)}
        for place in range(len(tables)):
            if place not in found:
                found[place] = on_main_process(partial(tables[place].read, index))
        for place, rule in enumerate(rules):
            if rule in refused:
                refuse_nan(found[place], rows, rule)
        for place in todo:
            on_main_process(partial(tables[place].write, index, found[place]))
        bar.update(sum(tokens_read(corpus, row) for row, is_known in zip(rows, known) if is_known))
        for place, part in enumerate(parts):
            part.append(found[place])
    for table in tables:
        on_main_process(table.finish)
        on_main_process(table.require_there)
    return [Scores.concatenate(part) for part in parts]


def _merged(known: NDArray[np.bool_], held: tuple[NDArray[np.bool_], Scores | None], new: Scores | None) -> Scores:
    """A shard: the rows that are known to all tables as this one holds them, the others as they were scored now."""
    own, scores = held
    parts = [] if scores is None else [scores.take((np.cumsum(own) - 1)[known])]
    parts += [] if new is None else [new]
    return Scores.concatenate(parts).take(np.argsort(np.argsort(~known, kind="stable")))


def _checked_rows(rows: Sequence[int], size: int) -> NDArray[np.int64]:
    asked = np.asarray(rows, dtype=np.int64)
    if asked.ndim != 1 or not asked.size or np.unique(asked).size < asked.size:
        raise ValueError("`rows` must be the numbers of one row or more, each once.")
    outside = asked[(asked < 0) | (asked >= size)]
    if outside.size:
        raise ValueError(f"`rows` must lie in [0, {size}), but {outside[0]} does not.")
    return asked


def _score_rows_into_table(
    engine: ScoringEngine | ServedEngine,
    corpus: EncodedCorpus,
    rows: NDArray[np.int64],
    table: ScoreTable,
    bar: tqdm,
) -> Scores:
    """Score those of some rows that are not in a table yet, a shard's number at a time."""
    for start in range(0, rows.size, table.metadata["shard_rows"]):
        part = rows[start : start + table.metadata["shard_rows"]]
        known, _ = on_main_process(partial(table.look_up, part))
        bar.update(sum(tokens_read(corpus, row) for row in part[known]))
        if not known.all():
            new = engine.score(corpus, part[~known].tolist(), bar.update)
            on_main_process(partial(table.write_rows, part[~known], new))
    scores = on_main_process(partial(table.read_some, rows))
    on_main_process(table.finish)
    return scores


def _describe_run(
    model: nn.Module | RemoteModel,
    teacher: nn.Module | None,
    tokenizer: PreTrainedTokenizerBase | None,
    corpus: EncodedCorpus,
    options: dict[str, Any],
    folder: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """What decides the bytes of a score table, and where its model came from."""
    return {
        "rows": len(corpus),
        **options,
        "model": _describe_model(model, folder),
        "teacher": None if teacher is None else _describe_model(teacher),
        "corpus": corpus.fingerprint,
        "tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        "versions": {
            "hf_coverage": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _describe_options(options: ScoringOptions) -> dict[str, Any]:
    """Options as a table keeps them: one that was begun before there was an option, or without it, is the same."""
    described = {name: value for name, value in asdict(options).items() if value is not None}
    for name in ("batch_invariant", "intervals"):
        if not getattr(options, name):
            del described[name]
    if options.ttt is not None:
        first = {entry.name for entry in fields(StepRule)}
        values = {entry.name: (getattr(options.ttt, entry.name), entry.default) for entry in fields(TTTConfig)}
        described["ttt"] = {
            name: value for name, (value, default) in values.items() if name in first or value != default
        }
    return described


def _describe_model(model: nn.Module | RemoteModel, folder: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    if isinstance(model, RemoteModel):  # whose weights nobody here sees
        return {"name": model.name, "revision": None, "weights": None, "served": model.facts(folder)}
    model = unwrap(model)
    parameter = next(model.parameters())
    loading = loading_facts(model)
    return {
        "name": model.config._name_or_path,
        "revision": loaded_commit(model),
        "weights": weight_fingerprint(model),
        "config": config_fingerprint(model),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
        # of models that are loaded as ever nothing more is written down than ever
        **({"loading": loading} if loading else {}),
    }


def _progress_bar(corpus: EncodedCorpus, progress: bool, rows: NDArray[np.int64] | None = None) -> tqdm:
    total = sum(tokens_read(corpus, row) for row in (range(len(corpus)) if rows is None else rows))
    hidden = not (progress and PartialState().is_main_process)
    return tqdm(total=total, desc="Scoring", unit="tok", unit_scale=True, disable=hidden)
