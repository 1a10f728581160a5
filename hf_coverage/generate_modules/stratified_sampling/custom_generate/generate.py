"""Stratified sampling for `generate(custom_generate=...)`, by the package `hf-coverage`."""

from typing import Any

from hf_coverage.decode.stratified import METHOD, stratified_generate
from hf_coverage.ttt.generate import refuse_paged


def generate(model: Any, **arguments: Any) -> Any:
    """Sample responses that find at least as much between them as independent ones; see the card."""
    refuse_paged(arguments, METHOD)
    # The arguments are those of the call, nothing is prepared yet: the model's own `generate` does that.
    return model.generate(custom_generate=stratified_generate, **arguments)
