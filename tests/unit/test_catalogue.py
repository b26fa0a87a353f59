"""The catalogue: unique names, near matches, complete records."""

from __future__ import annotations

import importlib
import re

import pytest
from pydantic import BaseModel

from moekit import catalogue
from moekit.catalogue import method
from moekit.cli._options import describe, fields_of
from moekit.errors import BadConfig

RECORDS = list(catalogue.methods())


def test_the_methods_that_must_be_there() -> None:
    names = {(record.kind, record.name) for record in RECORDS}
    assert {
        ("routing", "topk"),
        ("routing", "c2r"),
        ("convert", "residual"),
        ("place", "swap"),
        ("place", "exact"),
    } <= names


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: f"{r.kind}-{r.name}")
def test_a_record_says_what_a_user_must_know(record: catalogue.MethodRecord) -> None:
    assert re.fullmatch(r"[a-z0-9-]+", record.name)
    assert record.changes in ("routing", "weights", "placement", "runtime")
    assert not record.paper or re.fullmatch(r"arXiv:\d{4}\.\d{4,5}|https://\S+|doi:\S+", record.paper), record.paper
    assert len(record.doc.split()) >= 20, "say what it does and when to choose it"
    assert record.summary.endswith(".")
    # What has options is a frozen config; what has none, such as a dispatcher, may be any class.
    if issubclass(record.cls, BaseModel):
        assert record.cls.model_config.get("frozen")
        assert record.cls.model_config.get("extra") == "forbid"
    for name, field in fields_of(record.cls).items():
        assert describe(field), f"the option {name} needs a description"


@pytest.mark.parametrize("kind", catalogue.kinds(), ids=lambda kind: kind.name)
def test_methods_are_what_their_kind_says(kind: catalogue.Kind) -> None:
    module, _, name = kind.base.partition(":")
    base = getattr(importlib.import_module(module), name)
    assert all(issubclass(record.cls, base) for record in catalogue.methods(kind.name))


def test_methods_are_sorted_and_filtered_by_kind() -> None:
    assert [(r.kind, r.name) for r in RECORDS] == sorted((r.kind, r.name) for r in RECORDS)
    assert {r.kind for r in catalogue.methods("routing")} == {"routing"}


def test_a_typo_gets_near_matches() -> None:
    with pytest.raises(BadConfig, match="no routing method is called 'c2rr'") as caught:
        catalogue.get("routing", "c2rr")
    assert caught.value.hint == "did you mean 'c2r'?"
    with pytest.raises(BadConfig, match="none"):
        catalogue.get("nothing", "x")


def test_two_methods_cannot_share_a_name() -> None:
    with pytest.raises(BadConfig, match="two routing methods are called 'topk'"):

        @catalogue.register(name="topk", kind="routing", changes="routing")
        class Other(BaseModel):
            """Another one."""

    assert catalogue.get("routing", "topk").cls.__name__ == "TopK"


def test_the_same_class_may_be_registered_again() -> None:
    record = catalogue.get("routing", "topk")
    again = catalogue.register(name="topk", kind="routing", changes="routing", paper=record.paper)(record.cls)
    assert again is record.cls
    method._records["routing", "topk"] = record
