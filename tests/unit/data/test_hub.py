"""Hub data sets are streamed through the extra `datasets`; rows of a line each become documents."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from moekit.data import load_text
from moekit.errors import BadData


class Rows(list):  # type: ignore[type-arg]
    @property
    def column_names(self) -> list[str]:
        return list(self[0])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    calls: list[tuple[object, ...]] = []
    known = {
        "Salesforce/wikitext": Rows({"text": f"line {i} {'x' * 90}\n"} for i in range(200)),
        "someone/code": Rows([{"content": "print()"}, {"content": "pass"}]),
        "someone/images": Rows([{"image": "?"}]),
    }

    def load_dataset(name: str, config: str | None, **options: object) -> Rows:
        calls.append((name, config, options))
        if name not in known:
            raise ConnectionError(f"cannot reach {name}")
        return known[name]

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr("moekit.data.hub.find_spec", lambda name: object())
    return calls


def test_wikitext_needs_no_configuration(asked: list[tuple[object, ...]]) -> None:
    documents = load_text("wikitext")
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", {"split": "train", "streaming": True})]
    assert {d.domain for d in documents} == {"wikitext"}
    assert "".join(d.text for d in documents).count("line") == 200
    assert [len(d.text) >= 8000 for d in documents] == [True, True, False]
    assert documents[1].source == "Salesforce/wikitext:81"


def test_other_text_fields_and_configurations(asked: list[tuple[object, ...]]) -> None:
    (document,) = load_text("someone/code:python")
    assert document.text == "print()pass"
    assert document.domain == "someone/code"
    assert asked[0][:2] == ("someone/code", "python")


@pytest.mark.parametrize("spec", ["my-domian/", "two words", "a/b/c", "org//name"])
def test_what_is_no_name_is_not_looked_for(spec: str, asked: list[tuple[object, ...]]) -> None:
    with pytest.raises(BadData, match="there is no such file or folder"):
        load_text(spec)
    assert asked == []


def test_troubles_are_named(asked: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadData, match=r"'someone/none' is no file.* cannot be had: ConnectionError: cannot reach"):
        load_text("someone/none")
    with pytest.raises(BadData, match="has no field text"):
        load_text("someone/images")
    monkeypatch.setattr("moekit.data.hub.find_spec", lambda name: None)
    with pytest.raises(BadData, match="`datasets` is needed") as caught:
        load_text("wikitext")
    assert "moekit[data]" in str(caught.value.hint)
