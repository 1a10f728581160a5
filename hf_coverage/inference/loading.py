"""How a causal language model and its tokenizer are loaded: one description for everything that loads them."""

import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_coverage.functional.checks import check_count
from hf_coverage.inference.files import read_facts, reading

if TYPE_CHECKING:
    from accelerate import PartialState
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "ModelOptions",
    "ServedOptions",
    "changed_settings",
    "commit_of",
    "hub_parts",
    "is_served",
    "join_job",
    "load_model",
    "load_tokenizer",
    "load_whole",
    "loaded_commit",
    "loading_facts",
    "mark_loading",
    "model_name",
    "put_on",
    "require_gathered",
    "require_there",
    "resolve_base",
    "some",
    "split_revision",
]

_NUMBER = re.compile(r"\.\d+\.")  # of a layer, in the name of a weight
_SUFFIXES = (".bin", ".csv", ".gguf", ".json", ".jsonl", ".parquet", ".pt", ".pth", ".safetensors", ".txt", ".yaml")
_MOST_TOLERANCE = 10.0  # nats a response
_SHOWN = 4  # weights that an error names
_ID = r"[\w-][\w.-]*(/[\w-][\w.-]*)?"  # of a repository on the Hub
_SNAPSHOT = re.compile(r"models--(?P<id>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})$")
_FIRST = ("dtype", "device", "revision", "gguf_file")
"""Options of the first release: in every key."""
_NOTE = "_hf_coverage_loading"
"""Attribute of a model that `load_model` loaded: how."""


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
        trust_remote_code: Whether Python code that comes with the model may be run.
        device_map: Where the parts of the model go: "auto", "balanced", "sequential", a device, or a JSON object of
            places (a device, "cpu" or "disk") by the names of the parts.
        tp: Whether the processes of a job hold a part of every layer each, instead of a whole model each.
        attn_implementation: Such as "eager", "sdpa" or "flash_attention_2"; None for the model's own.
        quantization: "bnb-4bit", "bnb-8bit" or "torchao-" and the name of one of its configurations, such as
            "torchao-int8-weight-only".
        adapter: Folder or Hub id of an adapter of PEFT to put on the model.
        subfolder: Of the model's folder or repository, where its files are.
        model_kwargs: JSON object of what else `from_pretrained` is to be given.

    Raises:
        ValueError: If an option cannot be read, or two of them contradict each other.

    Example:
        >>> ModelOptions(dtype="float32").key()
        {'dtype': 'float32', 'device': None, 'revision': None, 'gguf_file': None}
        >>> ModelOptions(device_map="auto", device="cpu")
        Traceback (most recent call last):
        ValueError: `device_map` says where the parts of a model go, and so does `device`: give one of them.
    """

    tokenizer: str | None = _option(None, "Folder or Hub id, if not the model's own.")
    revision: str | None = _option(None, "Branch, tag or commit of a model on the Hub.")
    gguf_file: str | None = _option(None, "GGUF file in the model's folder to load instead.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option(
        "auto", "Number format of the weights; `auto` is the checkpoint's own."
    )
    device: str | None = _option(None, "Such as `cuda:1` or `cpu`; by default an accelerator if there is one.")
    trust_remote_code: bool = _option(False, "Run the Python code that comes with the model.")
    device_map: str | None = _option(
        None, "Spread a model that no device holds: `auto`, or JSON of places by part, `disk` among them."
    )
    tp: bool = _option(False, "Split every layer over the processes of torchrun.")
    attn_implementation: str | None = _option(None, "Such as `eager`, `sdpa` or `flash_attention_2`.")
    quantization: str | None = _option(
        None, "`bnb-4bit`, `bnb-8bit`, or of torchao such as `torchao-int8-weight-only`."
    )
    adapter: str | None = _option(None, "Folder or Hub id of an adapter of PEFT to put on the model.")
    subfolder: str | None = _option(None, "Where in the model's folder or repository its files are.")
    model_kwargs: str | None = _option(None, "JSON object of what else `from_pretrained` is to be given.")

    def __post_init__(self) -> None:
        if self.device_map is not None and self.device is not None:
            raise ValueError(
                "`device_map` says where the parts of a model go, and so does `device`: give one of them."
            )
        if self.device_map is not None and self.tp:
            raise ValueError("`tp` gives every process a part of each layer: leave `device_map` out.")
        self.extra()
        self.places()
        _check_quantization(self.quantization)

    def extra(self) -> dict[str, Any]:
        """What `model_kwargs` holds."""
        if self.model_kwargs is None:
            return {}
        found = _json_object("model_kwargs", self.model_kwargs)
        ours = {one.name for one in fields(self)} | {"tp_plan", "distributed_config"}
        taken = sorted(found.keys() & ours)
        if taken:
            raise ValueError(f"`model_kwargs` has `{taken[0]}`, which is an option of its own: give it there.")
        if self.quantization is not None and "quantization_config" in found:
            raise ValueError("`model_kwargs` has a `quantization_config`: leave it or `quantization` out.")
        return found

    def places(self) -> str | dict[str, Any] | None:
        """What `device_map` says, as `from_pretrained` takes it."""
        is_object = self.device_map is not None and self.device_map.lstrip().startswith("{")
        return _json_object("device_map", str(self.device_map)) if is_object else self.device_map

    def key(self) -> dict[str, Any]:
        """What decides a model's numbers, but for its tokenizer, as it is written down beside them."""
        found = changed_settings(replace(self, tokenizer=None), *_FIRST)
        return found | ({"model_kwargs": self.extra()} if self.model_kwargs is not None else {})

    def of(self, name: str) -> tuple[str, "ModelOptions"]:
        """A model's folder or Hub id and how it is loaded, from a name that may be `ID@REVISION`.

        Raises:
            ValueError: If there are two revisions.

        Example:
            >>> ModelOptions().of("org/model@step10")[0], ModelOptions().of("org/model@step10")[1].revision
            ('org/model', 'step10')
        """
        place, revision = split_revision(name)
        if revision is None:
            return name, self
        if self.revision not in (None, revision):
            raise ValueError(f"{name} has a revision, and `revision` is {self.revision}: give one of them.")
        return place, replace(self, revision=revision)

    def for_another_model(self) -> "ModelOptions":
        """The same for a model that is loaded beside the first: without what says where the first one's files are."""
        return replace(self, revision=None, gguf_file=None, adapter=None, subfolder=None)


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
        super().__post_init__()
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
        wrong = [name for name in changed if name not in ("tokenizer", "device", "trust_remote_code")]
        if wrong and self.check_with is None:
            raise ValueError(
                f"`--{wrong[0].replace('_', '-')}` says how a model is loaded, which its server has done: leave it or "
                "`--base-url` out, or give the copy that it is for with `--check-with`."
            )

    def key(self) -> dict[str, Any]:
        """See `ModelOptions.key`; a server's model is known by what the server says, and not by where it is."""
        return (self.local() if self.base_url is None else ModelOptions()).key()

    def of(self, name: str) -> tuple[str, ModelOptions]:
        """See `ModelOptions.of`; a server's names are its own."""
        return super().of(name) if self.base_url is None else (name, self)

    def local(self) -> ModelOptions:
        """How a model of one's own is loaded."""
        return ModelOptions(**{one.name: getattr(self, one.name) for one in fields(ModelOptions)})


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

    name, options = options.of(name)
    state = join_job(options.device)
    if isinstance(options, ServedOptions) and options.base_url is not None:
        return _connect(name, options)
    if not state.is_main_process:
        logging.disable_progress_bar()
    device = options.device or state.device
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    how = options.extra() | {"dtype": dtype, "trust_remote_code": options.trust_remote_code}
    how |= {"revision": options.revision, "gguf_file": options.gguf_file}
    some: dict[str, Any] = {"attn_implementation": options.attn_implementation, "subfolder": options.subfolder}
    some |= {"device_map": options.places(), **_distribution(options)}
    if options.quantization is not None:
        # put in its place as it is quantised: what is may not be moved
        some |= {"quantization_config": _quantization_config(options.quantization)}
        some["device_map"] = some["device_map"] or {"": device}
    how |= {name: value for name, value in some.items() if value is not None}
    model = load_whole(AutoModelForCausalLM, name, adapter=options.adapter, **how)
    if options.quantization is not None:
        _require_quantized(model, options.quantization)
    if "device_map" not in how and not options.tp:
        model = model.to(device)
    mark_loading(model, name, options)
    return model.eval()


