"""A model class whose own `generate` trains while it decodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.generation import GenerationMixin
from transformers.generation.utils import GenerateOutput

from hf_coverage.ttt.generate import refuse_paged, ttt_generate

__all__ = ["TestTimeTrainingMixin"]


class TestTimeTrainingMixin(GenerationMixin):
    """Lets `generate` of a causal language model take the settings of `ttt_generate`, as arguments or saved.

    Put it before the model class. With a `ttt_lr`, given to `generate` or in the generation configuration, tokens are
    decoded by `ttt_generate`, and `streamer` works as ever; without one, `generate` is the model's own.

    Example:
        >>> import torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> class Model(TestTimeTrainingMixin, GPT2LMHeadModel):
        ...     pass
        >>> _ = torch.manual_seed(0)
        >>> config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11, bos_token_id=0, eos_token_id=None)
        >>> Model(config).eval().generate(torch.tensor([[1, 2]]), max_new_tokens=6, ttt_lr=1.0).shape
        torch.Size([1, 8])

    References:
        arXiv 2510.15020, Equations (22) and (23).
    """

    __test__ = False  # no test class, whatever pytest thinks of the name

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args: Any,
        custom_generate: str | Callable | None = None,
        **kwargs: Any,
    ) -> GenerateOutput | Tensor:
        """Generate as the model class does, with test-time training where a `ttt_lr` asks for it."""
        saved = [config.to_dict() for config in (generation_config, self.generation_config) if config is not None]
        if custom_generate is None and any("ttt_lr" in settings for settings in (kwargs, *saved)):
            refuse_paged(kwargs)
            if "streamer" in kwargs:  # which `generate` gives to no custom method
                kwargs["ttt_streamer"] = kwargs.pop("streamer")
            custom_generate = ttt_generate
        return super().generate(inputs, generation_config, *args, custom_generate=custom_generate, **kwargs)
