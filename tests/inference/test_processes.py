"""What the processes of a job share out is what one process does alone, and they keep pace."""

import json
from pathlib import Path

import pytest

from hf_coverage.inference.processes import map_over_processes, split_over_processes
from tests.processes import run


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("processes_ranks.py")
    run(script, folder, ranks=2)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_both_processes_have_all_results_in_order(ranks):
    for facts in ranks:
        assert facts["mapped"] == [0, 1, 4, 9, 16]
        assert facts["split"] == [[0, "a"], [1, "b"], [0, "c"]]
        assert facts["few"] == ["a"]
        assert facts["none"] == []


def test_items_are_taken_in_rounds_of_one_each_that_all_take_part_in(ranks):
    assert ranks[0]["events"] == [0, [0, 1, 0], 2, [2, 3, 2], 4, [4, 4]]
    assert ranks[1]["events"] == [1, [0, 1, 1], 3, [2, 3, 3], [4, None]]


def test_one_process_does_all():
    rounds = []
    assert map_over_processes(str, [1, 2], after_round=lambda *what: rounds.append(what)) == ["1", "2"]
    assert rounds == [([1], 1), ([2], 2)]
    assert map_over_processes(str, []) == []
    assert split_over_processes(lambda own: own, []) == []


def test_a_function_that_loses_an_item_is_found_out():
    with pytest.raises(ValueError, match="shorter"):
        split_over_processes(lambda own: own[1:], [1, 2])