def _connect(name: str, options: ServedOptions) -> Any:
    """A server's model, after it has shown itself to be what it is taken for."""
    from hf_coverage.inference.remote import RemoteModel

    copy = None
    if options.check_with is not None:
        copy = load_model(options.check_with, options.local())
    return RemoteModel(
        str(options.base_url),
        name,
        tokenizer=load_tokenizer(name, options),
        check_with=copy,
        tolerance=options.server_tolerance,
        concurrency=options.concurrency,
    )


def mark_loading(model: "nn.Module", name: str, options: ModelOptions) -> None:
    """Note on a model what it was loaded with and from which commit, for `loading_facts` and `loaded_commit`."""
    options_set = {key: value for key, value in options.key().items() if key not in _FIRST}
    setattr(model, _NOTE, {"commit": commit_of(name, options), "options": options_set})


def loaded_commit(model: "nn.Module") -> str | None:
    """The commit on the Hub that a model is of, where that is known."""
    return getattr(model, _NOTE, {}).get("commit") or getattr(model.config, "_commit_hash", None)


def loading_facts(model: "nn.Module") -> dict[str, Any]:
    """How a model was loaded, as far as its weights and its configuration do not say and its numbers may tell.

    Those options of `load_model` that the first release did not have; and of any model its attention, where it is not
    what its class takes by itself, and a digest of code that came with it.
    """
    from transformers import PreTrainedModel

    from hf_coverage.inference.forward import unwrap

    model = unwrap(model)
    found = dict(getattr(model, _NOTE, {}).get("options", {}))
    if isinstance(model, PreTrainedModel):
        own = model.config.get_text_config()._attn_implementation
        found |= {} if own in (None, model.get_correct_attn_implementation(None)) else {"attn_implementation": own}
    code = _own_code(model)
    return found if code is None else found | {"code": code}


