"""Models one after another in memory: the base of several adapters is loaded once, and they are swapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hf_coverage.inference.loading import ModelOptions, load_model, mark_loading, put_on, resolve_base

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["KeptBase"]


class KeptBase:
    """Loads models as `load_model` does, one at a time.

    The base of an adapter stays in memory for the next adapter, if taking the adapter off has left it as it was: the
    same tensors, untouched. Otherwise, and for whatever is no adapter, it is loaded anew.
    """

    def __init__(self) -> None:
        self._model: PreTrainedModel | None = None
        self._base: Any = None
        self._before: dict[str, tuple[int, int]] = {}

    def load(
        self, name: str, options: ModelOptions, load: Callable[[str, ModelOptions], PreTrainedModel] = load_model
    ) -> PreTrainedModel:
        """A model; the one that was loaded before it is not to be used any more.

        Args:
            name: Its folder or Hub id.
            options: How it is loaded.
            load: What loads a model.
        """
        base = None if options.adapter is not None else resolve_base(name, options)
        if base is None:
            self.drop()
            return load(name, options)
        if self._model is None or self._base != base or not self._is_bare():
            self.drop()
            self._model, self._base = load(*base), base
            self._before = _tensors(self._model)
        place, how = options.of(name)
        put_on(self._model, place, {"revision": how.revision, "subfolder": how.subfolder})
        if options.device_map is None and options.quantization is None and not options.tp:
            self._model.to(self._model.device)
        mark_loading(self._model, place, how)
        return self._model.eval()

    def drop(self) -> None:
        """Keep nothing."""
        self._model, self._base, self._before = None, None, {}

    def _is_bare(self) -> bool:
        """Take the adapter off; whether nothing is left of it."""
        if self._model is None:
            return False
        _take_off(self._model)
        left = any(type(module).__module__.partition(".")[0] == "peft" for module in self._model.modules())
        return not left and _tensors(self._model) == self._before


def _tensors(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Where each tensor is, and how often it was written to."""
    return {name: (value.data_ptr(), value._version) for name, value in model.state_dict().items()}


def _take_off(model: PreTrainedModel) -> None:
    """Put the layers that adapters wrap back in their places."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(name, module.get_base_layer())
        elif isinstance(module, AuxiliaryTrainingWrapper):
            model.set_submodule(name, module.original_module)
    model.peft_config = {}
    del model.peft_config
    model._hf_peft_config_loaded = False
