"""The page of an `evaluate` module's Space: a table of log-probabilities in, the results out.

`evaluate.utils.launch_gradio_widget` needs gradio 3, whose numpy the current pyarrow refuses; this is written for the
current gradio.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import evaluate
from evaluate.utils.gradio import parse_readme

__all__ = ["build_widget", "computation", "launch_widget"]

_EXAMPLE = ["-1.2", "-3.5", "-9.0"]


def launch_widget(script: Path) -> None:
    """Serve the page of the module `script`, with the README.md beside it below the table."""
    build_widget(script).launch()


def build_widget(script: Path) -> Any:
    """Build the `gradio.Interface` of the module `script`.

    Raises:
        ImportError: If gradio is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise ImportError("the page of an evaluate module needs gradio: `pip install gradio`.") from error
    module = evaluate.load(str(script))
    names = list(module.features)
    compute = computation(module)

    def show(rows: Sequence[Sequence[str]], n: str) -> dict[str, float | str]:
        try:
            # JSON has no infinity and no NaN, and the browser takes JSON
            return {key: value if abs(value) < float("inf") else str(value) for key, value in compute(rows, n).items()}
        except ValueError as error:
            raise gradio.Error(str(error)) from error

    table = gradio.Dataframe(
        headers=names,
        datatype="str",
        type="array",
        column_count=len(names),
        row_count=len(_EXAMPLE),
        value=[[value] * len(names) for value in _EXAMPLE],
        label="log-probabilities of whole responses, in nats",
    )
    return gradio.Interface(
        fn=show,
        inputs=[table, gradio.Textbox("2, 4, 8, 16", label="n")],
        outputs=gradio.JSON(label=module.name),
        title=module.name,
        description=module.description,
        article=parse_readme(str(script.with_name("README.md"))),
    )


def computation(module: evaluate.EvaluationModule) -> Callable[[Sequence[Sequence[str]], str], dict[str, float]]:
    """Make a function of the page's text out of a module: rows of cells, and the N with commas between them.

    Rows of empty cells alone are left out.

    Example:
        >>> import hf_coverage
        >>> compute = computation(evaluate.load(hf_coverage.evaluate_module("coverage")))
        >>> compute([["-9", "-1"], ["-inf", "-2"], ["-1", "-1"], ["", ""]], "2, 16")["cov_16"]
        0.6666666666666666
    """
    names = list(module.features)

    def compute(rows: Sequence[Sequence[str]], n: str) -> dict[str, float]:
        filled = [row for row in rows if any(str(cell).strip() for cell in row)]
        columns = {name: [float(row[i]) for row in filled] for i, name in enumerate(names)}
        return module.compute(**columns, n=[float(value) for value in n.split(",") if value.strip()])

    return compute
