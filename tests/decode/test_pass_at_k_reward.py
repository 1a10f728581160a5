"""Pass@k as TRL's reward: groups on one process and two, in a real GRPO step, and what is refused."""

import json

import pytest

from hf_coverage.decode.pass_at_k_reward import PassAtKReward
from hf_coverage.functional.group_rewards import pass_at_k_rewards
from tests.decode import pass_at_k_ranks
from tests.decode.exploration_runs import Record, grpo_trainer, tiny_llama
from tests.decode.pass_at_k_ranks import COMPLETIONS, PROMPTS, number
from tests.processes import run


def expected():
    found = [0.0] * len(PROMPTS)
    for prompt in ("a", "b", PROMPTS[-1]):
        rows = [row for row, one in enumerate(PROMPTS) if one == prompt]
        for row, value in zip(rows, pass_at_k_rewards([[float(COMPLETIONS[row]) for row in rows]], 2)[0]):
            found[row] = value
    return found


def test_a_group_is_all_completions_of_a_prompt():
    found = PassAtKReward(number, 2)(prompts=PROMPTS, completions=COMPLETIONS)
    assert found == pytest.approx(expected())
    assert found == pytest.approx([1.5, 0, 0, 1, 0.5, 0, 1, 0])


def test_two_processes_reward_as_one(tmp_path):
    run(pass_at_k_ranks.__file__, tmp_path, ranks=2)
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert found[0] + found[1] == pytest.approx(expected())
    assert [len(part) for part in found] == [3, 5]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # of TRL
def test_a_grpo_step_is_given_what_the_groups_earned(tmp_path):
    def long(completion_ids, **columns):
        return [float(len(ids) > 3) for ids in completion_ids]

    record = Record()
    reward = PassAtKReward(long, 3)
    trainer = grpo_trainer(
        tmp_path, tiny_llama(vocab_size=400), [reward, record], ["one two", "three"], scale_rewards=False
    )
    trainer.train()
    assert reward.__name__ == "pass_at_3_long"
    logged = list(trainer._logs["rewards"]["pass_at_3_long"])
    plain = [float(len(ids) > 3) for ids in record.given["completion_ids"]]
    assert len(set(plain)) == 2
    groups = [plain[start : start + 4] for start in (0, 4)]
    assert logged == pytest.approx(pass_at_k_rewards(groups, 3).ravel().tolist())


def test_none_for_a_whole_group_passes_through():
    def only_a(prompts, **columns):
        return [1.0 if prompt == "a" else None for prompt in prompts]

    assert PassAtKReward(only_a, 2)(prompts=["a", "b", "a", "b"], completions=["x"] * 4) == [0.0, None, 0.0, None]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: PassAtKReward("number", 2), TypeError, "must be a reward function"),
        (lambda: PassAtKReward(number, 0), ValueError, "at least 1, got 0"),
        (lambda: PassAtKReward(number, 1.5), ValueError, "at least 1, got 1.5"),
        (
            lambda: PassAtKReward(number, 3)(prompts=["a", "a"], completions=["1", "1"]),
            ValueError,
            "more than the 2 completions of a group: set `num_generations`",
        ),
        (
            lambda: PassAtKReward(number, 1)(prompts=["a"], completions=["nan"]),
            ValueError,
            "row 0, column 0 is nan",
        ),
        (
            lambda: PassAtKReward(lambda **_: [1.0, None], 1)(prompts=["a", "a"], completions=["1", "1"]),
            ValueError,
            'some completions alone of the prompt "a"',
        ),
    ],
)
def test_bad_rewards_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_coroutine_is_refused():
    async def later(**_):
        return []

    with pytest.raises(TypeError, match="must not be a coroutine"):
        PassAtKReward(later, 1)
