"""Where a command writes is said in one way everywhere: `-o OUT`, or `--out OUT`."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

import moekit as library
from moekit.cli._jobs import command_of
from moekit.cli.main import COMMANDS, build
from moekit.errors import BadConfig
from moekit.jobs.options.base import CommandLine, JobOptions, ModelRef
from moekit.jobs.table import Job, jobs
from tests.commands import Moekit
from tests.tiny import write_model, write_text

# Commands that show, list, judge or fetch: nothing that a caller has to name a place for.
WITHOUT = {"data list", "data fetch", "estimate", "generate", "check", "undo", "families", "methods"}
# These write somewhere by themselves, too: benches into a folder of their name, recipes where they say.
WITH_A_DEFAULT = {"bench ep", "bench prune", "run"}
# Whose result alone may be wanted, as their options say, or whose plan.
RESULT_ALONE = {name for name, job in jobs().items() if job.line and not job.load().needs_out}
MAY_BE_LEFT_OUT = RESULT_ALONE | {"fit", "prune", "merge", "sparsify", "quantize", "slim"}


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command that does something, with its name as it is called."""
    if not hasattr(command, "list_commands"):
        yield " ".join(path), command
        return
    for name in command.list_commands(None):
        yield from commands(command.get_command(None, name), (*path, name))


ALL = dict(commands(build()))


def own(name: str) -> str:
    """A command without the name of its method: `route c2r` is `route`."""
    return name if name.split()[0] in ("data", "bench") else name.split()[0]


def out_of(command: Any) -> Any:
    """The parameter that says where to write; None where there is none."""
    return next((parameter for parameter in command.params if parameter.name == "out"), None)


def test_the_walk_reaches_every_command() -> None:
    assert {name.split()[0] for name in ALL} == set(COMMANDS)
    assert {"data write", "route c2r", "place swap", "convert residual", "bench ep", "reshard"} <= set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_where_to_write_is_an_option(name: str) -> None:
    command = ALL[name]
    out = out_of(command)
    assert (out is None) == (own(name) in WITHOUT)
    for parameter in command.params:
        if parameter is not out:
            assert not {"-o", "--out"} & {*parameter.opts, *parameter.secondary_opts}
        if parameter.param_type_name == "argument":
            told = f"{parameter.name} {parameter.metavar} {parameter.help}".lower()
            assert not re.search(r"\bout\b|\bto write\b|\bwritten\b", told), told
    if out is not None:
        assert out.param_type_name == "option"
        assert set(out.opts) == {"-o", "--out"}
        assert out.metavar == "OUT"
        assert out.required == (own(name) not in WITH_A_DEFAULT | MAY_BE_LEFT_OUT)


@pytest.mark.parametrize("name", [name for name in ALL if own(name) not in WITHOUT])
def test_examples_say_where_to_write(name: str) -> None:
    lines = re.findall(r"^(?:torchrun .*-m )?moekit .*", ALL[name].epilog, flags=re.MULTILINE)
    assert lines
    if own(name) not in WITH_A_DEFAULT:
        assert all(re.search(r" -o \./| --plan ", line) for line in lines)
    assert not any(" --out " in line for line in lines)


def test_what_may_be_left_out_is_said_in_the_help() -> None:
    assert {"evaluate", "place"} <= RESULT_ALONE
    for name in ("prune", "merge", "sparsify", "quantize", "slim"):
        assert "may be left out with --plan" in out_of(ALL[name]).help
    for name, command in ALL.items():
        if own(name) in RESULT_ALONE:
            assert "without it nothing is kept" in out_of(command).help


class NewOptions(JobOptions):
    """A job as somebody else would write it."""

    job: ClassVar[str] = ""
    command: ClassVar[CommandLine] = CommandLine(
        help="Do something new.",
        writes="folder of the answer",
        arguments=("model",),
        examples=("moekit new ./moe -o ./x",),
    )

    model: ModelRef


class NewWithout(NewOptions):
    """The same, whose result alone may be wanted."""

    needs_out: ClassVar[bool] = False


@pytest.mark.parametrize("options", [NewOptions, NewWithout])
def test_a_new_job_writes_where_an_option_says(options: type[JobOptions]) -> None:
    command = command_of(Job("new", f"{__name__}:{options.__name__}", "Something new."))
    assert [p.name for p in command.params if p.param_type_name == "argument"] == ["model"]
    out = out_of(command)
    assert out.required == options.needs_out
    assert ("nothing is kept" in out.help) == (not options.needs_out)


