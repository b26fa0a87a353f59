"""What somebody meets who has never seen moekit: tables, help, knobs, completion, recipes by name, what is left."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field
from rich.console import Console

from moekit.checking import Finding
from moekit.cli._examples import example_of
from moekit.cli._options import describe, option_parameters
from moekit.cli._tables import print_table
from moekit.cli.main import COMMANDS, build
from moekit.errors import BadData
from moekit.jobs.table import jobs
from moekit.recipe.packaged import _IN_WHEEL, find_recipe, packaged_recipes
from tests.commands import Moekit
from tests.tiny import write_model, write_text
from tests.unit.test_docs import parse

ROOT = Path(__file__).resolve().parents[3]


def printed(width: int, columns: list[str], rows: list[list[str]]) -> str:
    console = Console(width=width, highlight=False)
    with console.capture() as caught:
        print_table(console, "a title", columns, rows, [cell.strip("-.0123456789") == "" for cell in rows[0]])
    return caught.get()


@pytest.mark.parametrize("width", [200, 120, 80, 40])
def test_a_table_breaks_no_name_and_no_number(width: int) -> None:
    columns = ["method", *[f"figure number {n}" for n in range(12)]]
    rows = [[name, *[f"{n}.{n}2345" for n in range(12)]] for name in ("soft-frequency", "reap")]
    told = printed(width, columns, rows)
    assert max(map(len, told.splitlines())) <= width
    for row in rows:
        assert all(re.search(rf"(?<!\S){re.escape(cell)}(?!\S)", told) for cell in row)
    parts = told.count("method")
    # Every part says which method a row is of.
    assert parts == told.count("soft-frequency") == len(re.findall(r"^reap\b", told, flags=re.MULTILINE))
    assert (parts == 1) == (width == 200)


class Group(BaseModel):
    """Settings of a part."""

    rank: int = 8
    parts: tuple[str, ...] = ("experts", "router")


class Knobs(BaseModel):
    """Knobs whose value is no plain word."""

    group: Group | None = Field(default=None, description="a group")
    names: tuple[str, ...] = Field(default=("basic", "more"), description="some names")
    none: tuple[str, ...] = Field(default=(), description="no names")
    shown: bool = Field(default=True, description="whether")
    weights: dict[str, float] = Field(default_factory=dict, description="by name")
    mode: Literal["a", "b"] = "a"


def test_help_writes_values_as_they_are_given() -> None:
    fields = Knobs.model_fields
    assert describe(fields["names"]) == "some names (default: basic,more)"
    assert describe(fields["none"]) == "no names"
    assert describe(fields["shown"]) == "whether (default: yes)"
    assert describe(fields["group"]) == "a group (such as {rank: 8, parts: [experts,router]})"
    metavars = {p.name: p.annotation.__metadata__[0].metavar for p in option_parameters(Knobs)}
    assert metavars["group"] == metavars["weights"] == "YAML"
    assert metavars["names"] == "A,B,..."
    assert metavars["mode"] is metavars["shown"] is None


def test_no_help_shows_a_default_in_words_of_python() -> None:
    for job in jobs().values():
        for name, field in job.load().model_fields.items():
            assert not re.search(r"default: (\(|\[|True|False|None)", describe(field)), (job.name, name)


def test_what_is_worked_on_is_called_data_everywhere() -> None:
    for job in jobs().values():
        texts = [n for n, f in job.load().model_fields.items() if "hub id" in str(f.description) and "text" in n]
        assert texts == [], job.name


def test_a_methods_knobs_are_shown_with_an_example(moekit: Moekit) -> None:
    told = moekit("methods", "routing", "c2r")
    assert told.code == 0
    assert told.says("max_devices int devices a token may reach")
    assert told.says("Example: moekit route c2r")
    assert moekit("methods", "routing").says("moekit methods routing NAME shows")
    assert [m["name"] for m in moekit("methods", "routing", "c2r", "--json").json["methods"]] == ["c2r"]
    assert moekit("methods", "routing", "c3r").says("no routing method is called 'c3r'")


def test_every_method_has_an_example_that_parses() -> None:
    from moekit import catalogue

    for record in catalogue.methods():
        line = example_of(record)
        assert record.name in line
        assert "..." not in line, line
        parse(line[line.index("moekit ") :])


@pytest.mark.parametrize("name", ["convert", "route", "place", "data", "bench"])
def test_commands_that_hold_others_have_an_example(name: str) -> None:
    command: Any = build().get_command(None, name)  # type: ignore[arg-type]
    lines = re.findall(rf"^moekit {name} .+", command.epilog, flags=re.MULTILINE)
    assert lines
    for line in lines:
        parse(line)


def test_a_shell_completes_the_names_of_commands_without_torch() -> None:
    # A process of its own: this one has imported torch already.
    code = (
        "import sys\nfrom moekit.cli.main import main\n"
        "try: main([])\nexcept SystemExit: pass\n"
        "print('heavy', [m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    asked = {"_MOEKIT_COMPLETE": "complete_bash", "COMP_WORDS": "moekit pr", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | asked)
    assert done.stdout.split("heavy")[0].split() == [name for name in COMMANDS if name.startswith("pr")]
    assert done.stdout.strip().endswith("heavy []")


def test_the_script_for_a_shell_is_printed(moekit: Moekit, monkeypatch: pytest.MonkeyPatch) -> None:
    # Otherwise typer asks which shell this process was started from.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    done = moekit("--show-completion", "bash")
    assert done.code == 0, done.err
    assert "_MOEKIT_COMPLETE=complete_bash" in done.out


def test_recipes_are_found_by_name_from_any_folder(
    moekit: Moekit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {file.stem for file in (ROOT / "recipes").glob("*.yaml")}
    assert set(packaged_recipes()) == names
    assert all(packaged_recipes().values())
    listed = moekit("run", "--list")
    assert all(name in listed.out for name in names)
    own = find_recipe("c2r-demo")
    assert own == find_recipe("recipes/c2r-demo.yaml") == find_recipe("c2r-demo.yaml")
    assert own.read_bytes() == (ROOT / "recipes" / "c2r-demo.yaml").read_bytes()
    # A file of the reader's comes first, and nothing else is guessed.
    (tmp_path / "c2r-demo.yaml").write_text("name: mine")
    assert find_recipe("c2r-demo.yaml") == Path("c2r-demo.yaml")
    assert find_recipe("elsewhere/c2r.yaml") == Path("elsewhere/c2r.yaml")
    assert moekit("run", "nope").says("there is no such recipe .*moekit run --list")
    assert moekit("run").says("no recipe is given")


def test_a_wheel_holds_the_recipes_where_they_are_looked_for() -> None:
    built = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert ROOT / "src" / built["force-include"]["recipes"] == _IN_WHEEL


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_model(folder / "moe")
    write_text(folder / "text", documents=20)
    return folder


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), BadData("too short")])
def test_a_job_that_fails_leaves_nothing_and_names_no_hidden_folder(
    moekit: Moekit, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from moekit.jobs.weights import fewer_job

    def fail(options: Any, asked: Any, documents: Any, scratch: Path, progress: Any) -> None:
        scratch.mkdir(parents=True)
        (scratch / "half").write_text("half")
        if isinstance(error, OSError):
            error.filename = str(scratch / "half")
        else:
            error.file = str(scratch / "half")  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(fewer_job, "decide", fail)
    done = moekit(
        *("prune", made / "moe", "--method", "reap", "--keep", "0.5"),
        *("--data", made / "text", "--plan", tmp_path / "p.json", "--max-tokens", 200),
    )
    assert done.code == (4 if isinstance(error, OSError) else 2)
    assert "p.json" in done.err
    assert "scratch" not in done.err
    assert list(tmp_path.iterdir()) == []


def test_check_says_what_it_knows_of_the_target(moekit: Moekit, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert moekit("check", made / "moe", "--for", "vllm").says("for vllm: nothing is known that keeps it from loading")
    import moekit.checking as checking

    own = checking.check

    def warned(*args: Any, **more: Any) -> Any:
        report = own(*args, **more)
        told = Finding(severity="warning", code="x", message="vllm runs it otherwise")
        return report.model_copy(update={"findings": (*report.findings, told)})

    monkeypatch.setattr(checking, "check", warned)
    assert not moekit("check", made / "moe", "--for", "vllm").says("nothing is known")
