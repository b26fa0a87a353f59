"""Write a report: one HTML page that needs nothing else, and the same numbers as JSON."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from moekit import __version__
from moekit.checkpoint.atomic import atomic_write
from moekit.errors import BadConfig, BadData, printable
from moekit.report import render, theme
from moekit.report.data import ReportData, RunInfo
from moekit.report.parts import Column, Table
from moekit.report.tables import table

_TEMPLATES = Path(__file__).parent / "templates"
_WORDS = {"good": "Gain:", "neutral": "Note:", "bad": "Cost:", "failure": "Failure:"}


def build(data: ReportData, out: str | Path, *, strict: bool = True) -> Path:
    """Write the page, and the JSON beside it.

    The page makes no network request: its policy forbids all, and everything it needs is in it.

    Args:
        data: what to say.
        out: the page, ending in .html; or a folder, which gets `report.html`.
        strict: raise if a finding says that the measurement failed; both files are written all the same, so that
            the failure can be looked at.

    Returns:
        The page.

    Raises:
        BadData: a finding is a failure, such as a degenerate curve.
        BadConfig: `out` has another suffix.
    """
    page = Path(out)
    if page.suffix == "":
        page = page / "report.html"
    if page.suffix != ".html":
        raise BadConfig(f"a report is an .html file, not {page.name!r}", hint="end the name in .html, or name a folder")
    numbers = page.with_suffix(".json")
    # Both texts first: what cannot be said leaves no empty folder.
    texts = {numbers: data.model_dump_json(indent=1), page: to_html(data, numbers.name)}
    for file, text in texts.items():
        atomic_write(file, text)
    if strict and data.failures:
        raise BadData(
            f"the report says that the measurement failed: {data.failures[0]}",
            file=page,
            hint="change what was measured (more devices, other T, more text) and run it again",
        )
    return page


def to_html(data: ReportData, json_name: str = "report.json") -> str:
    """Return the page as text."""
    style = theme.style() + (_TEMPLATES / "style.css").read_text(encoding="utf-8")
    script = (_TEMPLATES / "page.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    page: str = environment.get_template("page.html.j2").render(
        data=data,
        words=_WORDS,
        render=render.section,
        run_tables=[table(t) for t in _run_tables(data.run)],
        # Both are our own files, not data.
        style=Markup(style),
        script=Markup(script),
        policy=_policy(style, script),
        json_name=json_name,
        version=__version__,
    )
    return printable(page)


def _policy(style: str, script: str) -> str:
    """Nothing may be loaded or sent; only this style and this script run, so injected ones would not."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _run_tables(run: RunInfo) -> list[Table]:
    about = dict(run.machine)
    if run.seed is not None:
        about["seed"] = str(run.seed)
    about["date"] = run.date
    parts = (("Machine", about), ("Versions", run.versions), ("Inputs and outputs", run.hashes))
    return [
        Table(columns=(Column(name=name), Column(name="")), rows=tuple(rows.items())) for name, rows in parts if rows
    ]
