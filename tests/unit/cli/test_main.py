"""The command line as a whole: help, laziness, exit codes, messages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moekit.cli.main import COMMANDS, HAND_MADE
from moekit.jobs.table import jobs
from tests.processes import python

HEAVY = ("torch", "transformers", "numpy", "scipy", "sklearn", "matplotlib")


def moekit(*args: str) -> subprocess.CompletedProcess[str]:
    return python(["-m", "moekit", *args])


def test_help_names_every_command() -> None:
    done = moekit("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    "statement", ["import moekit", "import moekit.cli.main", "from moekit.cli.main import main; main(['--help'])"]
)
def test_nothing_heavy_is_imported_for_help(statement: str) -> None:
    check = f"import sys; print([m for m in {HEAVY!r} if m in sys.modules])"
    code = f"try:\n    exec({statement!r})\nexcept SystemExit: pass\n{check}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("--nonsense",), 2, "No such option"),
        (("proflie",), 2, "Did you mean 'profile'"),
        (("methods", "nonsense"), 2, "no method is of the kind"),
        (("methods", "--markdwon"), 2, "No such option"),
    ],
)
def test_a_users_mistake_is_one_message(args: tuple[str, ...], code: int, words: str) -> None:
    done = moekit(*args)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_command_the_help_is_shown() -> None:
    done = moekit()
    assert done.returncode == 2
    assert "profile" in done.stdout


def test_json_holds_the_error_too() -> None:
    done = moekit("methods", "nonsense", "--json")
    error = json.loads(done.stdout)["error"]
    assert error["type"] == "BadConfig"
    assert error["exit_code"] == 2
    assert "routing" in error["hint"]


@pytest.mark.full
@pytest.mark.slow
def test_debug_shows_the_traceback() -> None:
    done = moekit("methods", "nonsense", "--debug")
    assert "Traceback" in done.stderr
    assert done.returncode == 2


@pytest.mark.full
@pytest.mark.slow
def test_methods_lists_statistics_and_what_they_look_at() -> None:
    done = json.loads(moekit("methods", "statistics", "--json").stdout)
    found = {entry["name"]: entry for entry in done["statistics"]}
    assert found["gate_ratio"]["origin"] == "moekit"
    assert found["gate_ratio"]["looks_at"] == {"weights": "gate weights of the choices"}
    assert "all layers above" in found["neuron_taylor"]["live_only"]
    assert "power" in {family["name"] for family in done["families"]}
    assert "load" in done["groups"]["basic"]
    assert "gate_ratio" in moekit("methods", "statistics").stdout


@pytest.mark.full
@pytest.mark.slow
def test_methods_lists_c2r() -> None:
    done = moekit("methods", "--json")
    records = {(r["kind"], r["name"]): r for r in json.loads(done.stdout)["methods"]}
    assert records["routing", "c2r"]["paper"] == "arXiv:2504.01337"
    assert "top_t" in records["routing", "c2r"]["options"]


def test_version() -> None:
    from moekit import __version__

    assert moekit("--version").stdout.strip() == __version__


def test_every_command_is_a_job_or_has_a_module() -> None:
    folder = Path(sys.modules["moekit.cli.main"].__file__ or "").parent
    made = {file.stem.replace("_", "-") for file in folder.glob("[a-z]*.py")} - {"main"}
    assert made == set(HAND_MADE)
    of_jobs = {name for name, job in jobs().items() if job.line}
    assert not of_jobs & made
    assert of_jobs | made == set(COMMANDS)
    # A view that no job is called like would never be shown.
    views = {file.stem.replace("_", "-") for file in (folder / "views").glob("[a-z]*.py")}
    assert views <= set(jobs())


@pytest.mark.parametrize("statement", ["import moekit", "from moekit.cli.main import main; main(['--help'])"])
def test_it_starts_within_a_second(statement: str) -> None:
    # Processor time, the least of three: a busy machine must not fail this. benchmarks/startup.py takes wall time.
    times = []
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", statement], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        times.append(usage.ru_utime + usage.ru_stime)
    assert min(times) < 1.0
