"""A pytest plugin: tests marked `jobs` run one at a time, whichever workers have them."""

import os
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Run one job of several processes at a time: together they would want more cores and time than there is."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None or item.get_closest_marker("jobs") is None:
        return (yield)
    with FileLock(Path(tempfile.gettempdir()) / f"hf_coverage-jobs-{run}.lock"):
        return (yield)
