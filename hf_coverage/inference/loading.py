"""How a causal language model and its tokenizer are loaded: one description for everything that loads them."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from accelerate import PartialState
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["ModelOptions", "changed_settings", "join_job", "load_model", "load_tokenizer", "model_name"]


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class ModelOptions:
    """How a model and its tokenizer are loaded, whatever they are called.

    A field is an option of every command that loads a model, with its `help` and its default.

    Attributes:
        tokenizer: folder or Hub id of the tokenizer; None for the model's own.
        revision: branch, tag or commit on the Hub.
        gguf_file: GGUF file in the model's folder, loaded instead of its weights.
        dtype: number format of the weights; "auto" for the checkpoint's own.
        device: such as "cuda:1" or "cpu"; None for an accelerator if there is one.

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


def changed_settings(options: Any, *always: str) -> dict[str, Any]:
    """Those fields of a dataclass that are named, and all others that differ from their default.

    So a key that was written before there was an option equals the key written since, as long as nobody sets it.
    """
    changed = [one.name for one in fields(options) if getattr(options, one.name) != one.default]
    return {name: getattr(options, name) for name in (*always, *changed)}


def load_model(name: str, options: ModelOptions) -> "PreTrainedModel":
    """A causal language model, on its device and in evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    state = join_job(options.device)
    if not state.is_main_process:
        logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        name,
        dtype=options.dtype if options.dtype == "auto" else getattr(torch, options.dtype),
        revision=options.revision,
        gguf_file=options.gguf_file,
    )
    return model.to(options.device or state.device).eval()


def load_tokenizer(name: str, options: ModelOptions) -> "PreTrainedTokenizerBase":
    """The tokenizer that the options name, or else that of the model `name`, loaded as the model is."""
    from transformers import AutoTokenizer

    if options.tokenizer is not None:
        return AutoTokenizer.from_pretrained(options.tokenizer)
    return AutoTokenizer.from_pretrained(name, revision=options.revision, gguf_file=options.gguf_file)


def model_name(name: str, options: ModelOptions) -> str:
    """What a model is called in tables: its Hub id, its folder's or its GGUF file's name."""
    if options.gguf_file is not None:
        return Path(options.gguf_file).stem
    return Path(name).resolve().name if Path(name).exists() else name


def join_job(device: str | None) -> "PartialState":
    """The processes of the job, on the accelerator unless there is none or the CPU is asked for."""
    import torch
    from accelerate import PartialState

    return PartialState(cpu=device == "cpu" or (device is None and not torch.accelerator.is_available()))
