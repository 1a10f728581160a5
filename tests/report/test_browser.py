"""The page as a reader has it: in Chromium, without a network."""

import csv
import io
import json
import re
import shutil

import numpy as np
import pytest

from hf_coverage import CoverageProfile
from hf_coverage.functional.checks import metric_key
from hf_coverage.report.explorer import short_names
from hf_coverage.report.html import write_html_report
from hf_coverage.report.table import Column, Interval, Table, format_cell
from hf_coverage.select.choose import choose

pytestmark = pytest.mark.slow

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>"
NAMES = [f"org/run/checkpoint-{step}" for step in (500, 1000, 1500, 2000)]


def profiles_of(names, rows=60):
    """Later ones are better at small N and worse at large N: the order changes on the way."""
    rng = np.random.default_rng(0)
    reference = -rng.gamma(4.0, 3.0, rows)
    return [
        CoverageProfile.from_logprobs(
            np.minimum(reference - rng.normal(2.5 - place, 1, rows) - 9 * (rng.random(rows) < 0.08 * place), 0),
            reference,
            groups=np.arange(rows) // 2,
            name=name,
        )
        for place, name in enumerate(names)
    ]


PROFILES = profiles_of(NAMES)


def choice_of(profiles):
    logprobs = {profile.name: profile.logprobs for profile in profiles}
    reference = profiles[0].log_ratios + profiles[0].logprobs
    return choose(logprobs, [16, 1], reference_logprobs=reference, groups=profiles[0].groups)


@pytest.fixture(scope="module")
def browser():
    """One for all tests here."""
    from playwright.sync_api import sync_playwright

    found = [shutil.which(name) for name in ("chromium-headless-shell", "chromium", "google-chrome")]
    path = next((name for name in found if name), None)
    if path is None:
        pytest.skip("There is no Chromium: `apt-get install chromium-headless-shell`.")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")

    def write(name, profiles, **changes):
        table = Table(["model", Column("loss", "lower")], [["b", 0.3], ["a", Interval(0.4, 0.1, 0.5)], ["c", None]])
        arguments = {"title": "Coverage", "summary": ["One."] * 5, "tables": [table], "profiles": profiles}
        return write_html_report(folder / f"{name}.html", **(arguments | changes))

    return {
        "run": write("run", PROFILES),
        "choice": write("choice", PROFILES, choice=choice_of(PROFILES)),
        "evil": write(
            "evil", profiles_of([EVIL, f"{EVIL}2"]), title=EVIL, summary=[EVIL], provenance={"a": "b" * 300}
        ),
        "many": write("many", profiles_of([f"{'a-long-name' * 9}/checkpoint-{i}" for i in range(21)])),
        "one": write("one", PROFILES[:1]),
    }


class Opened:
    """A page that was opened, what it asked for, and what it complained of."""

    def __init__(self, browser, path, **options):
        self.page = browser.new_page(**{"viewport": {"width": 1100, "height": 900}, **options})
        self.requests, self.complaints = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", lambda said: said.type in ("error", "warning") and self.complaints.append(said.text))
        self.page.on("dialog", lambda dialog: self.complaints.append(dialog.message) or dialog.dismiss())
        self.page.goto(path.as_uri())

    def rows(self):
        return self.page.locator("#models tbody tr:visible th").all_inner_texts()

    def cells(self, column):
        texts = self.page.locator(f"#models tbody tr:visible > :nth-child({column + 1})").all_inner_texts()
        return [" ".join(text.split()) for text in texts]

    def slide_to(self, place):
        self.page.locator("#n").evaluate(f"(slider) => {{ slider.value = {place}; slider.oninput(); }}")

    def hover(self, chart, x, y):
        """What is said at a point of a chart."""
        self.page.mouse.move(1, 1)
        self.page.wait_for_selector(".bk-Tooltip", state="hidden")
        self.page.locator(f"#chart-{chart}").scroll_into_view_if_needed()
        at = self.page.evaluate(
            """([place, x, y]) => {
                const view = Bokeh.index.find_one_by_id(Bokeh.documents[place].roots()[0].id);
                const box = view.canvas_view.el.getBoundingClientRect();
                const {x_scale, y_scale} = view.frame ?? view.frame_view;
                return [box.left + x_scale.compute(x), box.top + y_scale.compute(y)];
            }""",
            [chart, x, y],
        )
        self.page.mouse.move(*at)
        self.page.locator(".bk-Tooltip:visible").first.wait_for(timeout=5000)
        return self.page.evaluate(
            """() => {
                const text = (node) => node.nodeType === Node.TEXT_NODE ? node.data : node.nodeName === "STYLE" ? "" :
                    Array.from((node.shadowRoot ?? node).childNodes, text).join(" ");
                return Array.from(document.querySelectorAll(".bk-Tooltip"), text).join(" ");
            }"""
        )


