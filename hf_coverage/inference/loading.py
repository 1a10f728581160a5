"""How a causal language model and its tokenizer are loaded: one description for everything that loads them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_coverage.functional.checks import check_count
from hf_coverage.inference.files import read_facts, reading

if TYPE_CHECKING:
    from accelerate import PartialState
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "ModelOptions",
    "ServedOptions",
    "changed_settings",
    "is_served",
    "join_job",
    "load_model",
    "load_tokenizer",
    "load_whole",
    "model_name",
    "require_there",
    "some",
]

_NUMBER = re.compile(r"\.\d+\.")  # of a layer, in the name of a weight
_SUFFIXES = (".bin", ".csv", ".gguf", ".json", ".jsonl", ".parquet", ".pt", ".pth", ".safetensors", ".txt", ".yaml")
_MOST_TOLERANCE = 10.0  # nats a response
_SHOWN = 4  # weights that an error names


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ModelOptions:
    """How a model and its tokenizer are loaded, whatever they are called.

    A field is an option of every command that loads a model, with its `help` and its default.

    Attributes:
        tokenizer: Folder or Hub id of the tokenizer; None for the model's own.
        revision: Branch, tag or commit on the Hub.
        gguf_file: GGUF file in the model's folder, loaded instead of its weights.
        dtype: Number format of the weights; "auto" for the checkpoint's own.
        device: Such as "cuda:1" or "cpu"; None for an accelerator if there is one.

    Example:
        >>> ModelOptions(dtype="float32").key()
        {'dtype': 'float32', 'device': None, 'revision': None, 'gguf_file': None}
    """

    tokenizer: str | None = _option(None, "Folder or Hub id, if not the model's own.")
    revision: str | None = _option(None, "Branch, tag or commit of a model on the Hub.")
    gguf_file: str | None = _option(None, "GGUF file in the model's folder to load instead.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto", "Number format of the weights; `auto` is the checkpoint's own."
    )
    device: str | None = _option(None, "Such as `cuda:1` or `cpu`; by default an accelerator if there is one.")

    def key(self) -> dict[str, Any]:
        """What decides a model's numbers, but for its tokenizer, as it is written down beside them."""
        return changed_settings(replace(self, tokenizer=None), "dtype", "device", "revision", "gguf_file")

    def for_another_model(self) -> "ModelOptions":
        """The same for a model that is loaded beside the first: without what says where the first one's files are."""
        return replace(self, revision=None, gguf_file=None)


@dataclass(frozen=True)
class ServedOptions(ModelOptions):
    """How a model is loaded, or where it is served, for what only samples and scores; see `RemoteModel`.

    Attributes:
        base_url: Where the server is; the model's name is then the server's.
        check_with: Folder or Hub id of the same model, loaded as the other options say, to compare the server with.
        server_tolerance: Nats by which two readings of a response may differ.
        concurrency: Requests at once.

    Raises:
        ValueError: If a number is out of its range, or there is a server and an option that loads a model.
    """

    base_url: str | None = _option(
        None,
        "Server that samples and scores, such as http://127.0.0.1:8000/v1; models' names are then the server's. Its "
        "key is read from OPENAI_API_KEY.",
    )
    check_with: str | None = _option(
        None, "Folder or Hub id of the server's model, loaded to compare the server with it first."
    )
    server_tolerance: float = _option(
        1e-3, "Nats by which two readings of a response by a server may differ; some tenths for one in bfloat16."
    )
    concurrency: int = _option(64, "Requests to a server at once.")

    def __post_init__(self) -> None:
        check_count(self.concurrency, "concurrency")
        if not 0 < self.server_tolerance <= _MOST_TOLERANCE:
            raise ValueError(
                f"`server_tolerance` must be above 0, and at most {_MOST_TOLERANCE:g} nats, got "
                f"{self.server_tolerance}."
            )
        if self.base_url is None and self.check_with is not None:
            raise ValueError("`--check-with` is compared with a server: give its `--base-url`, or leave it out.")
        if self.base_url is None:
            return
        if self.tokenizer is None and self.check_with is None:
            raise ValueError("`--base-url` needs the `--tokenizer` of the server's model: it is sent token ids.")
        changed = [one.name for one in fields(ModelOptions) if getattr(self, one.name) != one.default]
        wrong = [name for name in changed if name not in ("tokenizer", "device")]
        if wrong and self.check_with is None:
            raise ValueError(
                f"`--{wrong[0].replace('_', '-')}` says how a model is loaded, which its server has done: leave it or "
                "`--base-url` out, or give the copy that it is for with `--check-with`."
            )

    def key(self) -> dict[str, Any]:
        """See `ModelOptions.key`; a server's model is known by what the server says, and not by where it is."""
        own = {one.name: getattr(self, one.name) for one in fields(ModelOptions)}
        return (ModelOptions(**own) if self.base_url is None else ModelOptions()).key()