def load_whole(kind: Any, name: str | PathLike[str], *, adapter: str | None = None, **how: Any) -> "PreTrainedModel":
    """A model all of whose weights come from its checkpoint: transformers draws those at random that do not.

    Tied weights and buffers that are computed are not missing. What a checkpoint holds beyond its model is of no
    matter (a reward's head, a vision tower), unless it says that the network was another one: further layers of a
    stack that the model has, or a bias where the model has none.

    Args:
        kind: A model class of transformers, or one of its `AutoModelFor...`.
        name: Folder or Hub id of a model, or of an adapter, whose base is then looked at as well.
        adapter: Folder or Hub id of an adapter to put on the model.
        how: See `from_pretrained`.

    Raises:
        ValueError: Naming the weights that are missing, of another shape, or left out; or if the model is an adapter,
            and so is `adapter`.
    """
    name = str(name)
    require_there(name)
    require_gathered(name)
    base = _base_of(name, how.get("revision"), how.get("subfolder"))
    if base is not None:
        if adapter is not None:
            raise ValueError(f"`adapter` {adapter} is for a model, but {name} is an adapter itself: give its base.")
        model = load_whole(kind, base.name, **base.how(how))
        put_on(model, name, how)
        return model
    with _explained(f"The checkpoint {name}", how):
        model, report = kind.from_pretrained(name, output_loading_info=True, ignore_mismatched_sizes=True, **how)
    _require_whole(how.get("gguf_file") or name, model, report)
    if adapter is not None:
        place, revision = split_revision(adapter)
        require_there(place)
        if _base_of(place, revision, None) is None:
            raise ValueError(f"`adapter` {adapter} is no adapter of PEFT: it has no adapter_config.json.")
        put_on(model, place, {"revision": revision})
    return model


def load_tokenizer(name: str, options: ModelOptions) -> "PreTrainedTokenizerBase":
    """The tokenizer that the options name, or else that of the model `name`, loaded as the model is.

    An adapter that was saved without one has its base's.
    """
    from transformers import AutoTokenizer

    if isinstance(options, ServedOptions):
        name, options = options.check_with or name, options.local()
    how: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    source, revision = split_revision(options.tokenizer or name)
    require_there(source)
    how |= {"revision": revision} if revision is not None else {}
    if options.tokenizer is None:
        source, options = options.of(name)
        how |= {"revision": options.revision, "gguf_file": options.gguf_file}
        how |= {"subfolder": options.subfolder} if options.subfolder is not None else {}
        base = _base_of(source, options.revision, options.subfolder)
        if base is not None and not _has_tokenizer(source, how):
            source, how = base.name, base.how(how)
    remedy = "Save or download it again, or name another one as `tokenizer`."
    with _explained(f"The tokenizer of {source}", how, remedy):
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
    place, revision = split_revision(name)
    is_id = re.fullmatch(_ID, place) and (revision is not None or path.suffix.lower() not in _SUFFIXES)
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
    if not Path(name).exists():
        return name
    place, commit = hub_parts(str(Path(name).resolve()))
    return Path(name).resolve().name if commit is None else f"{place}@{commit}"


