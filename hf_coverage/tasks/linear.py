"""The autoregressive linear model as a model of `transformers`.

    p_theta(y_h | x, y_1..h-1)  proportional to  exp <theta, phi(x, y_1..h)>

It is the class of models that the theory of coverage is about, and small enough to know everything of: importing this
module makes `AutoModelForCausalLM` know it too.

References:
    arXiv 2510.15020, Equation (3).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from hf_coverage.tasks.linear_features import FeatureMap, TableFeatures

__all__ = ["AutoregressiveLinearConfig", "AutoregressiveLinearForCausalLM"]

_TABLE = "table"


class AutoregressiveLinearConfig(PreTrainedConfig):
    """Configuration of the autoregressive linear model.

    Args:
        vocab_size: Size of the vocabulary, prompts' tokens included.
        feature_map_name: `"table"`, or `module:class` of the feature map: what has to be given again on loading.
        table_shape: Shape of a feature table; None with another feature map.
    """

    model_type = "autoregressive_linear"

    vocab_size: int = 3
    feature_map_name: str = _TABLE
    table_shape: list[int] | None = None
    use_cache: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None


class _LinearHead(nn.Module):
    """The output head: <theta, phi> for every token, of features that come with the axes of token and feature joined.

    Args:
        num_features: d.
        vocab_size: Logits to give; tokens without features get -inf.
    """

    def __init__(self, num_features: int, vocab_size: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(num_features))
        self.vocab_size = vocab_size

    def forward(self, features: Tensor) -> Tensor:
        """Turn features `(..., V d)` into logits `(..., vocab_size)`."""
        logits = features.unflatten(-1, (-1, len(self.theta))) @ self.theta
        return nn.functional.pad(logits, (0, self.vocab_size - logits.shape[-1]), value=float("-inf"))


class AutoregressiveLinearForCausalLM(PreTrainedModel, GenerationMixin):
    """Causal language model that is log-linear in given features: `p(y_h | x, y_<h) ~ exp <theta, phi(x, y_1..h)>`.

    theta (`model.theta`) starts at 0, where every next token is equally likely, and is the only parameter. Tokens of
    the vocabulary that the feature map gives no features, such as those of prompts, have probability 0.

    A table of features is saved with the weights and needs nothing on loading. Any other feature map is code: it is
    never imported from what a file says, but has to be given again, as in `from_pretrained(folder, feature_map=...)`;
    that also holds for `AutoModelForCausalLM.from_pretrained`.

    Args:
        config: The configuration; `from_features` makes one.
        feature_map: The features; None for a table that `from_pretrained` fills.

    Raises:
        ValueError: If the feature map is missing, is not the one the configuration names, cannot be named, has
            trainable parameters, or more tokens than the vocabulary.

    Example:
        >>> table = torch.zeros(5, 3, 2)  # ids 0, 1, 2 are responses' tokens, 3 and 4 are prompts
        >>> table[3] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
        >>> model = AutoregressiveLinearForCausalLM.from_features(TableFeatures(table), vocab_size=5)
        >>> _ = model.theta.data.copy_(torch.tensor([1.0, 0.0]))
        >>> model(torch.tensor([[3]])).logits.softmax(-1)
        tensor([[[0.6652, 0.2447, 0.0900, 0.0000, 0.0000]]], grad_fn=<SoftmaxBackward0>)

    References:
        arXiv 2510.15020, Equation (3).
    """

    config_class = AutoregressiveLinearConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    # One step does not continue the last one, it starts again from the prefix: what rewinds a cache is refused.
    _is_stateful = True

    def __init__(self, config: AutoregressiveLinearConfig, feature_map: FeatureMap | None = None) -> None:
        super().__init__(config)
        if feature_map is None:
            if config.feature_map_name != _TABLE or config.table_shape is None:
                raise ValueError(
                    f"`feature_map` must be given: the features of this model are `{config.feature_map_name}`, and "
                    "code is not imported from a configuration; pass an instance, `from_pretrained(folder, "
                    "feature_map=...)`."
                )
            feature_map = TableFeatures(torch.zeros(config.table_shape))
        _check_features(feature_map, config)
        self.feature_map = feature_map
        self.lm_head = _LinearHead(feature_map.num_features, config.vocab_size)
        self.post_init()

    @classmethod
    def from_features(
        cls, feature_map: FeatureMap, *, vocab_size: int | None = None, **config: Any
    ) -> AutoregressiveLinearForCausalLM:
        """Make the model of a feature map, at theta = 0.

        Args:
            feature_map: The features.
            vocab_size: Size of the vocabulary; by default the tokens of the features, for a table its first axis.
            config: Further values of the configuration, such as `eos_token_id`.

        Returns:
            The model.
        """
        table = feature_map.table if isinstance(feature_map, TableFeatures) else None
        if vocab_size is None:
            vocab_size = feature_map.num_tokens if table is None else table.shape[0]
        shape = None if table is None else list(table.shape)
        settings = AutoregressiveLinearConfig(
            vocab_size=vocab_size, feature_map_name=_name_of(feature_map), table_shape=shape, **config
        )
        return cls(settings, feature_map)

    @property
    def theta(self) -> nn.Parameter:
        """The parameters theta `(d,)`."""
        return self.lm_head.theta

    def get_output_embeddings(self) -> nn.Module:
        """The output head, which maps the features of all tokens to logits."""
        return self.lm_head

    def get_input_embeddings(self) -> nn.Module:
        """Refuse: the model reads its input through the feature map."""
        raise NotImplementedError("An autoregressive linear model has no input embeddings.")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutput:
        """Compute logits, and the loss where there are labels.

        Args:
            input_ids: Prompts and responses `(B, T)`.
            attention_mask: `(B, T)`, 0 at padding, which may stand on the left or on the right.
            labels: Token ids `(B, T)`, -100 where none is wanted; shifted here, as everywhere in `transformers`.
            logits_to_keep: How many of the last positions get logits, or which; 0: all.
            kwargs: For the loss, such as `num_items_in_batch`.

        Returns:
            `loss` and `logits` `(B, T, vocab_size)`.

        Raises:
            ValueError: If padding stands between tokens.
        """
        features = self._features(input_ids, attention_mask)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(features.flatten(-2)[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Give each step of `generate` the whole prefix: there is no cache."""
        return {"input_ids": input_ids, "attention_mask": attention_mask, "logits_to_keep": 1}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _features(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Features `(B, T, V, d)`; what is padded on the left is moved, so that feature maps never meet padding."""
        if attention_mask is None:
            return self.feature_map(input_ids).to(self.theta.dtype)
        mask = attention_mask.bool()
        skipped = mask.int().argmax(-1, keepdim=True)
        places = torch.arange(mask.shape[1], device=mask.device)
        if not torch.equal(mask, (places >= skipped) & (places < skipped + mask.sum(-1, keepdim=True))):
            raise ValueError("`attention_mask` must be 1 over one stretch of each row: padding on one side only.")
        moved = input_ids.gather(1, (places + skipped).clamp_max(mask.shape[1] - 1))
        back = (places - skipped).clamp_min(0)[..., None, None]
        features = self.feature_map(moved).to(self.theta.dtype)
        return features.gather(1, back.expand(-1, -1, *features.shape[2:]))

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, _LinearHead):
            nn.init.zeros_(module.theta)


def _name_of(feature_map: FeatureMap) -> str:
    """What the configuration calls a feature map."""
    kind = type(feature_map)
    return _TABLE if kind is TableFeatures else f"{kind.__module__}:{kind.__qualname__}"


def _check_features(feature_map: FeatureMap, config: AutoregressiveLinearConfig) -> None:
    if not isinstance(feature_map, FeatureMap):
        raise TypeError(f"`feature_map` must be a `FeatureMap`, got {type(feature_map).__name__}; derive from it.")
    name = _name_of(feature_map)
    if "<locals>" in name:
        raise ValueError(f"`feature_map` must be of a class that can be imported, got {name}; define it in a module.")
    if name != config.feature_map_name:
        raise ValueError(
            f"`feature_map` must be the one the model was made with, {config.feature_map_name}, got {name}."
        )
    if feature_map.num_tokens > config.vocab_size:
        raise ValueError(
            f"`vocab_size` must be at least {feature_map.num_tokens}, the tokens with features, got "
            f"{config.vocab_size}."
        )
    if any(parameter.requires_grad for parameter in feature_map.parameters()):
        raise ValueError("`feature_map` must have no trainable parameters: the model is linear in theta alone.")


AutoConfig.register(AutoregressiveLinearConfig.model_type, AutoregressiveLinearConfig)
AutoModelForCausalLM.register(AutoregressiveLinearConfig, AutoregressiveLinearForCausalLM)