@pytest.fixture
def opened(browser, written):
    pages = []

    def of(name, **options):
        pages.append(Opened(browser, written[name], **options))
        if options.get("java_script_enabled", True):
            pages[-1].page.wait_for_selector("html.live", timeout=20_000)
        return pages[-1]

    yield of
    for one in pages:
        one.page.close()
        assert len(one.requests) == 1
        assert one.complaints == []


def levels(opened):
    return opened.page.evaluate("JSON.parse(document.getElementById('explorer').textContent).n")


def short(names):
    return [name.removeprefix("org/run/") for name in names]


def test_the_slider_sorts_the_table_as_python_does(opened):
    one = opened("run")
    orders = set()
    for place, n in enumerate(levels(one)):
        one.slide_to(place)
        ordered = sorted(PROFILES, key=lambda profile: profile.miss(n))
        assert one.rows() == short(profile.name for profile in ordered)
        assert one.cells(1) == [format_cell(Interval(p.miss(n), *p.miss_interval(n))) for p in ordered]
        assert one.cells(2) == [format_cell(Interval(p.cov(n), *p.interval(n))) for p in ordered]
        assert (
            one.page.locator("#least").inner_text().startswith(f"{one.rows()[0]} has the least miss_{metric_key(n)}: ")
        )
        assert one.page.locator("#models th").nth(1).inner_text().startswith(f"miss_{metric_key(n)}")
        spans = one.page.evaluate("Bokeh.documents.slice(0, 2).map((page) => page.get_model_by_name('at').location)")
        assert spans == [n, n]
        missed = one.page.evaluate("Bokeh.documents[2].get_model_by_name('run').data.y")
        assert missed == [profile.miss(n) for profile in PROFILES]
        orders.add(tuple(one.rows()))
    assert len(orders) > 2


def test_the_keyboard_moves_the_slider_and_sorts(opened):
    one = opened("run")
    one.page.locator("#n").focus()
    one.page.keyboard.press("ArrowRight")
    assert one.page.locator("label[for=n]").inner_text() == "N = 32"
    assert one.page.locator("#n").get_attribute("aria-valuetext") == "N = 32"
    entropies = sorted(PROFILES, key=lambda profile: profile.cross_entropy)
    one.page.locator("#models th button").nth(3).focus()
    one.page.keyboard.press("Enter")
    assert one.rows() == short(profile.name for profile in entropies)
    one.page.keyboard.press("Enter")
    assert one.rows() == short(profile.name for profile in reversed(entropies))
    one.page.locator("#n").focus()
    one.page.keyboard.press("End")  # the column that was chosen stays
    assert one.rows() == short(profile.name for profile in reversed(entropies))


def test_other_tables_sort_by_their_numbers_and_leave_the_unknown_last(opened):
    table = opened("run").page.locator("table.sortable").nth(1)
    table.locator("th button").nth(1).click()
    assert [text[0] for text in table.locator("tbody tr").all_inner_texts()] == ["b", "a", "c"]
    table.locator("th button").nth(1).click()
    assert [text[0] for text in table.locator("tbody tr").all_inner_texts()] == ["a", "b", "c"]


def test_a_point_says_model_value_interval_and_rows(opened):
    one, (first, *_) = opened("run"), PROFILES
    found = ((first.miss(1), first.miss_interval(1)), (first.cov(1), first.interval(1)))
    for chart, (value, interval) in enumerate(found):
        said = one.hover(chart, 1, value)
        for text in (first.name, format_cell(Interval(value, *interval)), "60"):
            assert text in said


def test_what_is_chosen_is_marked_in_the_chart(opened):
    one, choice = opened("choice"), choice_of(PROFILES)
    said = one.hover(0, 16, choice.pick.loss)
    assert choice.winner in said
    assert f"{format_cell(choice.within)} of the best" in said


def test_models_are_hidden_everywhere_and_shown_again(opened):
    one = opened("run")
    names = "Bokeh.documents[0].get_model_by_name('points').data.name"
    lines = "Bokeh.documents[{}].get_model_by_name('lines').data.x.length"
    one.page.locator("#legend input").first.uncheck()
    assert short(NAMES)[0] not in one.rows()
    assert len(one.rows()) == 3
    assert [one.page.evaluate(lines.format(place)) for place in (0, 1)] == [3, 3]
    assert NAMES[0] not in one.page.evaluate(names)
    assert one.page.evaluate("Bokeh.documents[3].get_model_by_name('run').data.x") == [1000, 1500, 2000]
    assert ", of 3." in one.page.locator("#least").inner_text()
    one.page.locator("#none").click()
    assert (one.rows(), one.page.locator("#least").inner_text()) == ([], "No model is shown.")
    one.page.locator("#all").click()
    assert len(one.rows()) == 4