def split_revision(name: str) -> tuple[str, str | None]:
    """A repository on the Hub and its revision, of a name that is `ID@REVISION` and no path; else the name, and None.

    Example:
        >>> split_revision("EleutherAI/pythia-160m@step1000"), split_revision("runs/checkpoint-10")
        (('EleutherAI/pythia-160m', 'step1000'), ('runs/checkpoint-10', None))
    """
    place, at, revision = name.partition("@")
    if not at or not revision or Path(name).exists() or not re.fullmatch(_ID, place):
        return name, None
    return place, revision


def hub_parts(name: str) -> tuple[str, str | None]:
    """What `split_revision` gives; of a snapshot's folder in the Hub's cache, its repository and revision as well.

    A snapshot's revision is the branch or tag that leads to it, where the cache knows one, or else its commit.
    """
    snapshot = _SNAPSHOT.search(Path(name).as_posix())
    if snapshot is not None:
        refs = Path(name).parents[1] / "refs"
        known = [ref for ref in sorted(refs.rglob("*")) if ref.is_file() and ref.read_text() == snapshot["commit"]]
        revision = known[0].relative_to(refs).as_posix() if known else snapshot["commit"][:8]
        return snapshot["id"].replace("--", "/"), revision
    return split_revision(name)


def commit_of(name: str, options: ModelOptions) -> str | None:
    """The commit that a model's name leads to now; None for a folder, or where it has no configuration."""
    from transformers.utils import cached_file, extract_commit_hash

    place, options = options.of(name)
    if Path(place).exists():
        return None
    require_there(place)
    missing = {"_raise_exceptions_for_missing_entries": False}
    for file in ("config.json", "adapter_config.json"):
        found = cached_file(place, file, revision=options.revision, subfolder=options.subfolder or "", **missing)
        if found is not None:
            return extract_commit_hash(found, None)
    return None


def resolve_base(name: str, options: ModelOptions) -> tuple[str, ModelOptions] | None:
    """The model that an adapter is for, and how it is loaded; None for what is no adapter."""
    if is_served(options):
        return None
    place, options = options.of(name)
    base = _base_of(place, options.revision, options.subfolder)
    if base is None:
        return None
    return base.name, replace(options, revision=base.revision, subfolder=None, gguf_file=None)


def require_gathered(name: str) -> None:
    """Refuse a folder that holds parts of a model, as many processes wrote them, and no model.

    Raises:
        ValueError: If so; says how to make one of it.
    """
    folder = Path(name)
    if not folder.is_dir() or any(any(folder.glob(f"*{suffix}")) for suffix in (".safetensors", ".bin", ".gguf")):
        return
    shards = next(folder.glob("*/*.distcp"), None) or next(folder.glob("*.distcp"), None)
    if shards is not None:
        raise ValueError(
            f"{name} holds the shards of a model, as FSDP writes them: make one of them with `accelerate "
            f"merge-weights {shards.parent} OUTPUT`, put config.json and the tokenizer's files beside it, and give "
            "OUTPUT."
        )
    if any(folder.glob("*/*model_states.pt")):
        raise ValueError(
            f"{name} holds the parts of a model, as DeepSpeed writes them: make one of them with `python "
            f"{folder / 'zero_to_fp32.py'} {name} OUTPUT --safe_serialization`, put config.json and the tokenizer's "
            "files beside it, and give OUTPUT."
        )


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


