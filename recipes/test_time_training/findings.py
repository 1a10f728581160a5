"""What comes out of test-time training: tables, figures, sentences and JSON, from log-probabilities alone."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray
from rich.console import Console

from hf_coverage.functional.checks import FloatArray
from hf_coverage.functional.statistics import clustered_mean, mean_interval
from hf_coverage.functional.ttt_config import TTTConfig
from hf_coverage.measure.strict_json import strict_json
from hf_coverage.plots import COLORS, new_axes, save_figure
from hf_coverage.report.table import Cell, Column, Interval, Table
from hf_coverage.select.tune_ttt import TTTChoice, split_groups, tune_ttt
from recipes.test_time_training.following import PLAIN, Followed

__all__ = ["Known", "Results", "Scoped", "change_a_token", "choose", "report", "telling_n"]

MODES = {"the response": False, "the prompt too": True}
"""Which tokens steps are made on."""

FACTOR = 4
"""How many times likelier or less likely a text must become to be counted."""

BIN = 128
"""Tokens that a point of the curve over positions is a mean of."""


@dataclass(frozen=True)
class Known:
    """Responses drawn from a reference whose density is known.

    Attributes:
        reference: `(R,)` log D(y|x), nats.
        followed: what a student makes of them.
    """

    reference: FloatArray
    followed: Followed


@dataclass(frozen=True)
class Scoped:
    """A few short texts under one rule of any scope; None is the model as it is."""

    kind: str
    rule: TTTConfig | None
    logprobs: FloatArray
    num_tokens: int


@dataclass(frozen=True)
class Results:
    """All that was measured.

    Attributes:
        rules: those of `texts` and `known`, by name.
        texts: by kind.
        long: by kind, over positions.
        safety: by kind.
        known: by student and reference.
        scoped: other things than the head.
    """

    rules: Mapping[str, TTTConfig]
    texts: dict[str, Followed]
    long: dict[str, Followed]
    safety: dict[str, Followed]
    known: dict[str, Known]
    scoped: dict[str, Scoped]


def report(output: Path, results: Results, console: Console) -> None:
    """Write `report.md`, `findings.json` and the figures, of the parts that were run."""
    choices = dict(all_choices(results))
    tables: list[Table] = []
    if results.texts:
        tables += [text_table(results, choices), transfer_table(results, choices)]
        draw_rates(results, output / "step_sizes.png")
    if results.long:
        draw_positions(results, output / "positions.png")
    if results.safety:
        tables.append(safety_table(results))
    if results.known:
        tables.append(known_table(choices))
        draw_known(choices, output / "known_density.png")
    if results.scoped:
        tables.append(scope_table(results))
    sentences = explain(results, choices)
    text = "\n\n".join(f"{table.caption}\n\n{table.to_markdown()}" for table in tables)
    text += "\n\n" + "\n".join(f"- {sentence}" for sentence in sentences) + "\n"
    (output / "report.md").write_text(text, encoding="utf-8")
    strict_json(facts(results, choices), output / "findings.json")
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(f"Written: {output / 'report.md'}, findings.json and the figures beside it", markup=False)


def all_choices(results: Results) -> Iterator[tuple[tuple[str, str], TTTChoice]]:
    """The step size that one half of the texts chooses, judged on the other half, by name and mode."""
    for mode, on_prompt in MODES.items():
        rules = {name: rule for name, rule in results.rules.items() if rule.on_prompt == on_prompt}
        for kind, followed in results.texts.items():
            yield (kind, mode), choose(followed, rules)
        for name, known in results.known.items():
            yield (name, mode), choose(known.followed, rules, known.reference)


def choose(followed: Followed, rules: Mapping[str, TTTConfig], reference: FloatArray | None = None) -> TTTChoice:
    """Choose among the rules that were tried by Cov_N, at an N at which the model as it is misses half of the rows."""
    rules = {name: rule for name, rule in rules.items() if name in followed}
    totals = {name: followed[name].sum(axis=1, dtype=np.float64) for name in (PLAIN, *rules)}
    return tune_ttt(
        totals[PLAIN],
        {rule: totals[name] for name, rule in rules.items()},
        n=telling_n(totals[PLAIN], reference),
        reference_logprobs=reference,
        groups=range(len(totals[PLAIN])),
    )


def telling_n(logprobs: FloatArray, reference: FloatArray | None = None) -> float:
    """The N, e to a whole number and at least 4, at which the model misses about half of the responses."""
    ratios = -logprobs if reference is None else reference - logprobs
    return max(4.0, math.exp(round(float(np.median(ratios)))))


def change_a_token(followed: Followed, name: str, rows: NDArray[np.bool_] | slice = slice(None)) -> Interval:
    """Cross-entropy of a rule less that of the model as it is, nats a token, with its 95 % interval over texts."""
    return _mean((followed[PLAIN][rows] - followed[name][rows]).astype(np.float64).mean(axis=1))


def text_table(results: Results, choices: Mapping[tuple[str, str], TTTChoice]) -> Table:
    """Real text: cross-entropy and the bound on coverage at the chosen step size, on the half that did not choose."""
    rows: list[list[Cell]] = []
    for (kind, mode), choice in choices.items():
        if kind not in results.texts:
            continue
        tokens = results.texts[kind][PLAIN].shape[1]
        before, after = (_logprobs(profile) for profile in (choice.plain, choice.adapted))
        gained = after - before
        rows.append(
            [
                kind,
                mode,
                f"{choice.rule.lr:g}",
                float(-before.mean() / tokens),
                _mean(-gained / tokens),
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
    half = len(next(iter(choices.values())).plain.log_ratios)
    return Table(
        columns,
        rows,
        f"Real text: the step size that half of the texts choose by the bound on Cov_N, judged on the other {half} of "
        "each kind. Cross-entropy of the model as it is and how test-time training changes it, and the same of the "
        "upper bound on Cov_N; below zero is better, 95 % intervals over texts. Then the shares of texts that become "
        f"at least {FACTOR} times likelier and at least {FACTOR} times less likely.",
    )


def transfer_table(results: Results, choices: Mapping[tuple[str, str], TTTChoice]) -> Table:
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


def known_table(choices: Mapping[tuple[str, str], TTTChoice]) -> Table:
    """References of known density: KL and Cov_N at the chosen step size, on the half that did not choose."""
    rows: list[list[Cell]] = []
    for (name, mode), choice in choices.items():
        if choice.plain.is_upper_bound:
            continue
        rows.append(
            [
                name,
                mode,
                f"{choice.rule.lr:g}",
                choice.plain.kl,
                Interval(*choice.cross_entropy_difference[:3]),
                choice.n,
                choice.plain.cov(choice.n),
                Interval(*choice.difference[:3]),
            ]
        )
    columns: list[Column | str] = ["student, reference", "steps on", "lr", Column("KL (nats)"), Column("change")]
    return Table(
        [*columns, Column("N"), Column("Cov_N"), Column("change ")],
        rows,
        "References of known density: samples of the model at a temperature, and what covers them: the model itself, "
        "or what a compression left of it, or it with a short context. The step size is chosen on half of the prompts "
        "and judged on the other; N is where about half of the responses are missed by the student as it is, and at "
        "least 4. Below zero is better, 95 % intervals over prompts.",
    )


def safety_table(results: Results) -> Table:
    """Steps that are too large, and what keeps them near: change of cross-entropy by kind."""
    first = next(iter(results.safety.values()))
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
    first = next(iter(results.scoped.values()))
    plain = {scoped.kind: scoped for scoped in results.scoped.values() if scoped.rule is None}
    rows: list[list[Cell]] = []
    for scoped in results.scoped.values():
        if scoped.rule is None:
            continue
        before = plain[scoped.kind]
        cache = "–" if scoped.rule.scope == "head" else scoped.rule.cache
        change = _mean((before.logprobs - scoped.logprobs) / scoped.num_tokens)
        level = float(-before.logprobs.mean() / before.num_tokens)
        rows.append([scoped.kind, scoped.rule.scope, f"{scoped.rule.lr:g}", cache, level, change])
    return Table(
        ["text", "what is trained", "lr", "keys and values", Column("nats a token"), Column("change")],
        rows,
        f"What is trained: {first.num_tokens} tokens of the first {len(first.logprobs)} texts "
        "of a kind, steps on the prompt too. Cross-entropy of the model as it is and its change; below zero is "
        "better, 95 % intervals over texts.",
    )


def explain(results: Results, choices: Mapping[tuple[str, str], TTTChoice]) -> list[str]:
    """Sentences on what no table shows."""
    lines = []
    for label, choice_of in (("covers more", True), ("covers less", False)):
        found = [
            f"{name} ({mode})"
            for (name, mode), choice in choices.items()
            if (choice.difference.high < 0 if choice_of else choice.difference.low > 0)
        ]
        lines.append(f"At the chosen step size the adapted model {label}, by more than chance, on: {_listed(found)}.")
    likelier = [f"{name} ({mode})" for (name, mode), c in choices.items() if c.cross_entropy_difference.high < 0]
    lines.append(f"Its cross-entropy is lower by more than chance on: {_listed(likelier)}.")
    for name in results.rules:
        errors = [
            float(followed[f"{name}, error"].max())
            for followed in results.texts.values()
            if f"{name}, error" in followed
        ]
        if errors and max(errors) < 1:
            lines.append(f"{name}: cutting the steps changes a last token by no more than {max(errors):.2g} nats.")
    return lines


def facts(results: Results, choices: Mapping[tuple[str, str], TTTChoice]) -> dict[str, Any]:
    """Everything for `findings.json`."""

    def changes(parts: Mapping[str, Followed]) -> dict[str, Any]:
        return {
            kind: {
                name: change_a_token(followed, name)._asdict()
                for name in followed
                if name != PLAIN and not name.endswith(", error")
            }
            for kind, followed in parts.items()
        }

    known = {name: one.followed for name, one in results.known.items()}
    return {
        "format": 1,
        "change_of_cross_entropy_nats_a_token": {
            "texts": changes(results.texts),
            "known": changes(known),
            "safety": changes(results.safety),
        },
        "positions": {kind: binned_changes(followed) for kind, followed in results.long.items()},
        "choices": {
            f"{name}, steps on {mode}": json.loads(choice.to_json()) for (name, mode), choice in choices.items()
        },
        "scopes": [
            {
                "text": scoped.kind,
                "scope": None if scoped.rule is None else scoped.rule.scope,
                "lr": None if scoped.rule is None else scoped.rule.lr,
                "cache": None if scoped.rule is None else scoped.rule.cache,
                "logprobs": scoped.logprobs,
            }
            for scoped in results.scoped.values()
        ],
    }


def binned_changes(followed: Followed) -> dict[str, list[list[float]]]:
    """Change of cross-entropy by position for each rule: mean, low and high, nats a token, of bins of `BIN` tokens."""
    found = {}
    for name in followed:
        if name == PLAIN or name.endswith(", error"):
            continue
        change = (followed[PLAIN] - followed[name]).astype(np.float64)
        bins = [change[:, start : start + BIN].mean(axis=1) for start in range(0, change.shape[1], BIN)]
        found[name] = [list(_mean(values)) for values in bins]
    return found


def draw_rates(results: Results, path: Path) -> None:
    """Change of cross-entropy over step sizes, a line a kind of text, steps on the response and on the prompt too."""
    figure, axes = new_axes(2, width=5.2, height=4.2)
    lowest = 0.0
    for ax, (mode, on_prompt) in zip(axes, MODES.items()):
        rules = {name: rule for name, rule in results.rules.items() if rule.on_prompt == on_prompt}
        for (kind, followed), color in zip(results.texts.items(), COLORS):
            tried = {
                float(rule.lr): change_a_token(followed, name) for name, rule in rules.items() if name in followed
            }
            _error_line(ax, list(tried), list(tried.values()), color, kind)
            lowest = min(lowest, *(one.value for one in tried.values()))
        ax.set_xscale("log")
        ax.set_xlabel("step size")
        ax.set_title(f"Steps on {mode}")
    axes[0].set_ylabel("change of cross-entropy, nats a token\n(below zero is better)")
    for ax in axes:
        ax.axhline(0, color="#666666", linewidth=1)
        ax.set_ylim(1.6 * lowest, -1.6 * lowest)
    axes[0].legend(frameon=False)
    save_figure(figure, path)


def draw_positions(results: Results, path: Path) -> None:
    """Change of cross-entropy over the position in long texts."""
    kinds = list(results.long)
    figure, axes = new_axes(len(kinds), width=3.2, height=3.4)
    for ax, kind in zip(axes, kinds):
        for (name, bins), color in zip(binned_changes(results.long[kind]).items(), COLORS):
            middles = [BIN * (index + 0.5) for index in range(len(bins))]
            _error_line(ax, middles, [Interval(*one) for one in bins], color, name.split(", top")[0])
        ax.axhline(0, color="#666666", linewidth=1)
        ax.set_xlabel("token of the response")
        ax.set_title(kind)
    axes[0].set_ylabel("change of cross-entropy, nats a token\n(below zero is better)")
    axes[0].legend(frameon=False)
    save_figure(figure, path)


def draw_known(choices: Mapping[tuple[str, str], TTTChoice], path: Path) -> None:
    """Coverage profiles of the students as they are and adapted, a panel a student."""
    shown = {
        name: choice
        for (name, mode), choice in choices.items()
        if not choice.plain.is_upper_bound and mode == "the prompt too"
    }
    figure, axes = new_axes(len(shown), width=2.9, height=3.4)
    for ax, (name, choice) in zip(axes, shown.items()):
        for profile, style, label in ((choice.plain, "-", PLAIN), (choice.adapted, "--", f"lr {choice.rule.lr:g}")):
            top = max(10.0, 1.2 * float(np.quantile(choice.plain.log_ratios, 0.95)))
            curve = profile.curve(np.exp(np.linspace(0, top, 97)))
            color = COLORS[0] if style == "-" else COLORS[1]
            ax.plot(np.log(curve.n), curve.coverage, style, color=color, linewidth=1.8, label=label)
            ax.fill_between(np.log(curve.n), curve.low, curve.high, color=color, alpha=0.12, linewidth=0)
        ax.set_title(name, fontsize=9)
        ax.set_xlabel("log N (nats)")
        ax.set_ylim(-0.02, 1.02)
        ax.legend(frameon=False)
    axes[0].set_ylabel("Cov$_N$ (lower is better)")
    save_figure(figure, path)


def _error_line(ax: Axes, x: list[float], values: list[Interval], color: str, label: str) -> None:
    centre, low, high = np.array(values).T
    ax.errorbar(
        x, centre, [centre - low, high - centre], color=color, marker="o", markersize=4, capsize=2, label=label
    )


def _listed(names: list[str]) -> str:
    return "; ".join(names) if names else "none"


def _mean(values: FloatArray) -> Interval:
    estimate = clustered_mean(values)
    return Interval(estimate.mean, *mean_interval(estimate))


def _logprobs(profile: Any) -> FloatArray:
    return np.asarray(profile.logprobs)
