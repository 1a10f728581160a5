"""Results that are read back from JSON: each refuses what is not what it wrote, field by field."""

import copy
import json

import numpy as np
import pytest

from hf_coverage.decode.best_of_n_result import BestOfNResult
from hf_coverage.decode.success import SuccessProfile
from hf_coverage.measure.profile import CoverageProfile
from hf_coverage.select.result import TournamentResult
from hf_coverage.select.tournament import tournament

LOGPROBS = [-1.0, -2.0, -3.0, -4.0]
TABLE = {"a": LOGPROBS, "b": [-4.0, -3.0, -2.0, -2.0], "c": [-9.0, -9.0, -1.0, -9.0]}
OWN = {b: {a: TABLE[a] for a in TABLE} for b in TABLE}
RACED = {name: np.tile(rows, 1000) for name, rows in TABLE.items()}


def failing():
    rewards = np.array([[1.0, 0.0], [0.0, 0.5], [1.0, 1.0]])
    result = BestOfNResult.from_rewards(rewards)
    failed = rewards == 0
    return BestOfNResult(
        "m",
        "v",
        rewards,
        failed,
        result.rows,
        result.prompts,
        {"boom": 2},
        {"boom": {"row": 0}},
        1.0,
        {"top_p": None},
        np.array([0.5, 0.0, 1.0]),
    )


WRITTEN = {
    "density": CoverageProfile.from_logprobs(LOGPROBS, [-0.5] * 4, groups=list("aabb"), weights=[1, 2, 1, 1]),
    "single answer": CoverageProfile.from_logprobs(LOGPROBS, [0.0] * 4, groups=list("abcd")),
    "single answer, intervals": CoverageProfile.from_logprobs(
        LOGPROBS, [0.0] * 4, groups=list("abcd"), interval_lows=[0.0, 0.5, 0.25, 0.9]
    ),
    "samples": CoverageProfile.from_logprobs([*LOGPROBS[:3], -np.inf]),
    "log ratios": CoverageProfile.from_log_ratios([0.0, 1.0, np.inf], groups=list("aab")),
    "tournament": tournament(TABLE, 4, sweep=[2, 8], groups=list("aabc")),
    "tournament, tied": tournament({"a": LOGPROBS, "b": LOGPROBS}, 4),
    "tournament, offset": tournament(TABLE, 16, on_policy=OWN, gamma=0.5),
    "tournament, soft": tournament(TABLE, 4, edge="soft", sweep=[2, 8], groups=list("aabc")),
    "tournament, raced": tournament(RACED, 4, race_confidence=0.9),
    "tournament, without a chance": tournament({"a": LOGPROBS, "b": [-np.inf] * 4}, 4),
    "best of n": failing(),
    "best of n, stratified": BestOfNResult.from_rewards(np.eye(4), sampling="stratified"),
    "success": SuccessProfile.from_counts([0, 1, 4], [4, 4, 8], prompts=["a", "b", 3], accepted_mass=[0.5, np.nan, 1]),
}

DERIVED = {"sentence", "guarantee"}
"""Texts that are made anew."""


def corruptions(value):
    """What a slip, another program or half a file could leave in the place of a field."""
    yield from (None, True, "odd", {}, [], [[]], -7.5, float("nan"), 1e400, {"odd": 1})
    if isinstance(value, list) and value:
        yield from (
            value[:-1],
            [*value, value[-1]],
            [value],
            [None, *value[1:]],
            ["odd", *value[1:]],
            [7.5, *value[1:]],
        )
        yield [[*row[:-1]] if isinstance(row, list) else row for row in value[:-1]]
    if isinstance(value, dict) and value:
        key = next(iter(value))
        yield {name: item for name, item in value.items() if name != key}
        yield from ({**value, key: odd} for odd in (None, "odd", -7.5, [], float("nan")))
        yield {**value, "odd": value[key]}
    if isinstance(value, (int, float)):
        yield from (-value - 1, str(value), [value], value + 1e6)
    if isinstance(value, str):
        yield value + " "


