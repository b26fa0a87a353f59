"""Every kind has laws that try all its methods, every trait has a law, and every kind's methods are independent."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import pytest
from pydantic import BaseModel

from moekit import catalogue
from moekit.catalogue import TRAITS, Kind, MethodRecord
from moekit.catalogue.kind import OWN
from moekit.catalogue.taxonomy import DECLARED
from moekit.errors import BadConfig

ROOT = Path(__file__).resolve().parents[2]
LAWS = sorted({law for kind in OWN for law in kind.laws})
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]


@pytest.mark.parametrize("kind", OWN, ids=lambda kind: kind.name)
def test_a_kinds_laws_are_there_and_try_what_the_catalogue_holds(kind: Kind) -> None:
    assert kind.laws
    for law in kind.laws:
        text = (ROOT / law).read_text()
        assert f'"{kind.name}"' in text, f"{law} does not mention the kind"
        assert "catalogue.methods(" in text or "from tests.runtime_cases import cases" in text, law


@pytest.mark.parametrize("trait", TRAITS)
def test_every_trait_chooses_what_some_law_tries(trait: str) -> None:
    assert any(f'"{trait}"' in (ROOT / law).read_text() for law in LAWS)


def test_every_kinds_methods_are_held_independent() -> None:
    """A kind without a contract in pyproject.toml fails; so does a contract for a folder that is gone."""
    held = [name for c in CONTRACTS if c["type"] == "independence" for name in c["modules"]]
    for kind in OWN:
        assert any(fnmatch(f"{kind.package}.method", name) for name in held), f"no contract names {kind.package}.*"
    assert all((ROOT / "src" / name.removesuffix(".*").replace(".", "/")).is_dir() for name in held)


def test_nothing_but_base_files_may_be_imported_by_methods() -> None:
    ignored = [line for c in CONTRACTS if c["type"] == "independence" for line in c.get("ignore_imports", ())]
    assert all(line.endswith(".base") for line in ignored)


def record_of(**fields: object) -> MethodRecord:
    whole = {"name": "x", "kind": "routing", "paper": "", "needs": (), "changes": "routing", "stock": False}
    return MethodRecord(**{**whole, "limits": (), "cls": object, "origin": "tests", **fields})  # type: ignore[arg-type]


def test_traits_follow_from_the_class_and_from_what_is_declared() -> None:
    class Learns(BaseModel):
        @classmethod
        def implied_traits(cls) -> frozenset[catalogue.Trait]:
            return frozenset({"learnable"})

    assert record_of().traits == set()
    assert record_of(stock=True).traits == {"stock"}
    assert record_of(cls=Learns, declared=frozenset({"sequence"})).traits == {"learnable", "sequence"}
    traits = {(r.kind, r.name): r.traits for r in catalogue.methods()}
    assert traits["prune", "frequency"] == {"narrows", "stock"}
    assert traits["prune", "dern"] == {"narrows", "rewrites", "stochastic", "stock"}
    assert traits["sparsify", "wanda"] == {"rewrites", "stock"}
    assert traits["routing", "naee-skip"] == {"variable_k"}
    assert traits["convert", "copy"] == {"grows", "stochastic", "stock"}


def test_the_axis_is_that_of_the_kind_unless_a_method_says_otherwise() -> None:
    assert record_of().axis == "gating"
    assert record_of(own_axis="storage").axis == "storage"
    axes = {(r.kind, r.name): r.axis for r in catalogue.methods()}
    assert axes["objective", "z"] == "gating"
    assert axes["objective", "kd"] == "training scheme"
    assert axes["place", "swap"] == "computation"
    assert set(axes.values()) <= set(catalogue.AXES)


@pytest.mark.parametrize("trait", ["learnable", "narrows", "fast"])
def test_what_follows_from_the_class_or_is_no_trait_cannot_be_declared(trait: str) -> None:
    assert trait not in DECLARED
    with pytest.raises(BadConfig, match=f"cannot declare the trait '{trait}'"):
        catalogue.register(name="x", kind="routing", changes="routing", traits=(trait,))  # type: ignore[arg-type]


def _undeclared(kind: str, name: str) -> MethodRecord:
    return dataclasses.replace(catalogue.get(kind, name), declared=frozenset())


def test_a_trait_that_is_not_declared_fails_its_law() -> None:
    from tests.laws import test_conversions, test_routing, test_solvers, test_weight_methods

    laws: list[tuple[Callable[[MethodRecord], None], MethodRecord]] = [
        (test_weight_methods.test_the_seed_changes_nothing, _undeclared("prune", "random")),
        (test_weight_methods.test_experts_that_stay_are_what_they_were, catalogue.get("sparsify", "magnitude")),
        (test_weight_methods.test_as_many_weights_are_left, catalogue.get("prune", "frequency")),
        (test_conversions.test_the_seed_matters_where_it_is_said_to, _undeclared("convert", "random")),
        (test_conversions.test_there_are_as_many_weights, _undeclared("convert", "copy")),
        (test_conversions.test_there_are_more_weights, catalogue.get("convert", "weights")),
        (
            lambda record: test_solvers.test_the_seed_changes_nothing(record.cls(load_weight=0)),
            _undeclared("place", "random"),
        ),
        (
            lambda record: test_routing.test_each_token_gets_as_many_experts(record, "qwen3_moe"),
            _undeclared("routing", "naee-skip"),
        ),
        (
            lambda record: test_routing.test_tokens_get_different_numbers_of_experts(record, "qwen3_moe"),
            catalogue.get("routing", "topk"),
        ),
    ]
    for law, record in laws:
        with pytest.raises(AssertionError):
            law(record)
