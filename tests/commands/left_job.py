"""Runs a command in a job, and says in the end whether the process is still part of it."""

import sys

from torch import distributed

from hf_coverage.cli import app

if __name__ == "__main__":
    try:
        app(sys.argv[1:])
    finally:
        print("STAYED" if distributed.is_initialized() else "LEFT", flush=True)
