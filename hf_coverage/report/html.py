"""One HTML file that holds a whole result: the sentence, the numbers, the pictures, and where they came from.

The file needs nothing from anywhere: pictures are embedded, there is no script, and a content security policy in the
page keeps it so.
"""

import base64
import io
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Union

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from hf_coverage import __version__
from hf_coverage.functional.checks import ReferenceKind
from hf_coverage.inference.files import write_atomically
from hf_coverage.report.table import Interval, Table, format_cell, format_number
from hf_coverage.report.wording import how_to_read, what_is_known

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MatplotlibFigure

__all__ = ["Picture", "write_html_report"]

PictureSource: TypeAlias = Union[str, "PathLike[str]", bytes, "MatplotlibFigure"]

_PNG = b"\x89PNG\r\n\x1a\n"
_SIGNATURES = {_PNG: "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif"}


@dataclass(frozen=True)
class Picture:
    """A picture with its caption.

    Attributes:
        source: A PNG, JPEG, GIF or SVG file, its bytes, or a matplotlib figure.
        caption: What it shows; also its text for readers who cannot see it, unless `alt` says more.
        alt: Text for readers who cannot see it.
    """

    source: PictureSource
    caption: str
    alt: str = ""

    @cached_property
    def content(self) -> bytes:
        """The picture's bytes; a figure is drawn as PNG."""
        return _picture_bytes(self.source)

    @property
    def is_wide(self) -> bool:
        """Whether the picture needs the width of the page, as several plots side by side do."""
        if not self.content.startswith(_PNG):
            return False
        width, height = struct.unpack(">II", self.content[16:24])
        return width > 1.8 * height

    def data_uri(self) -> str:
        """The picture as a `data:` address.

        Raises:
            ValueError: If it is of none of the formats above.
            OSError: If the file cannot be read.
        """
        kind = next((kind for signature, kind in _SIGNATURES.items() if self.content.startswith(signature)), None)
        if kind is None and b"<svg" in self.content[:2000]:
            kind = "image/svg+xml"
        if kind is None:
            raise ValueError(
                f"`source` of the picture {self.caption!r} must be PNG, JPEG, GIF or SVG, but begins with "
                f"{self.content[:8]!r}; save it as .png."
            )
        return f"data:{kind};base64,{base64.b64encode(self.content).decode('ascii')}"


def write_html_report(
    path: str | PathLike[str],
    *,
    title: str,
    summary: Sequence[str],
    tables: Sequence[Table],
    figures: Sequence[Picture] = (),
    kinds: Iterable[ReferenceKind] = ("density",),
    budget: bool = True,
    provenance: Mapping[str, object] | None = None,
) -> Path:
    """Write a result as one self-contained HTML file.

    Args:
        path: The file; its folder is made where it does not exist.
        title: What was measured.
        summary: What the numbers say, in plain sentences; the first one is set large.
        tables: In the order of the page; numbers, intervals and the best value of each ranked column are set apart.
        figures: Pictures, embedded.
        kinds: What is known of the references, for the explanations of what is an estimate and what only a bound;
            empty where a verifier's verdicts are all that is known.
        budget: Whether the page speaks of Best-of-N budgets, which are then explained.
        provenance: Names and values of everything needed to run it again: the command, versions, seeds, fingerprints.

    Returns:
        The path.

    Raises:
        ValueError: If `summary` is empty or a picture's format is not known.

    Example:
        >>> import tempfile
        >>> page = write_html_report(
        ...     Path(tempfile.mkdtemp()) / "report.html",
        ...     title="Coverage of <my model>",
        ...     summary=["Cov_16 is 0.125; lower is better."],
        ...     tables=[Table(["model", "Cov_16"], [["my model", 0.125]])],
        ... )
        >>> "Coverage of &lt;my model&gt;" in page.read_text(encoding="utf-8")
        True
    """
    if isinstance(summary, str) or not summary:
        raise ValueError("`summary` must be a list of at least one sentence that says what the numbers mean.")
    kinds = tuple(dict.fromkeys(kinds))
    page = _template().render(
        title=title,
        summary=summary,
        tables=tables,
        figures=figures,
        reading=how_to_read(kinds),
        known=what_is_known(kinds, budget=budget),
        provenance=provenance or {},
        version=__version__,
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, page)
    return target


def _template():  # type: ignore[no-untyped-def]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"subscript": _subscript, "cell": _cell}
    text = resources.files(__package__).joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(text)


def _subscript(text: object) -> Markup:
    """Escaped text with the N of `Cov_16` and `Cov_N` set as a subscript."""
    return Markup(re.sub(r"\b(Cov)_(N|[0-9]+(?:\.[0-9]+)?)", r"\1<sub>\2</sub>", str(escape(text))))


def _cell(cell: object) -> Markup:
    if isinstance(cell, Interval):
        value, low, high = (format_number(part) for part in cell)
        return Markup('{} <span class="interval">[{}, {}]</span>').format(value, low, high)
    return _subscript(format_cell(cell))  # type: ignore[arg-type]


def _picture_bytes(source: PictureSource) -> bytes:
    if isinstance(source, bytes):
        return source
    if isinstance(source, (str, PathLike)):
        return Path(source).read_bytes()
    buffer = io.BytesIO()
    source.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    return buffer.getvalue()
