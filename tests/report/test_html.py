import base64
import html.parser
import re

import pytest
from matplotlib.figure import Figure

from hf_coverage.report.html import Picture, write_html_report
from hf_coverage.report.table import Column, Interval, Table

SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>'


class Page(html.parser.HTMLParser):
    """Tags that were opened and not closed, every address, and the text."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, source):
        super().__init__()
        self.open, self.addresses, self.tags, self.text = [], [], [], ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def write(tmp_path):
    def write(**changes):
        arguments = {
            "title": "Coverage of one model",
            "summary": ["Cov_16 is 0.125."],
            "tables": [Table(["model", Column("Cov_5.7", "lower")], [["a", Interval(0.2, 0.1, 0.3)], ["b", 0.4]])],
        }
        path = write_html_report(tmp_path / "new" / "report.html", **(arguments | changes))
        return path.read_text(encoding="utf-8")

    return write


def test_the_page_is_well_formed_and_says_everything(write):
    figure = Figure()
    figure.add_subplot()
    source = write(figures=[Picture(figure, "Cov_N over N")], provenance={"command": "hf-coverage report", "seed": 3})
    page = Page(source)
    assert page.open == []
    for text in ("Coverage of one model", "0.200", "[0.100, 0.300]", "0.400", "hf-coverage report", "How to read it"):
        assert text in page.text
    assert source.index("How to read it") < source.index("What is an estimate") < source.index("Where it comes from")
    assert "Cov<sub>16</sub> is" in source
    assert "Cov<sub>5.7</sub>" in source


def test_the_page_needs_nothing_from_anywhere(write):
    figure = Figure()
    figure.add_subplot()
    source = write(figures=[Picture(figure, "drawn"), Picture(SVG, "given")])
    page = Page(source)
    assert [re.split("[;,]", address)[0] for address in page.addresses] == ["data:image/png", "data:image/svg+xml"]
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "@import" not in source
    assert "url(" not in source
    assert "default-src 'none'" in source


def test_names_cannot_become_markup(write):
    evil = '<script>alert(1)</script> Cov_2 & "more"'
    source = write(
        title=evil,
        summary=[evil],
        tables=[Table([evil], [[evil]], caption=evil)],
        figures=[Picture(SVG, evil)],
        provenance={evil: evil},
    )
    assert "<script" not in source
    assert "Cov<sub>2</sub> &amp; &#34;more&#34;" in source


def test_pictures_are_embedded_byte_for_byte(write, tmp_path):
    (tmp_path / "picture.svg").write_bytes(SVG)
    (address,) = Page(write(figures=[Picture(tmp_path / "picture.svg", "given")])).addresses
    assert base64.b64decode(address.split(",")[1]) == SVG


def test_side_by_side_plots_get_the_width_of_the_page(write):
    pictures = [Picture(Figure(figsize=size, dpi=20), "drawn") for size in ((12, 4), (6, 4))]
    assert [picture.is_wide for picture in (*pictures, Picture(SVG, "given"))] == [True, False, False]
    assert write(figures=pictures).count('<figure class="wide">') == 1


def test_the_best_of_a_ranked_column_is_marked(write):
    cells = re.findall(r'<td class="([^"]*)"[^>]*>([^<]*)', write())
    assert [(kind.strip(), text.strip()) for kind, text in cells] == [
        ("", "a"),
        ("number best", "0.200"),
        ("", "b"),
        ("number", "0.400"),
    ]


def test_a_plain_corpus_is_said_to_give_a_bound_only(write):
    assert "Cov<sub>N</sub> and KL are estimates" in write()
    bound = write(kinds=["samples"])
    assert "cannot be estimated" in bound
    assert "are estimates" not in bound


def test_wrong_arguments_are_refused(write):
    with pytest.raises(ValueError, match="`summary` must be a list of at least one sentence"):
        write(summary=[])
    with pytest.raises(ValueError, match="`summary` must be a list"):
        write(summary="One sentence.")
    with pytest.raises(ValueError, match=r"must be PNG, JPEG, GIF or SVG, but begins with b'%PDF-1\.4'"):
        write(figures=[Picture(b"%PDF-1.4", "a paper")])