def _json_object(option: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ValueError(f"`{option}` must be a JSON object, but is {text!r} ({error}).") from error
    if not isinstance(found, dict):
        raise ValueError(f"`{option}` must be a JSON object, such as '{{\"a\": 1}}', but is {text!r}.")
    return found


def _check_quantization(name: str | None) -> None:
    if name is not None and not re.fullmatch(r"bnb-[48]bit|torchao-[a-z0-9]+(-[a-z0-9]+)*", name):
        raise ValueError(
            f"`quantization` must be `bnb-4bit`, `bnb-8bit` or one of torchao's such as `torchao-int8-weight-only`, "
            f"but is {name!r}; any other configuration is given as `quantization_config` in `model_kwargs`."
        )


def _quantization_config(name: str) -> Any:
    """The configuration of a library that quantises, with the library's own defaults."""
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig, TorchAoConfig

    library = "bitsandbytes" if name.startswith("bnb-") else "torchao"
    if find_spec(library) is None:
        raise ImportError(f"`quantization` {name} needs {library}: pip install 'hf-coverage[quantization]'")
    if library == "bitsandbytes":
        return BitsAndBytesConfig(**{f"load_in_{name.removeprefix('bnb-')}": True})
    from torchao import quantization

    wanted = "".join(part.capitalize() for part in name.split("-")[1:]) + "Config"
    config = getattr(quantization, wanted, None)
    if config is None:
        raise ValueError(f"`quantization` {name} would be `torchao.quantization.{wanted}`, which there is none of.")
    return TorchAoConfig(config())


def _require_quantized(model: "PreTrainedModel", name: str) -> None:
    """Refuse a model that a library left as it was, which it does to layers whose sizes do not suit it."""
    from torch.nn import Parameter

    if all(type(weight) is Parameter for weight in model.parameters()):
        raise ValueError(
            f"`quantization` {name} left all weights as they were: the model's layers are too small or of the wrong "
            "size for it. Choose another one."
        )


def _distribution(options: ModelOptions) -> dict[str, Any]:
    """What `from_pretrained` is told of the job's processes."""
    if not options.tp:
        return {}
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        raise ValueError(
            "`tp` splits a model over processes, and there is one: start the command with `torchrun --nproc_per_node`."
        )
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(tp_plan="auto")}


@contextmanager
def _explained(what: str, how: Mapping[str, Any], remedy: str = "Save or download it again.") -> Iterator[None]:
    """Say of what cannot be loaded what it is, and what it was to be loaded with; see `reading`."""
    asked = sorted(how.keys() - {"dtype", "revision", "gguf_file", "trust_remote_code"})
    if asked:
        remedy += f" Or it does not take {', '.join(f'`{name}`' for name in asked)}: leave that out."
    try:
        with reading(what, remedy):
            yield
    except ValueError as error:
        if "trust_remote_code=True" in str(error):
            raise ValueError(
                f"{what} needs Python code that comes with it, which may do all that you may, and is not run unless "
                "you say so: read it, then give `--trust-remote-code` (`trust_remote_code=True`)."
            ) from error
        raise


@dataclass(frozen=True)
class _Base:
    """The model that an adapter is for: what the adapter's configuration says of it."""

    name: str
    revision: str | None

    def how(self, how: Mapping[str, Any]) -> dict[str, Any]:
        """How it is loaded, from how the adapter is: the adapter's files are in another place."""
        rest = {name: value for name, value in how.items() if name not in ("revision", "subfolder", "gguf_file")}
        return rest | {"revision": self.revision}


def _base_of(name: str, revision: str | None, subfolder: str | None) -> _Base | None:
    """The model that an adapter is for; None for what is no adapter, or has its base beside it."""
    from transformers.utils import CONFIG_NAME, find_adapter_config_file, is_peft_available

    if not is_peft_available() or (Path(name) / (subfolder or "") / CONFIG_NAME).is_file():
        return None
    config = find_adapter_config_file(name, revision=revision, subfolder=subfolder or "")
    if config is None:
        return None
    facts = read_facts(Path(config), "Save or download the adapter again.", base_model_name_or_path=str)
    return _Base(facts["base_model_name_or_path"], facts.get("revision"))


def put_on(model: "PreTrainedModel", adapter: str, how: Mapping[str, Any]) -> None:
    """Put an adapter on a model, whole."""
    places = {name: how[name] for name in ("revision", "subfolder") if how.get(name) is not None}
    with _explained(f"The adapter {adapter}", {}):
        report = model.load_adapter(adapter, adapter_kwargs=places)
    _require_whole(adapter, model, report.to_dict())


def _has_tokenizer(name: str, how: Mapping[str, Any]) -> bool:
    from transformers.utils import cached_file

    places = {name: how[name] for name in ("revision", "subfolder") if how.get(name) is not None}
    files = ("tokenizer_config.json", "tokenizer.json")
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    return any(cached_file(name, file, **places, **missing) is not None for file in files)


def _own_code(model: "nn.Module") -> str | None:
    """A digest of the Python files that a model was loaded with, where it is not one of transformers' own."""
    from hf_coverage.inference.fingerprint import digest

    module = sys.modules.get(type(model).__module__)
    if module is None or not module.__name__.startswith("transformers_modules.") or module.__file__ is None:
        return None
    files = sorted(Path(module.__file__).parent.glob("*.py"))
    return digest([[file.name, file.read_text(encoding="utf-8")] for file in files])


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