def test_a_job_cannot_ask_for_another_way() -> None:
    assert "out" not in {field.name for field in dataclasses.fields(CommandLine)}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_model(folder / "moe")
    write_text(folder / "text", documents=20)
    return folder


FORMER = (
    "data write demo ./text",
    "convert copy ./dense ./moe",
    "profile ./moe ./trace --data demo",
    "route c2r ./moe ./routed --trace ./trace --top-t 8",
    "place swap ./trace ./placement",
    "train ./moe ./tuned --data ./text",
    "evaluate ./moe ./after --data demo",
    "report ./page --traces ./trace",
    "reshard ./sharded ./plain --plain",
    "prune ./moe ./half --method reap --keep 0.5 --data demo",
    "apply ./p.json ./half",
    "bench prune ./moe ./bench --data demo",
)


@pytest.mark.parametrize("line", FORMER)
def test_a_path_too_many_is_told_the_option(
    moekit: Moekit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = moekit(*shlex.split(line))
    assert done.code == 2
    assert done.says(r"error: unexpected argument \./\w+: where to write is an option, -o OUT")
    assert not list(tmp_path.iterdir())


def test_only_what_may_be_meant_is_said(moekit: Moekit, tmp_path: Path) -> None:
    given = moekit("profile", "./moe", "./more", "--data", "demo", "-o", tmp_path / "trace")
    assert given.code == 2
    assert given.says("unexpected extra argument")
    assert not given.says("-o OUT")
    nowhere = moekit("check", "./moe", "./more")
    assert nowhere.code == 2
    assert not nowhere.says("-o OUT")
    assert moekit("profile", "./moe", "./more", "--help").code == 0
    assert moekit("profile", "./moe", "--data", "demo").says("Missing option '--out' / '-o'")


def test_without_a_place_the_result_alone_is_told(
    moekit: Moekit, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    how = ("--data", made / "text", "--max-tokens", 200)
    told = moekit("evaluate", made / "moe", *how)
    assert told.code == 0, told.err
    assert told.says("perplexity of moe")
    assert not told.says("wrote")
    answer = moekit("evaluate", made / "moe", *how, "--json").json
    assert "out" not in answer
    assert answer["domains"] == moekit("evaluate", made / "moe", *how, "-o", "kept", "--json").json["domains"]
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_dry_run_without_a_place_names_none(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    command = ("evaluate", made / "moe", "--data", made / "text", "--dry-run", "--json")
    assert moekit(*command).json["writes"] == []
    assert [item["what"] for item in moekit(*command, "-o", tmp_path / "e").json["writes"]] == [str(tmp_path / "e")]


def test_placements_may_be_counted_alone_but_no_model_is_written_to_be_lost(
    moekit: Moekit, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "trace"
    assert moekit("profile", made / "moe", "--data", made / "text", "--max-tokens", 200, "-o", trace).code == 0
    monkeypatch.chdir(tmp_path)
    counted = moekit("place", "swap", trace, "--json")
    assert counted.code == 0, counted.err
    assert counted.json["devices"][0]["rows"]
    for more in ((), ("--dry-run",)):
        lost = moekit("place", "swap", trace, "--model", made / "moe", *more)
        assert lost.code == 2
        assert lost.says("nothing says where to write -> -o OUT")
    with pytest.raises(BadConfig, match="where to write"):
        library.place(trace, method="swap", model=made / "moe")
    assert [path.name for path in tmp_path.iterdir()] == ["trace"]


def test_a_shell_completes_the_option() -> None:
    command = ALL["profile"]
    context = command.make_context("profile", ["./moe", "./trace"], resilient_parsing=True)
    assert [item.value for item in command.shell_complete(context, "--ou")] == ["--out"]


@pytest.mark.parametrize("flag", ["-o", "--out"])
def test_both_spellings_write_there(moekit: Moekit, made: Path, tmp_path: Path, flag: str) -> None:
    done = moekit("data", "write", made / "text", flag, tmp_path / "frozen", "--json")
    assert done.code == 0, done.err
    assert done.json["out"] == str(tmp_path / "frozen")
    assert (tmp_path / "frozen" / "train.jsonl").is_file()
