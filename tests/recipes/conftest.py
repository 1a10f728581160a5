"""What the recipes change for their whole process is changed back."""

import pytest
from transformers.utils import logging


@pytest.fixture(autouse=True)
def progress_bars():
    """Recipes turn the progress bars of transformers and the Hub off, which tests of the library look at."""
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module", autouse=True)
def rough_figures(figures_not_arranged):
    """What a figure shows is looked at by eye, and in the tests of plots."""
