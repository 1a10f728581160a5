"""Tournaments over score tables and arrays: which candidate covers best, with no density of the data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, TypeVar, Union

from numpy.typing import ArrayLike

from hf_coverage.functional.checks import FloatArray, check_logprobs, check_n
from hf_coverage.functional.tournament import OnPolicy, hold_tournament, separating_n
from hf_coverage.functional.tournament_racing import Race, race
from hf_coverage.functional.tournament_soft import hold_soft_tournament
from hf_coverage.functional.tournament_standing import Standing
from hf_coverage.measure.score_table import ScoreTable
from hf_coverage.select.result import Edge, SweepPoint, TournamentResult

__all__ = ["Candidate", "by_name", "read_candidates", "tournament"]

_T = TypeVar("_T")

Candidate = Union[ArrayLike, ScoreTable, "PathLike[str]", str]
"""Log p(y_i|x_i) of all rows, or the score table that holds them, or its folder."""


def tournament(
    candidates: Mapping[str, Candidate],
    n: float = 16,
    *,
    edge: Edge = "hard",
    groups: Iterable[Any] | None = None,
    sweep: Sequence[float] = (),
    on_policy: Mapping[str, Mapping[str, ArrayLike]] | None = None,
    on_policy_groups: Mapping[str, Iterable[Any]] | None = None,
    gamma: float = 1.0,
    bootstrap: int = 1000,
    seed: int = 0,
    race_confidence: float | None = None,
) -> TournamentResult:
    """Pick the candidate with the best coverage by measuring the candidates by each other.

    `C[a, b] = mean_i 1[log p_a(y_i|x_i) - log p_b(y_i|x_i) >= log N]`, `score(b) = max_a C[a, b]`, and the least score
    wins: no other candidate shows much that the winner has given up. Nothing but held-out responses `y_i ~ D` is
    needed. With `on_policy` it is the offset tournament, `score(b) = max_a { C[a, b] - 2 g O[a, b] }`, where O is C on
    responses drawn from b itself.

    With `edge="soft"` a challenge is `mean_i exp(-N p_b(y_i|x_i) / p_a(y_i|x_i))`, and the challenger all candidates
    together: nothing ties, and over our experiments it chose better. Either finds what is good at more than N samples;
    where log D is known `choose` does better than both.

    Score tables are read shard by shard into the table of all candidates, M x R float64. Beyond it less than 1 GB is
    needed, also with 64 candidates and 1,000,000 rows.

    Args:
        candidates: By name, log p(y_i|x_i) of the same R rows `(R,)` in nats, or a `ScoreTable`, or its folder.
        n: N of the challenges, a real number > 1; the larger, the rarer the challenges.
        edge: `"hard"`, the paper's, or `"soft"`, which has no `on_policy`, no race and no bootstrap.
        groups: `(R,)` the prompt of each row, if prompts repeat.
        sweep: More N to hold the tournament at, in the same pass.
        on_policy: For the offset tournament, by name of the candidate that generated S responses, each candidate's log
            p of them `(S,)`; the candidate's own must be the density that they were drawn from.
        on_policy_groups: By name of the generating candidate, the prompt of each response `(S,)`, if prompts repeat.
        gamma: g, the weight of the offset; Theorem 6.4 asks for g >= 1 and N >= 8 g^2.
        bootstrap: How often prompts are drawn anew for the win rates; 0 for none.
        seed: Of the bootstrap and of the race.
        race_confidence: Drop hopeless candidates early, such that whoever has the least score survives with this
            probability, for example 0.99; for hundreds of candidates. None compares all on all rows.

    Returns:
        The result.

    Raises:
        ValueError: If tables were scored on different corpora, sizes differ, or values are no log-probabilities; names
            the candidate, and the file.

    Example:
        >>> result = tournament({"early": [-1.0, -2.0, -2.0, -2.0], "late": [-1.0, -1.0, -1.0, -8.0]}, n=4)
        >>> result.winner, result.cross_entropy_choice, result.scores
        ('early', 'early', {'early': 0.0, 'late': 0.25})

    References:
        arXiv 2510.15020, Section 6.3, Eq. (28), (29), (32), (101), Theorems 6.3 and 6.4.
    """
    if not isinstance(candidates, Mapping) or not candidates:
        raise ValueError("`candidates` must map at least one name to log-probabilities or a score table.")
    candidates = by_name(candidates, "candidates")
    names = tuple(candidates)
    levels = list(dict.fromkeys(check_n(value) for value in (n, *sweep)))
    table = read_candidates(candidates)
    offset = _offset(names, on_policy, on_policy_groups, gamma)
    if edge == "soft":
        if offset or race_confidence is not None:
            raise ValueError("`edge` 'soft' has no offset and no race: leave `on_policy` and `race_confidence` out.")
        standing, *others = hold_soft_tournament(table, levels, groups=groups)
        points = tuple(_point(other, names) for other in others)
        return _result(names, standing, None, None, table[0].size, points, None, edge)
    if edge != "hard":
        raise ValueError(f"`edge` must be 'hard' or 'soft', but is {edge!r}.")
    raced = None
    if race_confidence is not None:
        if sweep or offset:
            raise ValueError(
                "`race_confidence` is for one N and the simple tournament: leave `sweep` and `on_policy` out."
            )
        raced = race(table, levels[0], confidence=race_confidence, seed=seed)
    standing, *others = hold_tournament(
        table,
        levels,
        groups=groups,
        replicates=bootstrap,
        seed=seed,
        defenders=None if raced is None else raced.survivors,
        **offset,
    )
    points = tuple(_point(other, names) for other in others)
    suggested = None
    if len(standing.tied) > 1 and standing.scores[standing.ranking[0]] == 0:
        fitting = [point.n for point in points if not point.ties and point.n < standing.n]
        search = offset | {"race_confidence": race_confidence, "seed": seed}
        suggested = max(fitting, default=None) or separating_n(table, standing.n, **search)
    return _result(names, standing, raced, gamma if offset else None, table[0].size, points, suggested)


def by_name(given: Mapping[Any, _T], what: str) -> dict[str, _T]:
    """A mapping whose keys, numbers among them, are names; two that read the same would be one."""
    named = {str(key): value for key, value in given.items()}
    if len(named) < len(given):
        raise ValueError(f"`{what}` must have different names, but {list(given)} do not all read differently.")
    return named


def read_candidates(candidates: Mapping[str, Candidate]) -> list[FloatArray]:
    """All candidates' log-probabilities, after checking that they speak of the same rows."""
    first: tuple[ScoreTable, str] | None = None
    rows: list[FloatArray] = []
    for name, source in candidates.items():
        if isinstance(source, (str, PathLike)):
            source = ScoreTable.open(source)
        if isinstance(source, ScoreTable):
            first = first or (source, name)
            _check_same_corpus(source, name, *first)
            source = source.logprob
        values = check_logprobs(source, name=f"candidates[{name!r}]")
        if rows and values.size != rows[0].size:
            raise ValueError(
                f"`candidates` must all be scored on the same rows, but {next(iter(candidates))!r} has "
                f"{rows[0].size:,} and {name!r} has {values.size:,}."
            )
        rows.append(values)
    return rows