def saved(one, button):
    with one.page.expect_download() as download:
        one.page.locator(button).click()
    return download.value.path().read_text(encoding="utf-8")


def test_csv_and_json_hold_what_is_shown(opened):
    one = opened("run")
    one.slide_to(2)
    one.page.locator("#legend input").nth(1).uncheck()
    records = json.loads(saved(one, "#json"))
    table = list(csv.DictReader(io.StringIO(saved(one, "#csv"))))
    read = [{key: text if key == "model" else float(text) for key, text in line.items()} for line in table]
    assert read == records
    assert short(record["model"] for record in records) == one.rows()
    by_name = {profile.name: profile for profile in PROFILES}
    for record in records:
        profile = by_name[record["model"]]
        assert (record["n"], record["miss"], record["cov"]) == (4, profile.miss(4), profile.cov(4))
        assert (record["miss_low"], record["miss_high"]) == profile.miss_interval(4)
        assert (record["rows"], record["prompts"]) == (60, 30)


def test_names_stay_text(opened):
    one = opened("evil")
    assert one.page.locator("h1").inner_text() == EVIL
    assert one.page.locator("img[src=x]").count() == 0
    assert sorted(one.rows()) == short_names([EVIL, f"{EVIL}2"])
    assert EVIL in one.hover(0, 1, profiles_of([EVIL])[0].miss(1))
    assert json.loads(saved(one, "#json"))[0]["model"].startswith(EVIL)


@pytest.mark.parametrize("name", ["run", "evil", "many", "one"])
def test_nothing_is_wider_than_the_page(opened, name):
    one = opened(name, color_scheme="dark")
    for width in (360, 1100, 1600):
        one.page.set_viewport_size({"width": width, "height": 900})
        one.page.wait_for_timeout(150)
        for details in one.page.locator("details").all():
            details.evaluate("(element) => (element.open = true)")
        assert one.page.evaluate("document.documentElement.scrollWidth") == width
        beyond = one.page.evaluate(
            """(width) => Array.from(document.querySelectorAll("main *")).filter((element) => {
                return !element.closest(".scroll *") && element.getBoundingClientRect().right > width + 0.5;
            }).map((element) => element.outerHTML.slice(0, 80))""",
            width,
        )
        assert beyond == []


def test_the_first_column_and_the_slider_stay(opened):
    one = opened("many", viewport={"width": 360, "height": 700})
    box = one.page.locator(".scroll").first
    box.evaluate("(element) => (element.scrollLeft = 300)")
    first = one.page.locator("#models tbody th").first
    assert first.bounding_box()["x"] == pytest.approx(box.bounding_box()["x"] + 1, abs=1)
    box.scroll_into_view_if_needed()
    one.page.mouse.wheel(0, 200)
    assert 0 <= one.page.locator("#n").bounding_box()["y"] < 100


def test_readers_without_scripts_get_pictures_and_the_table(opened):
    one = opened("run", java_script_enabled=False)
    assert one.page.locator(".drawn img:visible").count() == 2
    assert one.page.locator("#n:visible, #csv:visible, .chart:visible").count() == 0
    assert one.rows() == short(p.name for p in sorted(PROFILES, key=lambda profile: profile.miss(16)))


def test_paper_gets_the_pictures(opened):
    one = opened("run")
    assert one.page.locator(".drawn img:visible").count() == 0
    one.page.emulate_media(media="print", color_scheme="dark")
    assert one.page.locator(".drawn img:visible").count() == 2
    assert one.page.locator(".chart:visible, .bar:visible").count() == 0
    assert one.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_no_script_but_the_page_s_own_is_run(opened):
    one = opened("run")
    policy = one.page.locator("meta[http-equiv]").get_attribute("content")
    assert re.findall(r"script-src ([^;]*)", policy)[0].replace("'", "").split()[0].startswith("sha256-")
    assert "unsafe-eval" not in policy
    one.page.evaluate(
        """() => {
            const added = document.createElement("script");
            added.textContent = "window.added = true";
            document.body.append(added);
        }"""
    )
    assert one.page.evaluate("window.added") is None
    assert one.complaints.pop().startswith("Executing inline script violates")