def changed(facts, name):
    for odd in corruptions(facts[name]):
        if not equal(odd, facts[name]):
            yield {**facts, name: odd}
    yield {key: value for key, value in facts.items() if key != name}


def equal(one, other):
    return type(one) is type(other) and json.dumps(one) == json.dumps(other)


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_was_written_is_read(kind):
    text = WRITTEN[kind].to_json()
    assert type(WRITTEN[kind]).from_json(text).to_json() == text


@pytest.mark.parametrize("kind", WRITTEN)
def test_each_corruption_of_a_field_is_refused_or_means_the_same(kind):
    """Whatever is accepted is itself a result that can be written and read."""
    result = WRITTEN[kind]
    facts = json.loads(result.to_json())
    accepted, said = {}, set()
    for name in facts.keys() - DERIVED:
        for odd in changed(copy.deepcopy(facts), name):
            try:
                read = type(result).from_json(json.dumps(odd))
            except ValueError as error:
                said.add(str(error)[:13])
                continue
            assert type(result).from_json(read.to_json()).to_json() == read.to_json()
            accepted.setdefault(name, []).append(odd.get(name, "left out"))
    assert said == {"`source` is n"}
    may_be = MAY_BE[type(result)]
    surprising = {
        name: odd for name, values in accepted.items() for odd in values if not may_be.get(name, _anything)(odd, facts)
    }
    assert surprising == {}


def _anything(odd, facts):
    """A field without a line below must be refused whatever it is."""
    return False


def _order(scores):
    return sorted(scores, key=scores.__getitem__)


MAY_BE = {
    CoverageProfile: {
        "groups": lambda odd, facts: odd is None,
        "weights": lambda odd, facts: odd is None or len(odd) == len(facts["log_ratios"]),
        "logprobs": lambda odd, facts: odd is None and facts["kind"] == "density",
        "log_ratios": lambda odd, facts: facts["logprobs"] is None and len(odd) == len(facts["log_ratios"]),
        "name": lambda odd, facts: isinstance(odd, str),
        "interval_lows": lambda odd, facts: odd in (None, "left out"),
    },
    SuccessProfile: {
        "name": lambda odd, facts: isinstance(odd, str),
        "prompts": lambda odd, facts: len(odd) == len(facts["prompts"]),
        "accepted_mass": lambda odd, facts: len(odd) == len(facts["accepted_mass"]),
        "adaptive": lambda odd, facts: odd is True,
    },
    TournamentResult: {
        "n": lambda odd, facts: odd >= 1,
        "gamma": lambda odd, facts: facts["gamma"] is not None and odd > facts["gamma"],
        "cross_entropies": lambda odd, facts: odd.keys() == facts["cross_entropies"].keys(),
        "edge": lambda odd, facts: odd == "left out" and facts["edge"] == "hard",
        "scores": lambda odd, facts: facts["edge"] == "soft" and _order(odd) == _order(facts["scores"]),
        "win_rates": lambda odd, facts: odd == {},
        "dropped": lambda odd, facts: odd == {},
        "suggested_n": lambda odd, facts: odd is None,
        "num_rows": lambda odd, facts: odd > facts["num_rows"],
        "sweep": lambda odd, facts: isinstance(odd, list) and all(point in facts["sweep"] for point in odd),
        "race_confidence": lambda odd, facts: odd is None and not facts["dropped"],
    },
    BestOfNResult: {
        "name": lambda odd, facts: isinstance(odd, str),
        "verifier": lambda odd, facts: isinstance(odd, str),
        "settings": lambda odd, facts: isinstance(odd, dict),
        "examples": lambda odd, facts: odd == {},
        "threshold": lambda odd, facts: odd is None or isinstance(odd, float),
        "accepted_mass": lambda odd, facts: odd in (None, "left out") or len(odd) == len(facts["accepted_mass"]),
    },
}
"""What a field may be besides what was written: that, too, is what a result can be."""