def _check_same_corpus(table: ScoreTable, name: str, first: ScoreTable, first_name: str) -> None:
    mine, expected = table.metadata.get("corpus"), first.metadata.get("corpus")
    if mine != expected:
        raise ValueError(
            f"{table.folder / 'metadata.json'} says that {name!r} was scored on another corpus than {first_name!r} "
            f"({first.folder}): its fingerprint is {mine}, expected {expected}. Score both on the same rows, with the "
            "same tokenizer."
        )


def _offset(
    names: Sequence[str],
    on_policy: Mapping[str, Mapping[str, ArrayLike]] | None,
    groups: Mapping[str, Iterable[Any]] | None,
    gamma: float,
) -> dict[str, Any]:
    """The offset arguments of `hold_tournament`, in the order of the names; empty for the simple tournament."""
    if on_policy is None:
        return {}
    on_policy = {b: by_name(given, f"on_policy[{b!r}]") for b, given in by_name(on_policy, "on_policy").items()}
    groups = by_name(groups or {}, "on_policy_groups")
    for what, given in (("on_policy", on_policy), *((f"on_policy[{b!r}]", on_policy[b]) for b in on_policy)):
        if set(given) != set(names):
            raise ValueError(f"`{what}` must have an entry for each candidate, {list(names)}, but has {list(given)}.")
    sets = [OnPolicy([on_policy[b][a] for a in names], groups.get(b)) for b in names]
    return {"on_policy": sets, "gamma": gamma}


def _point(standing: Standing, names: Sequence[str]) -> SweepPoint:
    winner = names[standing.ranking[0]]
    return SweepPoint(standing.n, winner, _ties(standing, names), _named(names, standing.scores))


def _named(names: Sequence[str], values: Iterable[float]) -> dict[str, float]:
    return {name: float(value) for name, value in zip(names, values)}


def _ties(standing: Standing, names: Sequence[str]) -> tuple[str, ...]:
    return tuple(names[m] for m in standing.tied) if len(standing.tied) > 1 else ()


def _result(
    names: tuple[str, ...],
    standing: Standing,
    raced: Race | None,
    gamma: float | None,
    num_rows: int,
    sweep: tuple[SweepPoint, ...],
    suggested_n: float | None,
    edge: Edge = "hard",
) -> TournamentResult:
    rates, scores, means, ranking = standing.rates, standing.scores, standing.mean_challenges, list(standing.ranking)
    dropped = [] if raced is None else sorted(set(range(len(names))) - set(raced.survivors))
    if raced is not None and dropped:
        rates[:, dropped] = raced.rates[:, dropped]
        scores[dropped], means[dropped] = rates[:, dropped].max(0), rates[:, dropped].sum(0) / (len(names) - 1)
        # Whoever was dropped later was harder to tell from the best.
        ranking += sorted(dropped, key=lambda m: (-raced.rows[m], scores[m]))
    wins = standing.win_rates
    return TournamentResult(
        names=names,
        n=standing.n,
        rates=rates,
        offsets=standing.offsets,
        gamma=gamma,
        scores=_named(names, scores),
        mean_challenges=_named(names, means),
        cross_entropies=_named(names, standing.cross_entropies),
        ranking=tuple(names[m] for m in ranking),
        ties=_ties(standing, names),
        decided_by=standing.decided_by,
        win_rates={} if wins is None else {names[m]: float(wins[m]) for m in standing.ranking},
        num_rows=num_rows,
        num_prompts=standing.num_groups,
        sweep=sweep,
        suggested_n=suggested_n,
        dropped={} if raced is None else {names[m]: int(raced.rows[m]) for m in dropped},
        race_confidence=None if raced is None else raced.confidence,
        edge=edge,
    )
