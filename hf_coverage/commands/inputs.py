"""Corpora by the names that stand on a command line, and what the processes of a job do together."""

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hf_coverage.commands.console import say, waiting
from hf_coverage.commands.options import CorpusOptions, RowOptions
from hf_coverage.inference import loading as host
from hf_coverage.inference.loading import ModelOptions, join_job, require_there

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

__all__ = [
    "ORIGIN",
    "answer_column",
    "check_number_of_responses",
    "check_origin",
    "decided_by_main_process",
    "leave_job",
    "load_model",
    "read_chosen",
    "read_corpus",
    "read_dataset",
    "read_origin",
    "read_responses",
    "write_origin",
]

ORIGIN = "origin.json"
"""Beside a corpus: the command and settings that made it."""

_T = TypeVar("_T")

_MOST_TOKENS = 10**11  # a month of sampling on a GPU

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

    from hf_coverage.inference.files import reading

    path = Path(source)
    try:
        if path.is_dir():
            with reading(path, "Make it again, or give another folder of `save_to_disk`."):
                found = load_from_disk(source)
        elif path.suffix in _READERS:
            found = getattr(Dataset, _READERS[path.suffix])(_existing(path))
        elif path.suffix == ".txt":
            found = Dataset.from_text(_existing(path), sample_by="document" if document else "line")
        elif path.exists():
            raise ValueError(f"{path} must be .jsonl, .json, .parquet, .csv or .txt, or a folder of `save_to_disk`.")
        else:
            require_there(source)
            found = load_dataset(source)
    except DatasetGenerationError as error:
        raise ValueError(f"{path} cannot be read: {error.__cause__ or error}") from error
    except OSError as error:
        if type(error) is not OSError or error.errno is not None or not path.exists():
            raise  # of the system or of the Hub, which name what they mean; Arrow does not
        raise ValueError(f"{path} is damaged ({error}): make it again.") from error
    if isinstance(found, DatasetDict):
        if split not in found and not (split is None and len(found) == 1):
            raise ValueError(f"`split` must be one of {', '.join(found)} for {source}, but is {split!r}.")
        found = found[split or next(iter(found))]
    return found


def read_chosen(source: str, options: RowOptions, *, document: bool = False) -> "Dataset":
    """Those rows of a data set that are asked for, in the order that is asked for; see `read_dataset`."""
    import numpy as np

    found = read_dataset(source, options.split, document=document)
    if options.shuffle_seed is not None:
        found = found.select(np.random.default_rng(options.shuffle_seed).permutation(len(found)))
    return found if options.limit is None else found.select(range(min(options.limit, len(found))))


def read_responses(source: str, options: RowOptions, *, pairs: bool = True) -> "Dataset":
    """Rows of prompts and responses, whatever their columns are called; says what these were taken for.

    Args:
        source: See `read_dataset`.
        options: Which rows and columns.
        pairs: Whether responses are needed, see `corpus_shapes.read_rows`.
    """
    from hf_coverage.commands.corpus_shapes import read_rows

    columns = {"prompt": options.prompt_column, "completion": options.completion_column}
    rows, taken = read_rows(read_chosen(source, options), **columns, answer=options.answer_column, pairs=pairs)
    if taken is not None:
        _announce(f"{source}: took {taken}.")
    return rows


def answer_column(rows: "Dataset", verifier: str, options: RowOptions) -> str:
    """The column that a verifier compares responses with.

    Raises:
        ValueError: If it needs right answers, and there are none.
    """
    column = options.answer_column or ("answer" if "answer" in rows.column_names else "completion")
    if verifier in ("exact-match", "math-verify") and column not in rows.column_names:
        raise ValueError(
            f"`--verifier {verifier}` compares with right answers, and the data have no column `answer` or "
            f"`completion` among {rows.column_names}: name it with `--answer-column`."
        )
    return column


@cache
def _announce(text: str) -> None:
    """Once, however often a command reads its corpus."""
    say(text)


def read_corpus(source: str, reading: CorpusOptions) -> "tuple[Dataset, dict[str, Any]]":
    """A reference corpus, and what `write_origin` left beside it; see `read_responses` and `check_origin`."""
    return read_responses(source, reading), check_origin(source, append_eos=reading.append_eos)


def load_model(source: str, loading: ModelOptions) -> "PreTrainedModel":
    """A model, see `hf_coverage.inference.loading.load_model`, with a word where it takes long."""
    with waiting(f"Loading {source}"):
        return host.load_model(source, loading)


def read_origin(source: str) -> dict[str, Any]:
    """What `write_origin` left beside a corpus; empty for a corpus from elsewhere."""
    path = Path(source) / ORIGIN
    if not path.is_file():
        return {}
    from hf_coverage.inference.files import read_facts

    return read_facts(path, "Sample the corpus again, or remove this file if you know how its responses end.")


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


def check_number_of_responses(prompts: int, k: int, max_new_tokens: int) -> None:
    """Refuse what no run ends with, before a model is loaded: a typing error.

    Raises:
        ValueError: If the tokens to sample are absurdly many.
    """
    tokens = prompts * k * max_new_tokens
    if tokens > _MOST_TOKENS:
        raise ValueError(
            f"{prompts:,} prompts, `k` {k:,} and `max_new_tokens` {max_new_tokens:,} are up to {tokens:,} tokens, and "
            f"more than {_MOST_TOKENS:,} is taken for a typing error: lower one of them, or split the data."
        )


def decided_by_main_process(question: Callable[[], _T], device: str | None = None) -> _T:
    """The main process's answer, on every process: files may change between two processes' looks at them."""
    from hf_coverage.inference.processes import on_main_process

    join_job(device)
    return on_main_process(question)


def leave_job() -> None:
    """End what the processes of a job do together: those that are done may exit while the main process goes on.

    A process group that is still there when the interpreter exits may abort it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        if PartialState._shared_state:  # else the job was not joined, and asking would wait for the others
            PartialState().destroy_process_group()


def _existing(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    if not path.stat().st_size:
        raise ValueError(f"{path} is empty: give a file with rows.")
    return str(path)
