"""What a recipe may say, and what is said when it says something else."""

from __future__ import annotations

from pathlib import Path

import pytest

from moekit.errors import BadConfig
from moekit.recipe.schema import Recipe, load_recipe
from moekit.recipe.variables import matching, parse_overrides, resolve_steps, step_references, substitute


def write(folder: Path, text: str) -> Path:
    file = folder / "r.yaml"
    file.write_text(text)
    return file


HEAD = "name: x\nout: runs/x\n"


def load(folder: Path, text: str, **overrides: object) -> Recipe:
    return load_recipe(write(folder, HEAD + text), overrides)


def test_variables_keep_their_type_and_can_be_overridden(tmp_path: Path) -> None:
    text = "vars: {size: 5000, from: 'demo', both: '${from}-${size}'}\nsteps:\n"
    text += "  - {use: data, source: '${both}', train_bytes: '${size}'}\n"
    step = load(tmp_path, text).steps[0]
    assert (step.source, step.train_bytes) == ("demo-5000", 5000)  # type: ignore[union-attr]
    step = load(tmp_path, text, size=7).steps[0]
    assert (step.source, step.train_bytes) == ("demo-7", 7)  # type: ignore[union-attr]


def test_a_step_is_repeated_over_lists(tmp_path: Path) -> None:
    text = "vars: {sizes: [1, 2]}\nsteps:\n"
    text += (
        "  - {use: data, id: 'd-${s}-${n}', source: '${n}', train_bytes: '${s}', over: {s: '${sizes}', n: [a, b]}}\n"
    )
    assert [step.id for step in load(tmp_path, text).steps] == ["d-1-a", "d-1-b", "d-2-a", "d-2-b"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("steps: [{use: data, source: demo, sauce: 1}]", r"line 3: unknown key 'sauce'.*did you mean 'source'"),
        ("steps:\n  - use: data\n    source: demo\n    train_bytes: many", r"line 6: train_bytes: .*integer"),
        ("steps:\n  - use: data\n    source: demo\n    train_bytes: 0", r"line 6: train_bytes: .*greater than"),
        ("steps: [{use: dta}]", r"line 3: a step needs a key `use`.*did you mean 'data'"),
        ("steps: [{source: demo}]", "a step needs a key `use`"),
        ("steps: {use: data}", "steps must be a list"),
        ("steps: []", "steps"),
        ("colour: red\nsteps: [{use: data, source: demo}]", r"line 3: unknown key 'colour'"),
        ("vars: [1]\nsteps: [{use: data, source: demo}]", "vars must be a mapping"),
        ("steps: [{use: data, source: '${modle}'}]", r"\$\{modle\} is not defined"),
        ("vars: {model: a}\nsteps: [{use: data, source: '${modle}'}]", r"line 4: .*did you mean 'model'"),
        ("steps: [{use: data, source: a}, {use: data, source: b}]", "two steps are called 'data'"),
        ("steps: [{use: data, id: a, source: '${steps.b}'}]", "refers to the step 'b', which does not come before it"),
        ("steps: [{use: data, id: a, source: '${steps.a}'}]", "does not come before it"),
        ("steps: [{use: data, id: ../a, source: b}]", "id"),
        ("steps: [{use: data, source: a, over: {t: 3}}]", "over.t must be a list"),
        (
            "steps: [{use: data, id: '${t}', source: a, over: {t: [1], u: " + str(list(range(300))) + "}}]",
            "at most 256",
        ),
        ("steps: [{use: profile, model: a}]", "line 3: data: Field required"),
    ],
)
def test_complaints_name_file_and_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(BadConfig, match=f"(?s)r.yaml.*{words}"):
        load(tmp_path, text)


def test_an_override_that_the_recipe_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="did you mean 'model'"):
        load(tmp_path, "vars: {model: a}\nsteps: [{use: data, source: demo}]", modle="b")


def test_overrides_are_yaml() -> None:
    assert parse_overrides(["model=a/b-7B", "devices=[2, 4]", "n=3", "empty=", "eq=a=b"]) == {
        "model": "a/b-7B",
        "devices": [2, 4],
        "n": 3,
        "empty": "",
        "eq": "a=b",
    }
    for bad in ("model", "=3", "a b=3", "x=[1"):
        with pytest.raises(BadConfig):
            parse_overrides([bad])


def test_references_to_steps_are_left_for_the_runner() -> None:
    value = substitute({"a": "${steps.x}/f", "b": ["${steps.c2r-*}", "${n}"]}, {"n": 4})
    assert value == {"a": "${steps.x}/f", "b": ["${steps.c2r-*}", 4]}
    assert step_references(value) == {"x", "c2r-*"}
    folders = {"x": "/r/x", "c2r-1": "/r/c2r-1", "other": "/r/o", "c2r-2": "/r/c2r-2"}
    assert resolve_steps(value, folders) == {"a": "/r/x/f", "b": ["/r/c2r-1", "/r/c2r-2", 4]}
    assert matching("c2r-*", folders) == ["c2r-1", "c2r-2"]
    assert matching("x", folders) == ["x"]


def test_out_and_seed_from_the_command_line(tmp_path: Path) -> None:
    file = write(tmp_path, HEAD + "steps: [{use: data, source: demo}]")
    recipe = load_recipe(file, out="elsewhere", seed=5)
    assert (recipe.out, recipe.seed) == ("elsewhere", 5)


def test_the_schema_is_exported_and_names_the_steps() -> None:
    schema = Recipe.model_json_schema()
    mapping = schema["properties"]["steps"]["items"]["discriminator"]["mapping"]
    assert {"data", "convert", "profile", "route"} <= set(mapping)