def is_served(options: ModelOptions) -> bool:
    """Whether models are a server's."""
    return isinstance(options, ServedOptions) and options.base_url is not None


def changed_settings(options: Any, *always: str) -> dict[str, Any]:
    """Those fields of a dataclass that are named, and all others that differ from their default.

    So a key that was written before there was an option equals the key written since, as long as nobody sets it.
    """
    changed = [one.name for one in fields(options) if getattr(options, one.name) != one.default]
    return {name: getattr(options, name) for name in (*always, *changed)}


def load_model(name: str, options: ModelOptions) -> "PreTrainedModel":
    """A causal language model, on its device and in evaluation mode; or a `RemoteModel`.

    Raises:
        ValueError: If the checkpoint is not whole, see `load_whole`.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    state = join_job(options.device)
    if isinstance(options, ServedOptions) and options.base_url is not None:
        return _connect(name, options)
    if not state.is_main_process:
        logging.disable_progress_bar()
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    model = load_whole(AutoModelForCausalLM, name, dtype=dtype, revision=options.revision, gguf_file=options.gguf_file)
    return model.to(options.device or state.device).eval()


def _connect(name: str, options: ServedOptions) -> Any:
    """A server's model, after it has shown itself to be what it is taken for."""
    from hf_coverage.inference.remote import RemoteModel

    copy = None
    if options.check_with is not None:
        own = {one.name: getattr(options, one.name) for one in fields(ModelOptions)}
        copy = load_model(options.check_with, ModelOptions(**own))
    return RemoteModel(
        str(options.base_url),
        name,
        tokenizer=load_tokenizer(name, options),
        check_with=copy,
        tolerance=options.server_tolerance,
        concurrency=options.concurrency,
    )


def load_whole(kind: Any, name: str | PathLike[str], **how: Any) -> "PreTrainedModel":
    """A model all of whose weights come from its checkpoint: transformers draws those at random that do not.

    Tied weights and buffers that are computed are not missing. What a checkpoint holds beyond its model is of no
    matter (a reward's head, a vision tower), unless it says that the network was another one: further layers of a
    stack that the model has, or a bias where the model has none.

    Args:
        kind: A model class of transformers, or one of its `AutoModelFor...`.
        name: Folder or Hub id of a model, or of an adapter, whose base is then looked at as well.
        how: See `from_pretrained`.

    Raises:
        ValueError: Naming the weights that are missing, of another shape, or left out.
    """
    name = str(name)
    require_there(name)
    base = _base_of(name, how.get("revision"))
    if base is not None:
        model = load_whole(kind, base, **how)
        report = model.load_adapter(name, adapter_kwargs={"revision": how.get("revision")}).to_dict()
    else:
        with reading(f"The checkpoint {name}", "Save or download it again."):
            model, report = kind.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **how)
    _require_whole(how.get("gguf_file") or name, model, report)
    return model


def load_tokenizer(name: str, options: ModelOptions) -> "PreTrainedTokenizerBase":
    """The tokenizer that the options name, or else that of the model `name`, loaded as the model is."""
    from transformers import AutoTokenizer

    how: dict[str, Any] = {}
    if options.tokenizer is None:
        how = {"revision": options.revision, "gguf_file": options.gguf_file}
    copy = options.check_with if isinstance(options, ServedOptions) else None
    source = options.tokenizer or copy or name
    require_there(source)
    with reading(f"The tokenizer of {source}", "Save or download it again, or name another one as `tokenizer`."):
        return AutoTokenizer.from_pretrained(source, **how)


