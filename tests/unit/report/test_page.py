from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from moekit.errors import BadConfig, BadData
from moekit.report.data import Finding, ReportData, RunInfo, TextSection
from moekit.report.page import build, to_html
from moekit.report.run_info import describe_run
from moekit.report.theme import DARK, LIGHT, contrast, ramp
from tests.unit.report.example import example

HOSTILE = (
    "</script><script>window.hacked=1</script>",
    "<img src=x onerror=window.hacked=1>",
    '"><svg onload=window.hacked=1>',
    "{{7*7}}{% raw %}",
    "' onmouseover='window.hacked=1",
    "<!--<script>",
)


class Page(HTMLParser):
    """Reads a page as a browser does: what is an element, what is text."""

    VOID = frozenset({"meta", "link", "input"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts, self.scripts, self.styles = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, "elements are closed in order"

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            (self.scripts if self.open[-1] == "script" else self.styles).append(data)
        elif data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def every(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def page(report):
    return Page(to_html(report))


def test_the_first_line_of_the_page_is_the_headline(report, page):
    shown = [text for tag, text in page.texts if tag != "title"]
    assert shown[0] == report.headline.text


def test_nothing_is_loaded_from_anywhere(report, page):
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data", "xlink:href", "poster", "background"):
            value = attributes.get(name)
            assert value is None or value.startswith("#") or value == "data:,", (tag, name, value)
    text = to_html(report)
    assert "@import" not in text
    assert "url(" not in text
    known = {"http://www.w3.org/2000/svg"}
    assert set(re.findall(r"https?://[^\"'\s<)]+", text)) <= known, "the only address is a name space"


def test_the_policy_allows_this_script_and_style_only(page):
    [policy] = [m["content"] for m in page.every("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert rules["default-src"] == "'none'"
    [style] = page.styles
    [script] = [s for s in page.scripts if not s.startswith("{")]
    for text, rule in ((style, rules["style-src"]), (script, rules["script-src"])):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rule == f"'sha256-{digest}'"
    assert not [a for _, a in page.tags if "style" in a], "an inline style would be refused by the policy"


def test_no_element_has_a_handler(page):
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]


def test_charts_can_be_read_without_seeing_them(page):
    for attributes in page.every("svg"):
        assert attributes.get("aria-hidden") == "true" or attributes.get("aria-label"), attributes
    for attributes in page.every("input"):
        assert attributes["aria-label"]
    for attributes in page.every("button"):
        assert attributes["aria-label"]
    assert page.every("html") == [{"lang": "en"}]
    assert sum(tag == "h1" for tag, _ in page.tags) == 1
    labelled = {a["aria-labelledby"] for a in page.every("section")}
    assert labelled == {a["id"] for a in page.every("h2")}
    for attributes in page.every("th"):
        assert attributes["scope"] in ("row", "col")


@pytest.mark.full
@pytest.mark.slow
def test_hostile_names_stay_text(page):
    clean = page
    report = example(layers=2, experts=8, documents=3, domains=HOSTILE, title=HOSTILE[0])
    run = RunInfo(date="d", commands=HOSTILE, hashes={HOSTILE[1]: HOSTILE[2]})
    extra = TextSection(title=HOSTILE[1], lead=HOSTILE[2], paragraphs=HOSTILE)
    report = report.model_copy(
        update={"run": run, "sections": (*report.sections, extra), "headline": Finding(text=HOSTILE[1])}
    )
    page = Page(to_html(report))
    assert not page.every("img")
    assert len(page.every("script")) == len(clean.every("script"))
    assert not [a for _, a in page.tags if any(name.startswith("on") for name in a)]
    shown = {text for _, text in page.texts}
    assert {text.strip() for text in HOSTILE} <= shown, "and all of it is shown as it was given"


def test_json_says_all_that_the_page_says(report, tmp_path):
    path = build(report, tmp_path / "run")
    assert path == tmp_path / "run" / "report.html"
    numbers = json.loads(path.with_suffix(".json").read_text())
    assert ReportData.model_validate(numbers) == report
    assert "report.json" in path.read_text()
    assert sorted(p.name for p in path.parent.iterdir()) == ["report.html", "report.json"]


def test_a_failure_is_written_and_then_raised(report, tmp_path):
    failed = report.model_copy(update={"headline": Finding(text="It shows nothing.", status="failure")})
    with pytest.raises(BadData, match="It shows nothing"):
        build(failed, tmp_path / "r.html")
    assert '<h1 class="failure">' in (tmp_path / "r.html").read_text()
    assert build(failed, tmp_path / "s.html", strict=False).exists()


def test_only_html_is_written(report, tmp_path):
    with pytest.raises(BadConfig, match=r"r\.pdf"):
        build(report, tmp_path / "r.pdf")


def test_the_page_is_small(report):
    assert len(to_html(report)) < 200_000


def test_equal_data_give_equal_pages(report):
    assert to_html(report) == to_html(ReportData.model_validate_json(report.model_dump_json()))


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_has_enough_contrast_in_both_schemes(scheme):
    for name in ("text", "soft", "accent", "good", "bad"):
        for ground in ("page", "panel"):
            assert contrast(scheme[name], scheme[ground]) >= 4.5, (name, ground)
    assert contrast(scheme["on-fail"], scheme["fail"]) >= 4.5
    for i in range(6):
        assert contrast(scheme[f"c{i}"], scheme["page"]) >= 3.0, "WCAG's bound for graphics"


def test_contrast_and_ramps_by_hand():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    assert ramp(("#000000", "#ffffff"), 3) == ["#000000", "#808080", "#ffffff"]


def test_what_was_run_is_gathered_without_names_of_users_or_hosts():
    import getpass
    import socket

    run = describe_run(commands=["moekit run x.yaml"], seed=3, hashes={"model": "abc"}, more={"time": "12 min"})
    assert run.versions["moekit"]
    assert run.versions["torch"]
    assert run.machine["cores"].isdigit()
    assert run.machine["time"] == "12 min"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", run.date)
    said = " ".join(run.machine.values())
    assert socket.gethostname() not in said
    assert len(getpass.getuser()) < 3 or getpass.getuser() not in said
