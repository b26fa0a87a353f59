"""What a stranger named or wrote cannot steer the terminal, and what he laid in the way does not hang a command."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from moekit.cli._errors import explain, show_warnings
from moekit.cli._terminal import Terminal
from moekit.errors import BadData, MoekitError, printable, shortened
from moekit.progress import PlainProgress
from tests.commands import Moekit
from tests.tiny import write_model, write_text

# Clears the screen; sets the window's title; the 8-bit form of the same; erases the line; turns the text around.
EVIL = "a\x1b[2J\x1b]0;owned\x07\x9b1m\rb\u202ec"
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.fixture(scope="session")
def evil(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose name steers terminals, with a model and a text whose domain does."""
    folder = tmp_path_factory.mktemp("hostile") / EVIL
    write_model(folder / "moe")
    write_text(folder / "text")
    (folder / "text" / "prose").rename(folder / "text" / EVIL)
    return folder


def test_text_is_made_printable() -> None:
    assert printable("plain [red] text\n\tünïcode 漢字 🙂") == "plain [red] text\n\tünïcode 漢字 🙂"
    assert printable("\x1b[2J") == "\\x1b[2J"
    assert printable("\ud800\u202e\x9b\r") == "\\ud800\\u202e\\x9b\\r"
    assert not STEERS.search(printable(EVIL))


def test_messages_are_short_whatever_they_echo() -> None:
    error = BadData(f"damaged: {'[' * 100_000}", file="f" * 5000, hint=f"give {'x ' * 50_000}")
    assert len(str(error)) < 2500
    assert len(error.message) < 900
    assert "more characters" in error.message
    assert error.message.startswith("damaged: [[[[")
    assert str(BadData("short", hint="so")) == "short\n  -> so"
    # Of a long list both ends are told.
    told = shortened(", ".join(f"tensor.{n}" for n in range(10_000)))
    assert told.startswith("tensor.0, ")
    assert told.endswith("tensor.9999")


def test_nothing_that_is_printed_steers_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CI", raising=False)
    terminal = Terminal()
    terminal.say(EVIL)
    terminal.note(EVIL)
    terminal.table(EVIL, (EVIL, "[/] plain"), [(EVIL, "[red]not markup[/red]"), (1.5, "[/]")])
    progress = PlainProgress(worth=0)
    progress.start(EVIL, 1)
    progress.advance(1, EVIL)
    progress.finish()
    explain(MoekitError(EVIL, file=EVIL, hint=EVIL), debug=True)
    explain(ValueError(EVIL), debug=True)
    explain(FileNotFoundError(2, "no such file", EVIL))
    # Whatever a test changes here is put back.
    before = logging.getLogRecordFactory()
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(logging.getLogger("moekit"), "handlers", [])
    show_warnings()
    warnings.showwarning(EVIL, UserWarning, "x", 1)
    logging.getLogger("moekit").warning("%s", EVIL)
    record = logging.getLogger("another.library").makeRecord("x", logging.WARNING, "x", 1, "%s", (EVIL,), None)
    assert not STEERS.search(logging.Formatter().format(record))
    logging.setLogRecordFactory(before)
    told = capsys.readouterr()
    assert not STEERS.search(told.out + told.err)
    assert "\\x1b[2J" in told.out
    assert "[red]not markup[/red]" in told.out
    assert (told.out + told.err).count("owned") >= 12


def test_commands_on_names_that_steer(moekit: Moekit, evil: Path, tmp_path: Path) -> None:
    out = tmp_path / "trace"
    done = moekit("profile", evil / "moe", "-o", out, "--data", evil / "text", "--seq-len", "64")
    assert done.code == 0, done.err
    commands = [
        done,
        moekit("profile", evil / "moe", "-o", tmp_path / "x", "--data", evil / "text", "--dry-run"),
        moekit("check", evil / "moe"),
        moekit("generate", evil / "moe", "-p", EVIL, "--max-new-tokens", "2"),
        moekit("generate", evil / "nowhere"),
        moekit("evaluate", evil / "moe", "-o", tmp_path / "e", "--data", evil / "text"),
    ]
    assert all(not STEERS.search(done.out + done.err) for done in commands)
    assert [done.code for done in commands] == [0, 0, 0, 0, 2, 0]
    assert "owned" in commands[0].out


