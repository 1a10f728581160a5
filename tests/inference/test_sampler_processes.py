"""A corpus does not depend on the number of processes that sample it."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.inference.sampling_ranks import build, results_of
from tests.processes import run


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run(Path(__file__).with_name("sampling_ranks.py"), folder, ranks=2)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_every_process_has_the_same(ranks):
    assert ranks[0] == ranks[1]


@pytest.mark.parametrize("setup", ["plain", "ddp", "fsdp2"])
def test_equal_to_one_process(ranks, setup):
    expected = results_of(build())
    assert expected["five"]["completion"][0] != expected["five"]["completion"][1]
    for name, columns in ranks[0][setup].items():
        for column, values in columns.items():
            if column.endswith(("logprob", "stderr")):
                np.testing.assert_allclose(values, expected[name][column], atol=1e-5)
            else:
                assert values == expected[name][column], (name, column)


def test_fsdp1_is_refused(ranks):
    assert "shard it by FSDP2" in ranks[0]["fsdp1"]
