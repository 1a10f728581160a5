"""Tables of what test-time training does."""

import math

import numpy as np

from hf_coverage.functional.coverage_profile import coverage
from hf_coverage.functional.paired import paired_coverage_difference, paired_kl_difference
from hf_coverage.measure.scoring import PLAIN
from hf_coverage.report.table import Cell, Column, Interval, Table
from hf_coverage.select.tune_ttt import split_groups
from recipes.tables import interval_of
from recipes.test_time_training.measured import (
    MODES,
    Choices,
    Results,
    change_a_token,
    first_of,
    log_ratios_of,
    telling_n,
)

__all__ = ["known_table", "safety_table", "scope_table", "text_table", "transfer_table"]

FACTOR = 4
"""How many times likelier or less likely a text must become to be counted."""


def text_table(results: Results, choices: Choices) -> Table:
    """Real text: cross-entropy and the bound on coverage at the chosen step size, on the half that did not choose."""
    rows: list[list[Cell]] = []
    for (kind, mode), choice in choices.items():
        if kind not in results.texts:
            continue
        tokens = results.texts[kind][PLAIN].shape[1]
        before, after = (np.asarray(profile.logprobs) for profile in (choice.plain, choice.adapted))
        gained = after - before
        rows.append(
            [
                kind,
                mode,
                f"{choice.rule.lr:g}",
                float(-before.mean() / tokens),
                interval_of(-gained / tokens),
                f"{math.log(choice.n):.0f}",
                choice.plain.cov_upper(choice.n),
                Interval(*choice.difference[:3]),
                f"{(gained >= math.log(FACTOR)).mean():.2f}",
                f"{(gained <= -math.log(FACTOR)).mean():.2f}",
            ]
        )
    columns: list[Column | str] = ["text", "steps on", "lr", Column("nats a token"), Column("change")]
    columns += ["log N", Column("Cov_N at most"), Column("change ")]
    columns += [f"{FACTOR} times likelier", f"{FACTOR} times less likely"]
    half = next(iter(choices.values())).plain.num_rows
    return Table(
        columns,
        rows,
        f"Real text: the step size that half of the texts choose by the bound on Cov_N, judged on the other {half} of "
        "each kind. Cross-entropy of the model as it is and how test-time training changes it, and the same of the "
        "upper bound on Cov_N; below zero is better, Student's intervals over texts. Then the shares of texts that "
        f"become at least {FACTOR} times likelier and at least {FACTOR} times less likely.",
    )


def transfer_table(results: Results, choices: Choices) -> Table:
    """The step size that one kind of text chooses, used on another."""
    names = {rule: name for name, rule in results.rules.items()}
    rows: list[list[Cell]] = []
    for chosen_on in results.texts:
        choice = choices[chosen_on, "the prompt too"]
        cells: list[Cell] = [chosen_on, f"{choice.rule.lr:g}"]
        for followed in results.texts.values():
            judged = ~split_groups(range(len(followed[PLAIN])))
            cells.append(change_a_token(followed, names[choice.rule], judged))
        rows.append(cells)
    return Table(
        ["step size chosen on", "lr", *(Column(f"on {kind}") for kind in results.texts)],
        rows,
        "Another kind of text than the step size was chosen on, steps on the prompt too: change of cross-entropy, "
        "nats a token, below zero is better.",
    )


def known_table(results: Results, quantity: str) -> Table:
    """References of known density: KL or Cov_N of the students as they are, and its change at every step size."""
    rules = [(name, rule) for name, rule in results.rules.items() if name in first_of(results.known).followed]
    rates = list(dict.fromkeys(float(rule.lr) for _, rule in rules))
    responses = len(first_of(results.known).reference)
    rows: list[list[Cell]] = []
    for mode, on_prompt in MODES.items():
        for student, known in results.known.items():
            plain = log_ratios_of(known, PLAIN)
            n = telling_n(known.reference - plain, known.reference)
            adapted = [log_ratios_of(known, name) for name, rule in rules if rule.on_prompt == on_prompt]
            cells: list[Cell] = [student, mode]
            if quantity == "KL":
                cells.append(interval_of(plain))
                cells += [Interval(*paired_kl_difference(ratios, plain)[:3]) for ratios in adapted]
            else:
                cells += [f"{math.log(n):.1f}", coverage(plain, n)]
                cells += [Interval(*paired_coverage_difference(ratios, plain, n)[:3]) for ratios in adapted]
            rows.append(cells)
    columns: list[Column | str] = ["student, reference", "steps on"]
    columns += ["KL (nats)"] if quantity == "KL" else ["log N", Column("Cov_N")]
    return Table(
        [*columns, *(Column(f"change at {rate:g}") for rate in rates)],
        rows,
        f"{quantity} to references of known density: samples of the model at a temperature, or with a taste, covered "
        "by the model itself, by what a compression left of it or by it with a short context; and the change that "
        f"steps of every size make, below zero is better. All {responses} responses, Student's intervals."
        + ("" if quantity == "KL" else " N is where about half of them are missed, and at least 4."),
    )


def safety_table(results: Results) -> Table:
    """Steps that are too large, and what keeps them near: change of cross-entropy by kind."""
    first = first_of(results.safety)
    rows: list[list[Cell]] = [
        [name, *(change_a_token(followed, name) for followed in results.safety.values())]
        for name in first
        if name != PLAIN
    ]
    return Table(
        ["steps", *(Column(kind) for kind in results.safety)],
        rows,
        "Steps that are too large, as they are, in a ball around the head, drawn back to it, and divided by the norm "
        f"of their gradient; on the response, exact. Change of cross-entropy, nats a token, of the first "
        f"{len(first[PLAIN])} texts of each kind; below zero is better.",
    )


def scope_table(results: Results) -> Table:
    """The head beside adapters and all parameters, on a few texts."""
    first = first_of(results.scoped)
    plain = {scoped.kind: scoped for scoped in results.scoped.values() if scoped.rule is None}
    rows: list[list[Cell]] = []
    for scoped in results.scoped.values():
        if scoped.rule is None:
            continue
        before = plain[scoped.kind]
        cache = "–" if scoped.rule.scope == "head" else scoped.rule.cache
        change = interval_of((before.logprobs - scoped.logprobs) / scoped.num_tokens)
        level = float(-before.logprobs.mean() / before.num_tokens)
        rows.append([scoped.kind, scoped.rule.scope, f"{scoped.rule.lr:g}", cache, level, change])
    return Table(
        ["text", "what is trained", "lr", "keys and values", Column("nats a token"), Column("change")],
        rows,
        f"What is trained: {first.num_tokens} tokens of the first {len(first.logprobs)} texts "
        "of a kind, steps on the prompt too. Cross-entropy of the model as it is and its change; below zero is "
        "better, Student's intervals over texts.",
    )
