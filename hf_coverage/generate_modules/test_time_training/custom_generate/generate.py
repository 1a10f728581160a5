"""Test-time training for `generate(custom_generate=...)`, by the package `hf-coverage`."""

from typing import Any

from hf_coverage.ttt.generate import refuse_paged, ttt_generate


def generate(model: Any, streamer: Any = None, **arguments: Any) -> Any:
    """Sample or decode greedily with a gradient step after every token; see the card."""
    refuse_paged(arguments)
    # The arguments are those of the call, nothing is prepared yet: the model's own `generate` does that.
    return model.generate(custom_generate=ttt_generate, ttt_streamer=streamer, **arguments)
