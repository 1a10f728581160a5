"""Runs a command that finds models in a cache of the Hub of its own, as `HF_HOME` says it to a new interpreter."""

import os
import sys

from huggingface_hub import constants

from hf_coverage.cli import app

if __name__ == "__main__":
    constants.HF_HUB_CACHE = os.path.join(os.environ["HF_HOME"], "hub")
    app(sys.argv[1:])