def test_a_page_shows_names_that_steer_as_text() -> None:
    from moekit.report.data import Finding, ReportData, RunInfo, TextSection
    from moekit.report.page import to_html

    told = {"title": EVIL, "headline": Finding(text=EVIL), "findings": (Finding(text=EVIL),)}
    section = TextSection(title=EVIL, paragraphs=(EVIL,))
    page = to_html(ReportData(**told, sections=(section,), run=RunInfo(date="2026", hashes={EVIL: EVIL})))
    assert page.count("\\x1b]0;owned") >= 6
    assert not STEERS.search(page)


def test_tensor_names_that_steer(moekit: Moekit, evil: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(evil / "moe", tmp_path / "moe")
    tensors = load_file(folder / "model.safetensors")
    tensors[EVIL] = tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    done = moekit("check", folder)
    assert done.code == 2
    assert "owned" in done.out + done.err
    assert not STEERS.search(done.out + done.err)


@pytest.mark.parametrize("name", ["trace.safetensors", "trace.json"])
@pytest.mark.parametrize("command", ["place", "route", "report"])
def test_a_pipe_hangs_no_command(moekit: Moekit, evil: Path, tmp_path: Path, name: str, command: str) -> None:
    trace = tmp_path / "trace"
    assert moekit("profile", evil / "moe", "-o", trace, "--data", evil / "text", "--max-tokens", "100").code == 0
    (trace / name).unlink()
    os.mkfifo(trace / name)
    out = tmp_path / "out"
    done = {
        "place": lambda: moekit("place", "swap", trace, "-o", out),
        "route": lambda: moekit("route", "c2r", evil / "moe", "-o", out, "--trace", trace, "--top-t", 3),
        "report": lambda: moekit("report", "-o", out, "--traces", trace),
    }[command]()
    assert done.code == 3, done.err
    assert done.says("no regular file")
    assert not out.exists()


def test_a_pipe_as_text_prompts_or_recipe(moekit: Moekit, evil: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    for arguments in (
        ("profile", evil / "moe", "-o", tmp_path / "out", "--data", tmp_path / "pipe.txt"),
        ("generate", evil / "moe", "--prompts", tmp_path / "pipe.txt"),
        ("evaluate", evil / "moe", "-o", tmp_path / "out", "--questions", tmp_path / "pipe.txt"),
        ("run", tmp_path / "pipe.txt"),
    ):
        done = moekit(*arguments)
        assert done.code in (2, 3), done.err
        assert done.says("no regular file|is no file")


def test_a_lock_that_is_a_link_keeps_its_victim(moekit: Moekit, evil: Path, tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / ".out.moekit-lock").symlink_to("victim")
    options = ("--method", "frequency", "--keep", "0.5", "--data", evil / "text")
    done = moekit("prune", evil / "moe", "-o", tmp_path / "out", *options)
    assert done.code == 3, done.err
    assert done.says("link")
    assert (tmp_path / "victim").read_text() == "precious"


def test_errors_as_json_are_printable_too(moekit: Moekit, tmp_path: Path) -> None:
    done = moekit("generate", tmp_path / EVIL, "--json")
    assert done.code == 2
    assert not STEERS.search(done.out + done.err)
    assert json.loads(done.out)["error"]["file"] == str(tmp_path / EVIL)


@pytest.mark.parametrize("closed", [(1,), (0, 1, 2)])
def test_closed_streams_are_no_crash(tmp_path: Path, closed: tuple[int, ...]) -> None:
    # In a process of its own: the streams of this one are needed.
    code = "import sys; from moekit.cli.main import main; main(sys.argv[1:])"
    for arguments, expected in ((["--version"], 0), (["run", "nowhere.yaml", "--json"], 2)):
        command = [sys.executable, "-c", code, *arguments]
        redirected = " ".join(f"{number}>&-" if number else "<&-" for number in closed)
        done = subprocess.run(
            ["sh", "-c", f'exec "$@" {redirected}', "sh", *command], stderr=subprocess.PIPE, text=True, cwd=tmp_path
        )
        assert done.returncode == expected, done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.full
@pytest.mark.slow
def test_every_written_file_follows_the_umask(moekit: Moekit, evil: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    text = evil / "text"
    permuted = ("--compare", "[]", "--model", evil / "moe")
    try:
        for command in (
            ("profile", evil / "moe", "-o", tmp_path / "trace", "--data", text, "--max-tokens", 100),
            ("place", "swap", tmp_path / "trace", *permuted, "-o", tmp_path / "placed"),
            ("route", "c2r", evil / "moe", "-o", tmp_path / "plan", "--trace", tmp_path / "trace", "--top-t", 3),
            ("prune", evil / "moe", "--method", "random", "--keep", 0.5, "--no-proof", "-o", tmp_path / "pruned"),
            ("train", evil / "moe", "-o", tmp_path / "tuned", "--data", text, "--steps", 1, "--seq-len", 32),
            ("evaluate", evil / "moe", "-o", tmp_path / "evaluated", "--data", text),
            ("report", "-o", tmp_path / "report", "--traces", tmp_path / "trace"),
        ):
            done = moekit(*command)
            assert done.code == 0, done.err
    finally:
        os.umask(before)
    files = {str(p.relative_to(tmp_path)): stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*") if p.is_file()}
    assert len(files) > 20
    assert {name: oct(mode) for name, mode in files.items() if mode != 0o640} == {}


def test_a_report_that_cannot_be_made_leaves_nothing(
    moekit: Moekit, evil: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moekit.report import page

    def fail(*args: object) -> str:
        raise BadData("nothing to say")

    monkeypatch.setattr(page, "to_html", fail)
    assert moekit("profile", evil / "moe", "-o", tmp_path / "t", "--data", evil / "text", "--max-tokens", 100).code == 0
    assert moekit("report", "-o", tmp_path / "report", "--traces", tmp_path / "t").code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


@pytest.mark.full
@pytest.mark.slow
def test_dry_runs_name_no_less_than_is_written(moekit: Moekit, evil: Path, tmp_path: Path) -> None:
    moe, text, trace = evil / "moe", evil / "text", tmp_path / "trace"
    # What a command says beforehand may be so much more than it writes.
    slack = {"trace": 100 << 10, "placed": 100 << 10}
    for name, command in {
        "trace": ("profile", moe, "-o", trace, "--data", text),
        "placed": ("place", "swap", trace, "-o", tmp_path / "placed", "--devices", "2,4", "--model", moe),
        "routed": ("route", "c2r", moe, "-o", tmp_path / "routed", "--trace", trace, "--top-t", 3, "--write", "model"),
        "pruned": ("prune", moe, "--method", "random", "--keep", 0.5, "--no-proof", "-o", tmp_path / "pruned"),
        "tuned": ("train", moe, "-o", tmp_path / "tuned", "--data", text, "--steps", 1, "--seq-len", 32),
    }.items():
        told = moekit(*command, "--dry-run", "--json")
        done = moekit(*command)
        assert (told.code, done.code) == (0, 0), told.err + done.err
        written = sum(file.stat().st_size for file in (tmp_path / name).rglob("*") if file.is_file())
        foretold = told.json["writes"][0]["bytes"]
        assert written <= foretold <= 1.25 * written + slack.get(name, 0), name
