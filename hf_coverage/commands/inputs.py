"""Corpora, models and tokenizers by the names that stand on a command line."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_coverage.commands.console import is_main_process

if TYPE_CHECKING:
    from accelerate import PartialState
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "ORIGIN",
    "check_origin",
    "decided_by_main_process",
    "leave_job",
    "load_model",
    "load_tokenizer",
    "load_tokenizer_for",
    "model_name",
    "read_dataset",
    "read_origin",
    "write_origin",
]

ORIGIN = "origin.json"
"""Beside a corpus: the command and settings that made it."""

_READERS = {".jsonl": "from_json", ".json": "from_json", ".parquet": "from_parquet", ".csv": "from_csv"}


def read_dataset(source: str, split: str | None = None, *, document: bool = False) -> "Dataset":
    """A data set from a folder that `save_to_disk` wrote, from a file, or from the Hub.

    Args:
        source: Folder, `.jsonl`, `.json`, `.parquet`, `.csv` or `.txt` file, or Hub id.
        split: Which split, where there are several.
        document: Whether a text file is one document; otherwise each of its lines is a row.

    Raises:
        ValueError: If the file's format is unknown or its content unreadable, or `split` is needed or unknown.
        OSError: If there is nothing of that name.
    """
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError

    path = Path(source)
    try:
        if path.is_dir():
            found = load_from_disk(source)
        elif path.suffix in _READERS:
            found = getattr(Dataset, _READERS[path.suffix])(_existing(path))
        elif path.suffix == ".txt":
            found = Dataset.from_text(_existing(path), sample_by="document" if document else "line")
        elif path.exists():
            raise ValueError(f"{path} must be .jsonl, .json, .parquet, .csv or .txt, or a folder of `save_to_disk`.")
        else:
            found = load_dataset(source)
    except DatasetGenerationError as error:
        raise ValueError(f"{path} cannot be read: {error.__cause__ or error}") from error
    if isinstance(found, DatasetDict):
        if split not in found and not (split is None and len(found) == 1):
            raise ValueError(f"`split` must be one of {', '.join(found)} for {source}, but is {split!r}.")
        found = found[split or next(iter(found))]
    return found


def read_origin(source: str) -> dict[str, Any]:
    """What `write_origin` left beside a corpus; empty for a corpus from elsewhere."""
    path = Path(source) / ORIGIN
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def check_origin(source: str, *, append_eos: bool) -> dict[str, Any]:
    """What `write_origin` left beside a corpus, after checking that responses end as they did when it was made.

    Raises:
        ValueError: If they do not.
    """
    origin = read_origin(source)
    if origin.get("append_eos", append_eos) != append_eos:
        raise ValueError(
            f"`append_eos` must be {origin['append_eos']}, as in `hf-coverage sample` when {source} was made: the "
            "end-of-sequence token is part of the responses on both sides or on neither."
        )
    return origin


def write_origin(folder: Path, facts: dict[str, Any]) -> None:
    """Write down what made a corpus, beside it."""
    from hf_coverage.inference.files import write_atomically

    write_atomically(folder / ORIGIN, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def load_model(
    name: str, *, dtype: str = "auto", device: str | None = None, revision: str | None, gguf_file: str | None
) -> "PreTrainedModel":
    """A causal language model, on its device and in evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    state = _job(device)
    if not is_main_process():
        logging.disable_progress_bar()
    chosen = dtype if dtype == "auto" else getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=chosen, revision=revision, gguf_file=gguf_file)
    return model.to(device or state.device).eval()


def load_tokenizer(
    name: str, *, revision: str | None = None, gguf_file: str | None = None
) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder or Hub id."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, revision=revision, gguf_file=gguf_file)


def load_tokenizer_for(model: str, tokenizer: str | None, loading: dict[str, Any]) -> "PreTrainedTokenizerBase":
    """The tokenizer that is named, or else the model's own, loaded as the model is."""
    if tokenizer is not None:
        return load_tokenizer(tokenizer)
    return load_tokenizer(model, revision=loading["revision"], gguf_file=loading["gguf_file"])


def model_name(name: str, gguf_file: str | None = None) -> str:
    """What a model is called in tables: its Hub id, its folder's or its GGUF file's name."""
    if gguf_file is not None:
        return Path(gguf_file).stem
    return Path(name).resolve().name if Path(name).exists() else name


def decided_by_main_process(question: Callable[[], bool], device: str | None = None) -> bool:
    """The main process's answer, on every process: files may change between two processes' looks at them."""
    answer = [question() if is_main_process() else False]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate.utils import broadcast_object_list

        _job(device)
        broadcast_object_list(answer)
    return answer[0]


def leave_job(device: str | None = None) -> None:
    """End what the processes of a job do together: those that are done may exit while the main process goes on."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _job(device).destroy_process_group()


def _job(device: str | None) -> "PartialState":
    """The processes of the job, on the accelerator unless there is none or the CPU is asked for."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=device == "cpu" or (device is None and not torch.accelerator.is_available()))


def _existing(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    return str(path)
