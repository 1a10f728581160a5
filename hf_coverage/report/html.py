"""One HTML file that holds a whole result: the sentence, the numbers, the pictures, and where they came from.

The file needs nothing from anywhere: pictures and scripts are embedded, and a content security policy in the page lets
it load nothing and run no script but these. Without profiles there is no script at all.
"""

import base64
import io
import json
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
from hf_coverage.inference.files import strict_json, write_atomically
from hf_coverage.measure.profile import CoverageProfile
from hf_coverage.report.explorer import explore, scripts
from hf_coverage.report.table import Interval, Table, format_cell, format_number
from hf_coverage.report.wording import how_to_read, what_is_known
from hf_coverage.select.choose import Choice

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
    profiles: Sequence[CoverageProfile] = (),
    n: float = 16,
    choice: Choice | None = None,
    kinds: Iterable[ReferenceKind] = ("density",),
    budget: bool = True,
    provenance: Mapping[str, object] | None = None,
) -> Path:
    """Write a result as one self-contained HTML file.

    Args:
        path: The file; its folder is made where it does not exist.
        title: What was measured.
        summary: What the numbers say, in plain sentences; the first one is set large, those after the third folded.
        tables: In the order of the page; numbers, intervals and the best value of each ranked column are set apart.
        figures: Pictures, embedded.
        profiles: Models that readers look into at every N: a slider that orders them, charts with what stands at a
            point and lines to hide, a table to take along. None leaves that, and all scripts, out.
        n: The N that the slider begins at.
        choice: What was chosen among the profiles, one a candidate and in their order.
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
    explorer = explore(profiles, n=n, choice=choice) if profiles else None
    code = [] if explorer is None else scripts()
    page = _template().render(
        title=title,
        summary=summary,
        tables=[*tables, *([explorer.table()] if explorer is not None and len(profiles) > 1 else [])],
        figures=figures,
        explorer=explorer,
        scripts=code,
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
    environment.filters |= {"subscript": _subscript, "cell": _cell, "level": _level, "value": _value, "json": _json}
    environment.globals["picture"] = Picture
    text = resources.files(__package__).joinpath("templates/report.html.j2").read_text(encoding="utf-8")
    return environment.from_string(text)


def _subscript(text: object) -> Markup:
    """Escaped text with the N of `Cov_16`, `miss_N` and the like set as a subscript."""
    return Markup(re.sub(r"\b(Cov|miss|score)_(N|[0-9]+(?:\.[0-9]+)?)", r"\1<sub>\2</sub>", str(escape(text))))


def _level(label: str, n: str) -> Markup:
    """A label with the N that the slider stands at in the place of the letter."""
    return Markup(re.sub(r"(_|@)N\b", rf'\1<span class="level">{n}</span>', str(escape(label))))


def _value(cell: object) -> object:
    """What a cell is sorted by; text is None."""
    return cell.value if isinstance(cell, Interval) else cell if isinstance(cell, (int, float)) else None


def _json(facts: Mapping[str, object]) -> Markup:
    """JSON as it may stand in a page: nothing in it ends the element that it is in."""
    return Markup(json.dumps(json.loads(strict_json(facts)), separators=(",", ":")).replace("<", "\\u003c"))


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
