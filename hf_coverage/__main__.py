"""`python -m hf_coverage`: the command line, for launchers that start modules."""

from hf_coverage.cli import app

app(prog_name="hf-coverage")
