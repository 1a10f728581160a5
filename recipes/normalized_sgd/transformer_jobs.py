"""What is trained on: the graph task of the main job, and the last layers of SmolLM2-135M on Python's own sources."""

import copy
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from hf_coverage.functional.checks import FloatArray
from hf_coverage.functional.logprobs import sequence_logprobs
from hf_coverage.inference.encoded_rows import EncodedCorpus
from hf_coverage.inference.files import write_atomically
from hf_coverage.inference.fingerprint import weight_fingerprint
from hf_coverage.inference.loading import load_whole
from hf_coverage.measure.builders import windows_corpus
from hf_coverage.tasks.graph_search import GraphSearchDataset, collate_rows
from recipes.pretrain import ModelArguments, TaskArguments, new_task, pretrain, rows_seen
from recipes.reasoning.model import load_base
from recipes.smollm2 import SMOLLM2, load_tokenizer

IGNORE_INDEX = -100


@dataclass
class TextArguments:
    name: str = field(default=SMOLLM2, metadata={"help": f"{SMOLLM2} comes with a package; else a folder or Hub id."})
    last_layers: int = field(default=4, metadata={"help": "Layers that are trained; those before them stay."})
    prompt_tokens: int = 56
    response_tokens: int = 8
    train_rows: int = 512
    max_documents: int | None = field(default=None, metadata={"help": "Take the first so many files only."})


@dataclass(frozen=True)
class Job:
    """A start, rows to train on, and held-out rows, `groups` of which are not independent.

    A batch is what `collate` makes of rows: what the model takes, `labels` among it.
    """

    new_model: Callable[[], PreTrainedModel]
    train_rows: Callable[[TrainingArguments], Any]
    held_out: Any
    groups: FloatArray
    collate: Callable[[Sequence[Any]], dict[str, Any]]


@torch.inference_mode()
def score(job: Job, model: PreTrainedModel, batch_size: int = 64) -> FloatArray:
    """Log p(y|x) `(R,)` of the held-out rows, nats; -inf for all of them where the training has diverged."""
    model.eval()
    found = []
    for first in range(0, len(job.held_out), batch_size):
        batch = job.collate([job.held_out[row] for row in range(first, min(first + batch_size, len(job.held_out)))])
        labels = batch.pop("labels")[:, 1:]
        logprobs = model(**batch).logits[:, :-1].log_softmax(-1)
        mask = labels != IGNORE_INDEX
        chosen = logprobs.gather(-1, labels.masked_fill(~mask, 0)[..., None])[..., 0]
        found.append(sequence_logprobs(chosen, mask).numpy())
    return np.nan_to_num(np.concatenate(found), nan=-np.inf, neginf=-np.inf)


def graph_job(task_args: TaskArguments, model_args: ModelArguments, args: TrainingArguments, *, rows: int) -> Job:
    """The fine-tuning of `recipes.pretrain`, from the end of its pre-training."""
    task = new_task(task_args)
    start = pretrain(task, task_args, model_args, args, seed=args.seed)
    weights = task_args.finetune_weights
    return Job(
        new_model=lambda: load_whole(GPT2LMHeadModel, start),
        train_rows=lambda args: GraphSearchDataset(task, weights, rows_seen(args), seed=(args.seed, 1)),
        held_out=GraphSearchDataset(task, weights, rows, seed=(0, 2)),
        groups=np.arange(rows),
        collate=collate_rows,
    )


def text_job(output: Path, args: TextArguments, *, rows: int) -> Job:
    """Continue windows of Python's sources, with the last layers alone: the others' output is kept in a file."""
    base, tokenizer = load_base(args.name), load_tokenizer(args.name)
    corpora = {
        "held_out": source_windows(tokenizer, args, held_out=True, rows=rows),
        "train": source_windows(tokenizer, args, held_out=False, rows=args.train_rows),
    }
    layers, norm = base.model.layers, base.model.norm
    base.model.layers, base.model.norm = layers[: -args.last_layers], nn.Identity()
    hidden = remembered_states(
        output / "hidden_states.safetensors", base, {name: ids for name, (ids, _) in corpora.items()}
    )
    base.model.layers, base.model.norm = layers[-args.last_layers :], norm
    base.requires_grad_(False)
    base.model.layers.requires_grad_(True)
    return Job(
        new_model=lambda: copy.deepcopy(base),
        train_rows=lambda _: list(zip(hidden["train"], corpora["train"][0])),
        held_out=list(zip(hidden["held_out"], corpora["held_out"][0])),
        groups=corpora["held_out"][1],
        collate=lambda pairs: collate_hidden(pairs, args.response_tokens),
    )


def source_windows(
    tokenizer: PreTrainedTokenizerBase, args: TextArguments, *, held_out: bool, rows: int
) -> tuple[Tensor, FloatArray]:
    """Windows `(R, T)` of the standard library's sources and the file of each; every other file is held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[: args.max_documents]
    corpus = windows_corpus(
        [file.read_text(encoding="utf-8") for file in files[not held_out :: 2]],
        tokenizer,
        prompt_tokens=args.prompt_tokens,
        response_tokens=args.response_tokens,
        stride=args.prompt_tokens + args.response_tokens,
        max_windows=rows,
    )
    ids = [prompt + completion for prompt, completion in zip(corpus["prompt"][:], corpus["completion"][:])]
    return torch.tensor(ids), np.array(corpus["document"][:])


def remembered_states(file: Path, bottom: PreTrainedModel, texts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The hidden states of each corpus, computed only where there is no such file.

    Raises:
        ValueError: if the file is of other weights or texts, as another version of Python brings them.
    """
    key = {name: EncodedCorpus(ids[:, :1].tolist(), ids[:, 1:].tolist()).fingerprint for name, ids in texts.items()}
    key["weights"] = weight_fingerprint(bottom)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, save({name: hidden_states(bottom, ids) for name, ids in texts.items()}, key))
    with safe_open(file, "pt") as kept:
        if kept.metadata() not in (key, None):  # None: written before there was a key
            raise ValueError(f"{file} is of other weights or texts than this run's: choose another `--output_dir`.")
        return {name: kept.get_tensor(name) for name in texts}


@torch.inference_mode()
def hidden_states(bottom: PreTrainedModel, ids: Tensor) -> Tensor:
    """What the layers that stay make of token ids: `(R, T, width)`."""
    parts = [bottom.model(input_ids=part, use_cache=False).last_hidden_state for part in ids.split(32)]
    return torch.cat(parts)


def collate_hidden(pairs: Sequence[tuple[Tensor, Tensor]], response_tokens: int) -> dict[str, Any]:
    """A batch that goes on from hidden states, with logits for the response alone."""
    labels = torch.stack([ids[-response_tokens - 1 :] for _, ids in pairs])
    labels[:, 0] = IGNORE_INDEX  # the model shifts labels by one
    embeds = torch.stack([hidden for hidden, _ in pairs])
    return {"inputs_embeds": embeds, "labels": labels, "logits_to_keep": response_tokens + 1}
