"""What the recipes change for their whole process is changed back."""

import pytest
from transformers.utils import logging


@pytest.fixture(autouse=True)
def progress_bars():
    """Recipes turn the progress bars of transformers and the Hub off, which tests of the library look at."""
    yield
    logging.enable_progress_bar()
