"""What comes out of test-time training: a report, its figures, and everything as JSON."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hf_coverage.functional.coverage_profile import coverage
from hf_coverage.inference.files import strict_json
from hf_coverage.measure.profile import CoverageProfile
from hf_coverage.measure.scoring import PLAIN
from hf_coverage.plots import COLORS, new_axes, save_figure
from hf_coverage.report.table import Interval, Table
from recipes.tables import show, write_tables
from recipes.test_time_training.measured import (
    BIN,
    MODES,
    Choices,
    Followed,
    Results,
    all_choices,
    binned_changes,
    change_a_token,
    log_ratios_of,
    rule_label,
)
from recipes.test_time_training.tables import known_table, safety_table, scope_table, text_table, transfer_table

__all__ = ["report"]


def report(output: Path, results: Results) -> None:
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
        tables += [known_table(results, quantity) for quantity in ("KL", "Cov_N")]
        draw_known(results, output / "known_density.png")
    if results.scoped:
        tables.append(scope_table(results))
    sentences = explain(results, choices)
    write_tables(output / "report.md", tables, sentences)
    strict_json(facts(results, choices), output / "findings.json")
    show(tables, [*sentences, f"Written: {output / 'report.md'}, findings.json and the figures beside it"])


def explain(results: Results, choices: Choices) -> list[str]:
    """Sentences on what no table shows."""
    lines = []
    for label, choice_of in (("covers more", True), ("covers less", False)):
        found = [
            f"{name} ({mode})"
            for (name, mode), choice in choices.items()
            if (choice.difference.high < 0 if choice_of else choice.difference.low > 0)
        ]
        lines.append(
            f"The step size that half chooses {label} on the other half, beyond chance, of: {_listed(found)}."
        )
    likelier = [f"{name} ({mode})" for (name, mode), c in choices.items() if c.cross_entropy_difference.high < 0]
    lines.append(f"Its cross-entropy there is lower, beyond chance, on: {_listed(likelier)}.")
    for name, rule in results.rules.items():
        exact = rule_label(replace(rule, top_k=None))
        both = [kind for kind, part in results.texts.items() if name in part and exact in results.safety.get(kind, {})]
        pairs = [(results.texts[kind][name], results.safety[kind][exact]) for kind in both]
        changes = [abs((cut[: len(part)] - part).sum(axis=1)).max() for cut, part in pairs]
        if name != exact and changes:
            lines.append(f"{name}: cutting the steps changed a whole response by at most {max(changes):.2g} nats.")
    return lines


def facts(results: Results, choices: Choices) -> dict[str, Any]:
    """Everything for `findings.json`."""

    def changes(parts: Mapping[str, Followed]) -> dict[str, Any]:
        return {
            kind: {name: change_a_token(followed, name)._asdict() for name in followed if name != PLAIN}
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


def draw_known(results: Results, path: Path) -> None:
    """Coverage profiles of the students, as they are and with steps of every size on the response."""
    columns = min(3, len(results.known))
    figure = Figure(figsize=(3.4 * columns, 3.0 * -(-len(results.known) // columns)), dpi=120, layout="constrained")
    axes = list(figure.subplots(-(-len(results.known) // columns), columns, squeeze=False).flat)
    lines: list[Line2D] = []
    for ax, (student, known) in zip(axes, results.known.items()):
        profile = CoverageProfile.from_log_ratios(log_ratios_of(known, PLAIN))
        top = max(8.0, 1.2 * float(np.quantile(profile.log_ratios, 0.95)))
        curve = profile.curve(np.exp(np.linspace(0, top, 193)))
        lines = ax.plot(np.log(curve.n), curve.value, color=COLORS[6], linewidth=2, label="as it is")
        ax.fill_between(np.log(curve.n), curve.low, curve.high, color=COLORS[6], alpha=0.1, linewidth=0)
        rules = [(name, rule) for name, rule in results.rules.items() if name in known.followed and not rule.on_prompt]
        for (name, rule), color in zip(rules, COLORS):
            covered = coverage(log_ratios_of(known, name), curve.n)
            lines += ax.plot(np.log(curve.n), covered, color=color, linewidth=1.4, label=f"steps of {rule.lr:g}")
        ax.set_title(student)
        ax.set_ylim(-0.02, 1.02)
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[len(results.known) :]:
        ax.set_axis_off()
    for ax in axes[max(0, len(results.known) - columns) : len(results.known)]:
        ax.set_xlabel("log N (nats)")
    for ax in axes[::columns]:
        ax.set_ylabel("Cov$_N$ (lower is better)")
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False)
    save_figure(figure, path)


def _error_line(ax: Axes, x: list[float], values: list[Interval], color: str, label: str) -> None:
    centre, low, high = np.array(values).T
    ax.errorbar(
        x, centre, [centre - low, high - centre], color=color, marker="o", markersize=4, capsize=2, label=label
    )


def _listed(names: list[str]) -> str:
    return "; ".join(names) if names else "none"
