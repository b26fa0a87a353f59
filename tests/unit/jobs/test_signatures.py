"""Python functions take what their commands take: the same names, the same defaults, each explained."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
from pydantic_core import PydanticUndefined

import moekit
from moekit.errors import BadConfig
from moekit.jobs.call import JobResult, function_name
from moekit.jobs.options.base import JobOptions
from moekit.jobs.table import jobs

OPTIONS = {name: job.load() for name, job in jobs().items()}
# Of the call itself.
CALL = {"out", "overwrite", "seed", "progress", "tokenizer"}


def function_of(options: type[JobOptions]) -> Any:
    """The one function of a job's module that `moekit` exports."""
    module = importlib.import_module(options.job)
    (found,) = {
        value
        for value in vars(module).values()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and exported(value)
    }
    return found


def exported(function: Any) -> bool:
    return function.__name__ in dir(moekit) and getattr(moekit, function.__name__) is function


@pytest.mark.parametrize("name", OPTIONS)
def test_a_function_takes_what_its_command_takes(name: str) -> None:
    options = OPTIONS[name]
    function = function_of(options)
    parameters = inspect.signature(function).parameters
    assert set(parameters) - CALL == set(options.model_fields)
    for field, info in options.model_fields.items():
        default = parameters[field].default
        if info.is_required():
            assert default is inspect.Parameter.empty, field
        elif info.default_factory is not None:
            assert default is None, field
        else:
            assert info.default is not PydanticUndefined
            assert default == info.default, field
    positional = [p.name for p in parameters.values() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert len(positional) <= 1, "what does not come first is named"


@pytest.mark.parametrize("name", OPTIONS)
def test_records_name_the_function_that_was_called(name: str) -> None:
    assert function_name(OPTIONS[name]) == function_of(OPTIONS[name]).__name__


@pytest.mark.parametrize("name", OPTIONS)
def test_paths_are_told_as_text(name: str) -> None:
    """A recipe puts folders of steps in the place of references in texts, and in nothing else."""
    for field, info in OPTIONS[name].model_fields.items():
        assert "Path" not in str(info.annotation), field


def test_all_that_generating_reads_is_an_input(tmp_path: Path) -> None:
    names = ("model", "prompts", "placement", "expert_sets", "protect")
    given: dict[str, Any] = {name: tmp_path / name for name in names}
    found = {reference for _, reference in OPTIONS["generate"](**given).inputs()}
    assert found == {str(path) for path in given.values()}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_argument_is_explained(name: str) -> None:
    function = function_of(OPTIONS[name])
    doc = inspect.getdoc(function) or ""
    for parameter in inspect.signature(function).parameters:
        assert f"\n    {parameter}: " in doc, parameter
    assert "Returns:" in doc
    assert "Raises:" in doc


@pytest.mark.parametrize("name", OPTIONS)
def test_a_result_is_frozen_and_explained(name: str) -> None:
    function = function_of(OPTIONS[name])
    result = inspect.signature(function, eval_str=True).return_annotation
    assert issubclass(result, JobResult)
    assert result.model_config["frozen"]
    doc = inspect.getdoc(result) or ""
    assert all(f"    {field}: " in doc for field in result.model_fields if field != "out")


def test_an_impossible_option_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=r"batch_size.*greater than or equal to 1.*given: 0"):
        moekit.profile(tmp_path, data="x", out=tmp_path / "t", batch_size=0)


def test_what_needs_a_place_to_write_asks_for_it(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="nothing says what to write"):
        moekit.prune(tmp_path, method="random", keep=0.5, proof=False)
