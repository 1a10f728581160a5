"""Tables and figures of the comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from hf_coverage.plots import COLORS, new_axes, save_figure
from hf_coverage.report.table import Column, Table
from recipes.backtracking.verifiers import SETTINGS
from recipes.tables import show, write_tables

__all__ = ["report"]

EXACT = {
    "guidance": ("guidance", COLORS[1], "o-"),
    "first leaf": ("VGB, first leaf", COLORS[5], "s:"),
    "T steps": ("VGB, $T$ = {mixing:g} $H^2$ steps", COLORS[0], "s--"),
    "H visits": ("VGB, $H$ visits", COLORS[0], "s-"),
}
BUDGET = {
    "VGB, H visits": (COLORS[0], "s-"),
    "VGB, T steps": (COLORS[0], "s--"),
    "VGB, first leaf": (COLORS[5], "s:"),
    "VGB, blocks of 3 tokens": (COLORS[5], "^--"),
    "guidance": (COLORS[1], "o-"),
    "rejection sampling": (COLORS[2], "d-"),
    "block Best-of-N, 1 token": (COLORS[3], "v-"),
    "block Best-of-N, 3 tokens": (COLORS[3], "v--"),
    "Best-of-N": (COLORS[4], "x-"),
}


Moves = dict[int, dict[str, float]]
"""Expected moves to the first good response by H and method."""


def report(output: Path, settings: dict[str, Any], results: dict[str, dict[int, Any]], moves: Moves) -> None:
    """Write `report.md` and the figures."""
    tables = [exact_table(name, found) for name, found in results.items()]
    tables.append(moves_table(moves))
    tables += [budget_table(name, found) for name, found in results.items()]
    write_tables(output / "report.md", tables)
    draw_exact(settings, results, moves, output / "exact.png")
    draw_budget(results, output / "budget.png")
    show(tables, [f"Written: {output / 'report.md'}, exact.png and budget.png beside it"])


def exact_table(name: str, found: dict[int, Any]) -> Table:
    """Exact errors over H."""
    keys = [key for key in next(iter(found.values()))["exact"] if key != "at a leaf"]
    rows = [
        [
            str(h),
            f"{one['prefixes']:,}",
            *(rounded(one["exact"][key]) for key in keys),
            one["exact"]["at a leaf"],
            one["steps"]["guidance"],
            one["steps"]["VGB"],
        ]
        for h, one in found.items()
    ]
    columns = ["H", "prefixes", *keys, "walk at a leaf", "moves of guidance", "moves of VGB"]
    caption = (
        f"{name}, exactly: total variation between the law of the response and p V; the share of time that the walk "
        "is at a leaf in the end; expected moves until the first good response."
    )
    return Table(columns, rows, caption)


def moves_table(moves: Moves) -> Table:
    """What parity costs."""
    rows = [[str(horizon), one["guidance"], one["VGB"]] for horizon, one in moves.items()]
    caption = "parity, exactly: expected moves until the first good response; guidance begins anew at dead ends."
    return Table(["H", "guidance", "VGB"], rows, caption)


def rounded(value: float) -> float:
    """A distance without what floating-point sums leave of 0."""
    return value if value > 1e-9 else 0.0


def budget_table(name: str, found: dict[int, Any]) -> Table:
    """All methods at the longest H."""
    horizon, one = max(found.items())
    keys = ["distance", "success", "distinct", "exhausted", "model_calls", "verifier_calls"]
    titles = [
        Column("distance", "lower"), Column("success", "higher"), "distinct", "budget ran out", "model calls",
        "verifier calls",
    ]  # fmt: skip
    rows = [[method, *(values[key] for key in keys)] for method, values in one["budget"].items()]
    about = next(setting.about for setting in SETTINGS if setting.name == name)
    caption = (
        f"{name}, H = {horizon}, equal budgets: total variation of {about} to p V (responses drawn from p V itself "
        f"have {one['noise']:.3f}), the share of good responses, distinct good ones, and mean calls a response."
    )
    return Table(["method", *titles], rows, caption)


def draw_exact(settings: dict[str, Any], results: dict[str, dict[int, Any]], moves: Moves, path: Path) -> None:
    """Exact errors over H; for parity, where guidance that begins anew has none, what it costs."""
    figure, axes = new_axes(len(results), width=4.2, height=3.8)
    for ax, (name, found) in zip(axes, results.items()):
        if name == "parity":
            for key, label in (("guidance", "guidance, anew at dead ends"), ("VGB", "VGB")):
                _, color, style = EXACT["guidance" if key == "guidance" else "H visits"]
                values = [one[key] for one in moves.values()]
                ax.plot(list(moves), values, style, color=color, label=label, markersize=5)
            dress(ax, name, "expected moves to the first good response", log=True)
            ax.legend(frameon=False)
            continue
        for key, (label, color, style) in EXACT.items():
            values = [one["exact"][key] for one in found.values()]
            ax.plot(list(found), values, style, color=color, label=label.format(**settings), markersize=5)
        dress(ax, name, "total variation to $p\\,V$")
    axes[0].legend(frameon=False)
    save_figure(figure, path)


def draw_budget(results: dict[str, dict[int, Any]], path: Path) -> None:
    """Errors under equal budgets over H."""
    figure, axes = new_axes(len(results), width=4.2, height=4.2)
    for ax, (name, found) in zip(axes, results.items()):
        for key, (color, style) in BUDGET.items():
            values = [one["budget"][key]["distance"] for one in found.values()]
            ax.plot(list(found), values, style, color=color, label=key, markersize=5)
        noise = [one["noise"] for one in found.values()]
        ax.plot(list(found), noise, ":", color="black", label="drawn from $p\\,V$")
        about = next(setting.about for setting in SETTINGS if setting.name == name)
        dress(ax, f"{name}: {about}", "total variation to $p\\,V$")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    save_figure(figure, path)


def dress(ax: Axes, title: str, ylabel: str, *, log: bool = False) -> None:
    """Labels of an axes whose horizontal axis is H."""
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("$H$, tokens of a response")
    ax.set_xticks(sorted({int(h) for line in ax.get_lines() for h in line.get_xdata()}))
    ax.set_ylabel(ylabel)
    if log:
        ax.set_yscale("log")
    else:
        ax.set_ylim(-0.03, 1.03)
