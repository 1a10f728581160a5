"""Runs a command whose first passes wait until a file is gone, having said by another one that it is there."""

import sys
import time
from pathlib import Path

from hf_coverage.cli import app
from hf_coverage.commands import score


def load_model(*arguments):
    Path("here").touch()
    while Path("here").exists():
        time.sleep(0.01)
    return original(*arguments)


original = score.load_model
if __name__ == "__main__":
    score.load_model = load_model
    app(sys.argv[1:])