def require_there(name: str) -> None:
    """Refuse what can only be a path, and is none, before the Hub is asked for a repository of that name.

    `a/b` may be either. It is a path where there is a folder `a`, or where it ends as files do.

    Raises:
        FileNotFoundError: If nothing is there.

    Example:
        >>> require_there("weights/model.gguf")
        Traceback (most recent call last):
        FileNotFoundError: there is no file or folder weights/model.gguf: check the path.
    """
    path = Path(name)
    if path.exists():
        return
    is_id = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) and path.suffix.lower() not in _SUFFIXES
    if not is_id:
        raise FileNotFoundError(f"there is no file or folder {name}: check the path.")
    if "/" in name and path.parent.is_dir():
        raise FileNotFoundError(
            f"there is no file or folder {name}, though there is a folder {path.parent}: check the path; for the "
            "Hub's repository of that name, run the command where no such folder is."
        )


def model_name(name: str, options: ModelOptions) -> str:
    """What a model is called in tables: its Hub id, its folder's or its GGUF file's name."""
    if is_served(options):
        return name
    if options.gguf_file is not None:
        return Path(options.gguf_file).stem
    return Path(name).resolve().name if Path(name).exists() else name


def join_job(device: str | None) -> "PartialState":
    """The processes of the job, on the accelerator unless there is none or the CPU is asked for."""
    import torch
    from accelerate import PartialState

    if device is not None:
        _require_device(device)
    return PartialState(cpu=device == "cpu" or (device is None and not torch.accelerator.is_available()))


def some(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    shown, more = ", ".join(names[:_SHOWN]), len(names) - _SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _require_device(device: str) -> None:
    import torch

    try:
        usable = torch.empty(1, device=device).device.type != "meta"  # which has no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has no one kind for it
        raise ValueError(
            f"`device` {device!r} cannot be used ({str(error).splitlines()[0]}): give `cpu`, or leave it out for an "
            "accelerator if there is one."
        ) from error
    if not usable:
        raise ValueError(f"`device` must hold numbers, but {device!r} does not: give `cpu` or an accelerator.")


def _base_of(name: str, revision: str | None) -> str | None:
    """The model that an adapter is for; None for what is no adapter, or has its base beside it."""
    from transformers.utils import CONFIG_NAME, find_adapter_config_file, is_peft_available

    if not is_peft_available() or (Path(name) / CONFIG_NAME).is_file():
        return None
    config = find_adapter_config_file(name, revision=revision)
    if config is None:
        return None
    facts = read_facts(Path(config), "Save or download the adapter again.", base_model_name_or_path=str)
    return facts["base_model_name_or_path"]


def _require_whole(name: str, model: "PreTrainedModel", report: Mapping[str, Any]) -> None:
    parts = {
        "no weights for": report["missing_keys"],
        "weights of another shape for": [
            f"{key} {tuple(found)}, not {tuple(wanted)}" for key, found, wanted in report["mismatched_keys"]
        ],
        "weights that the model has no place for,": _left_out(model, report["unexpected_keys"]),
    }
    faults = [f"{what} {some(sorted(keys))}" for what, keys in parts.items() if keys]
    if faults:
        raise ValueError(
            f"The checkpoint {name} is not whole, or its config.json is another model's: it has "
            f"{' and '.join(faults)}. What is missing would be random, and so would every number; save or download "
            "the checkpoint again."
        )


def _left_out(model: "PreTrainedModel", unexpected: Iterable[str]) -> list[str]:
    """Those weights of a checkpoint without which the model is another network than the one that was saved."""
    layers = {_NUMBER.sub(".*.", key) for key in model.state_dict()}
    leaves = {name for name, module in model.named_modules() if not any(module.children())}
    # layers for the prediction of several tokens follow the others, and are not part of the causal model
    further = not getattr(model.config.get_text_config(), "num_nextn_predict_layers", 0)
    return [
        key
        for key in unexpected
        if (further and _NUMBER.search(key) and _NUMBER.sub(".*.", key) in layers)
        or (key.endswith(".bias") and key.removesuffix(".bias") in leaves)
    ]
