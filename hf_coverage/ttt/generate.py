"""Test-time training as a decoding method, for `generate(custom_generate=...)`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateNonBeamOutput

from hf_coverage.functional.ttt_config import TTTCache, TTTConfig, TTTScope
from hf_coverage.inference.forward import is_sharded
from hf_coverage.ttt.adapted_scores import Adapted, AdaptedHeads, AdaptedNetworks, AdaptedScores, EndWatch

__all__ = ["refuse_paged", "ttt_generate"]


def ttt_generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    ttt_lr: float | None = None,
    ttt_scope: TTTScope | None = None,
    ttt_on_prompt: bool | None = None,
    ttt_radius: float | None = None,
    ttt_decay: float | None = None,
    ttt_lam: float | None = None,
    ttt_top_k: int | None = None,
    ttt_steps: int | None = None,
    ttt_rank: int | None = None,
    ttt_cache: TTTCache | None = None,
    ttt_streamer: BaseStreamer | None = None,
    **model_kwargs: Any,
) -> GenerateNonBeamOutput | Tensor:
    """Sample or decode greedily with one gradient step after every token.

        theta <- Proj( theta + lr grad log p_theta(y_h | x, y_<h) ),    from the model's theta again in each call

    Not called by hand: `model.generate(..., custom_generate=ttt_generate, ttt_lr=0.1)`, with everything that
    `generate` takes for sampling and greedy decoding. Whatever changes scores (penalties, guidance, masks,
    temperature, top-p, ...) acts on those of the adapted model. Rows that have ended make no steps. The model is not
    changed. With `return_dict_in_generate=True` the result has `token_logprobs` `(B, T)`, the log-probability that the
    adapted model itself gave to each new token, in nats, before anything else changed its scores, and 0 after the end
    of a row; their sum is `log p_TTT(y|x)`. `scores`, where asked for, are what tokens were chosen from; `logits`,
    hidden states, attentions and the cache are those of the plain model.

    theta is the output head, whose steps have a closed form and cost little; or adapters, or all parameters, of every
    row on its own. Of these two a step takes the gradient of what the model returns, whatever it does to its logits,
    and with an exact cache reads all that was written so far once more. Their passes are without dropout. During those
    with all parameters the model has the row's in the place of its own: no other thread may use it meanwhile.

    `cache_implementation="paged"` must not be asked for: `generate` then calls no custom method, and says nothing. It
    gives its `tokenizer` to none either: in the place of `stop_strings` give it
    `stopping_criteria=[StopStringCriteria(tokenizer, strings)]`.

    Settings that are not given are those of the generation configuration, and those that it does not have either are
    the ones below. To save them with a model give it a configuration made by `GenerationConfig(ttt_lr=0.1, ...)`: one
    that `transformers` derived from the model's (`_from_model_config`) is loaded without them.

    Args:
        model: Given by `generate`, as are the next four and `model_kwargs`.
        input_ids: Token ids `(B, L)`.
        logits_processor: What `generate` prepared.
        stopping_criteria: Likewise.
        generation_config: Likewise.
        ttt_lr: Step size eta, at least 0; 0 is plain `generate`, bit for bit. Needed.
        ttt_scope: What is trained: `"head"`, the output head; `"lora"`, adapters of low rank beside all linear layers
            but the head, which begin as PEFT's do; `"all"`, all parameters, in a copy for every row. The head.
        ttt_on_prompt: Whether to take a step after each token of the prompt as well (dynamic evaluation); no.
        ttt_radius: R of the ball `||theta - theta_0|| <= R` that theta is kept in; no ball.
        ttt_decay: Part of the way back to theta_0 that every step begins with, in [0, 1]; 0.
        ttt_lam: Lambda of normalised steps; plain gradient steps.
        ttt_top_k: Cut the error of a step of the head to the chosen token and the k likeliest ones; exact.
        ttt_steps: Steps on each token; 1.
        ttt_rank: Rank of the adapters; 8.
        ttt_cache: For adapters and all parameters: `"exact"` reads the whole prefix with the parameters of each step;
            `"stale"` leaves the keys and values of earlier tokens as they were computed, and takes the gradient
            through the newest token alone, for a cost per token that does not grow with the prefix. Exact.
        ttt_streamer: What gets the tokens as they come. `generate` gives its own `streamer` to no custom method.
        model_kwargs: Arguments of the model.

    Returns:
        As `generate`: token ids `(B, L + T)`, or a dictionary with `sequences`.

    Raises:
        RuntimeError: Under DeepSpeed ZeRO-3, for adapters and all parameters.
        ValueError: If the mode of decoding, the scope or a number is none that works here; for the head, if the model
            has none that is linear or changes its logits afterwards; for the others, if it is sharded, quantised
            (`"all"`), has adapters already, or reads more than token ids, or `"stale"` finds no keys and values.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> _ = torch.manual_seed(0)
        >>> config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11, bos_token_id=0, eos_token_id=None)
        >>> model, ids = GPT2LMHeadModel(config).eval(), torch.tensor([[1, 2]])
        >>> settings = {"max_new_tokens": 6, "do_sample": True, "return_dict_in_generate": True}
        >>> result = model.generate(ids, custom_generate=ttt_generate, ttt_lr=1.0, **settings)
        >>> result.sequences.shape, result.token_logprobs.shape
        (torch.Size([1, 8]), torch.Size([1, 6]))

    References:
        arXiv 2510.15020, Equations (22) and (23).
    """
    given = {
        "lr": ttt_lr,
        "scope": ttt_scope,
        "on_prompt": ttt_on_prompt,
        "radius": ttt_radius,
        "decay": ttt_decay,
        "lam": ttt_lam,
        "top_k": ttt_top_k,
        "steps": ttt_steps,
        "rank": ttt_rank,
        "cache": ttt_cache,
    }
    config = _config(given, generation_config.to_dict())
    if config.lr == 0:  # nothing can move, and the prompt is read as ever, bit for bit
        config = replace(config, on_prompt=False)
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        raise ValueError(
            f"Test-time training works for sampling and greedy decoding, got {mode.value.replace('_', ' ')}; generate "
            "with `num_beams=1` and without what else asks for that."
        )
    adapted = _adapted(model, input_ids, config, generation_config, model_kwargs)
    if config.on_prompt and config.scope == "head":
        model_kwargs.pop("logits_to_keep", None)  # or the head would only see the last position
    if ttt_streamer is not None:
        ttt_streamer.put(input_ids.cpu())
    watch = EndWatch(stopping_criteria)
    scores = AdaptedScores(adapted, watch)
    try:
        # The loop itself is the host's, which has no public name for it.
        result = model._sample(
            input_ids,
            logits_processor=LogitsProcessorList([scores, *logits_processor]),
            stopping_criteria=watch,
            generation_config=generation_config,
            synced_gpus=is_sharded(model) and PartialState().num_processes > 1,
            streamer=ttt_streamer,
            **model_kwargs,
        )
    finally:
        adapted.close()
    if generation_config.return_dict_in_generate:
        result["token_logprobs"] = scores.finish(result.sequences, start=input_ids.shape[1])
    return result


def refuse_paged(arguments: dict[str, Any]) -> None:
    """Raise ValueError if these arguments of `generate` make it batch continuously, and never call `ttt_generate`."""
    if arguments.get("cache_implementation") == "paged":
        raise ValueError(
            "Test-time training does not work with continuous batching, which calls no custom method of decoding: "
            'generate without `cache_implementation="paged"`.'
        )


def _config(given: dict[str, Any], saved_config: dict[str, Any]) -> TTTConfig:
    """What was given, or else what the generation configuration has under its name, or else the default."""
    saved = {name.removeprefix("ttt_"): value for name, value in saved_config.items() if name.startswith("ttt_")}
    unknown = sorted(set(saved) - set(given))
    if unknown:
        names = ", ".join(f"`ttt_{name}`" for name in given)
        raise ValueError(f"`generation_config` has a setting `ttt_{unknown[0]}`, expected some of {names}.")
    chosen = saved | {name: value for name, value in given.items() if value is not None}
    if chosen.get("lr") is None:
        raise ValueError("`ttt_lr` must be given, the step size: `generate(..., ttt_lr=0.1)`.")
    if isinstance(chosen["lr"], Tensor):
        raise ValueError(f"`ttt_lr` must be one number for all rows, got {chosen['lr']}.")
    if "steps" in chosen:
        chosen["num_steps"] = chosen.pop("steps")
    return TTTConfig(**chosen)


def _adapted(
    model: PreTrainedModel,
    input_ids: Tensor,
    config: TTTConfig,
    generation_config: GenerationConfig,
    model_kwargs: dict[str, Any],
) -> Adapted:
    given = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids, dtype=torch.bool) if given is None else given.bool()
    if config.scope == "head":
        new_tokens = generation_config.max_length - input_ids.shape[1]
        return AdaptedHeads(model, config, mask, new_tokens=new_tokens)
    repeats = generation_config.num_return_sequences or 1
    return AdaptedNetworks(model, config, mask, repeats=repeats, arguments=model_kwargs)
