"""The page of a pruning bench in a real browser: light and dark, narrow and wide, and nothing is fetched."""

from __future__ import annotations

import pytest

from moekit.report.page import build
from moekit.report.sections.pruning import report
from tests.browser.test_report import browser, pytestmark  # noqa: F401
from tests.unit.report.test_pruning_section import made


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return build(report(made()), tmp_path_factory.mktemp("pruning"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_it_reads_well_everywhere(browser, path, scheme, width):  # noqa: F811
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, complaints, requests = context.new_page(), [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    try:
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        band = "getComputedStyle(document.querySelector('path.band'))"
        assert float(page.evaluate(f"{band}.opacity")) < 0.5, "what lies behind a band shows through"
        assert page.evaluate(f"{band}.fill") == page.evaluate(
            "getComputedStyle(document.querySelector('.charts path.line.s0')).stroke"
        )
        page.locator("g.point").first.focus()
        assert "loss, nats a token" in page.locator("#tip").inner_text()
    finally:
        context.close()
    assert complaints == []
    assert {url for url in requests if not url.startswith("data:")} <= {path.as_uri()}
