"""A model under DeepSpeed ZeRO-3 is refused by name: without all its parameters it would hang, or score nonsense."""

import pytest
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from datasets import Dataset
from transformers.integrations import deepspeed

from hf_coverage.measure.builders import sample_corpus
from hf_coverage.measure.scoring import score_responses

CORPUS = Dataset.from_dict({"prompt": [[1, 2]], "completion": [[3, 4]]})


@pytest.fixture
def under_deepspeed():
    """Makes a DeepSpeed configuration the one that transformers sees, as the Trainer and accelerate do."""
    alive = []

    def configure(stage):
        alive.append(HfDeepSpeedConfig({"zero_optimization": {"stage": stage}}))
        deepspeed.set_hf_deepspeed_config(alive[-1])

    yield configure
    deepspeed.unset_hf_deepspeed_config()


def calls(model, folder):
    return [
        lambda: score_responses(model, None, CORPUS, progress=False),
        lambda: score_responses(model, None, CORPUS, progress=False, output_dir=folder / "scores"),
        lambda: sample_corpus(model, None, [[1, 2]], k=1, max_new_tokens=2, progress=False),
    ]


def test_zero_3_is_refused_with_the_way_out(tiny_gpt2, tmp_path, under_deepspeed):
    under_deepspeed(3)
    for call in calls(tiny_gpt2, tmp_path):
        with pytest.raises(RuntimeError, match=r"ZeRO-3 can neither be scored.*`hf-coverage score`.*ZeRO-2 or FSDP"):
            call()
    assert not (tmp_path / "scores").exists()


def test_zero_2_is_not(tiny_gpt2, tmp_path, under_deepspeed):
    under_deepspeed(2)
    for call in calls(tiny_gpt2, tmp_path):
        assert len(call()) == 1
