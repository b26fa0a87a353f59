"""What docs/add-a-method.md says, done: the page's own code as a package of its own, installed by pip, seen everywhere.

One process installs it, and one asks everything (`tests.third_party`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from moekit import catalogue
from tests import processes
from tests.contracts import pair

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "add-a-method.md").read_text()
BLOCKS = dict(re.findall(r'```\w+ title="([\w./]+)"\n(.*?)```', PAGE, flags=re.DOTALL))


def install(python: Path, package: Path) -> None:
    """`pip install -e .`, without a network."""
    quiet = {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
    done = subprocess.run(
        command, cwd=package, env={**os.environ, **quiet}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The page's package installed, and what moekit then says."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home / "venv", with_pip=False)
    python = home / "venv" / "bin" / "python"
    site = next((home / "venv" / "lib").glob("python*/site-packages"))
    (site / "outside.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    package = tmp_path_factory.mktemp("package")
    for file, text in BLOCKS.items():
        (package / file).parent.mkdir(parents=True, exist_ok=True)
        (package / file).write_text(text)
    (package / "fading" / "methods" / "__init__.py").touch()
    install(python, package)
    work = tmp_path_factory.mktemp("work")
    done = processes.python(
        ["-m", "tests.third_party", work, site], cwd=ROOT, env={"COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads((work / "answers.json").read_text())
    return found


def said(answers: dict[str, Any], line: str) -> str:
    """What a command printed that was to succeed."""
    told = answers["commands"][line]
    assert told["code"] == 0, told["out"] + told["err"]
    return str(told["out"])


def record(answers: dict[str, Any], kind: str, name: str) -> dict[str, Any]:
    (found,) = [r for r in json.loads(said(answers, f"methods {kind} --json"))["methods"] if r["name"] == name]
    return dict(found)


def test_each_is_listed_with_its_package_traits_and_place(answers: dict[str, Any]) -> None:
    listed = {
        ("routing", "coolest"): ("coolest", "gating", ["learnable"]),
        ("objective", "purest"): ("purest", "gating", ["stock"]),
        ("prune", "surest"): ("surest", "compression", ["narrows", "stock"]),
        ("fade", "half"): ("fading", "compression", ["stock"]),
    }
    for (kind, name), expected in listed.items():
        found = record(answers, kind, name)
        assert (found["origin"], found["axis"], found["traits"]) == expected
    temperature = record(answers, "routing", "coolest")["options"]["temperature"]
    assert temperature["help"] == "divides the logits; no unit (> 0) (default: 2)"
    assert re.search(r"coolest +- +gating +learnable +coolest", said(answers, "methods routing"))


def test_help_shows_each_and_its_options(answers: dict[str, Any]) -> None:
    told = said(answers, "route coolest --help")
    assert "--temperature" in told
    assert "divides the logits" in told
    assert re.search(r"methods prune\).*surest", " ".join(said(answers, "prune --help").split()))
    train = " ".join(said(answers, "train --help").split())
    assert re.search(r"methods objective\).*purest", train)
    assert "--purest" in train
    assert re.search(r"fade +Scale the experts of a model down", said(answers, "--help"))
    fade = said(answers, "fade --help")
    assert "--method" in fade
    assert "--set" in fade
    assert "(moekit methods fade): half." in fade


def test_the_laws_of_a_new_kind_hold(answers: dict[str, Any]) -> None:
    law = "tests/test_fading.py::test_it_makes_experts_smaller_and_not_nothing"
    assert answers["laws"]["fade half"] == {law: [""]}


@pytest.mark.parametrize(("kind", "name"), [("routing", "coolest"), ("objective", "purest"), ("prune", "surest")])
def test_the_laws_of_its_kind_hold(answers: dict[str, Any], kind: str, name: str) -> None:
    """Every law file of the kind tries it, and its families are in the matrix; all that was tried has passed."""
    done: dict[str, list[str]] = answers["laws"][f"{kind} {name}"]
    assert {law.split("::")[0] for law in done} == set(catalogue.kind_of(kind).laws)
    if kind == "routing":
        matrix = [set(families) for law, families in done.items() if "matrix" in law]
        assert matrix == [set(pair(name))] * 2
        assert any(law.endswith("test_an_optimizer_moves_it_and_the_moved_value_is_saved") for law in done)


def test_the_objective_is_what_its_page_says(answers: dict[str, Any]) -> None:
    """1 - (.30, .36, .30, .34): rows (.4 .3 .2 .1), (.5 .1 .3 .1), (.1 .2 .3 .4), (.4 .4 .1 .1)."""
    assert answers["purity"] == pytest.approx(0.675)


def test_the_commands_of_the_page_do_what_they_say(answers: dict[str, Any]) -> None:
    (route,) = [line for line in answers["commands"] if line.startswith("route coolest ./moe")]
    assert json.loads(said(answers, route))
    (train,) = [line for line in answers["commands"] if line.startswith("train ./moe")]
    assert json.loads(said(answers, train))["steps"] == 2
    (prune,) = [line for line in answers["commands"] if line.startswith("prune ./moe")]
    pruned = json.loads(said(answers, prune))
    assert pruned["method"] == "surest"
    assert all(len(layer["kept"]) == 4 for layer in pruned["layers"])
    (bench,) = [line for line in answers["commands"] if line.startswith("bench prune")]
    benched = json.loads(said(answers, bench))
    assert {"surest", "random", "frequency"} <= {r["name"] for r in benched["runs"]}


def test_the_documentation_has_their_pages(answers: dict[str, Any]) -> None:
    pages = answers["pages"]
    assert "temperature" in pages["methods/routing-coolest.md"]
    assert "learnable: learns tensors of its own" in pages["methods/routing-coolest.md"]
    assert "Gini impurity" in pages["methods/objective-purest.md"]
    assert "squared_gate_mass" in pages["methods/prune-surest.md"]
    assert "one half" in pages["methods/fade-half.md"]
    index = pages["methods/index.md"]
    assert "## Fading experts" in index
    assert all(f"({name}.md)" in index for name in ("routing-coolest", "objective-purest", "prune-surest", "fade-half"))


def test_a_kind_is_one_row_and_its_folder(answers: dict[str, Any]) -> None:
    assert json.loads(said(answers, "fade"))["factor"] == 0.5
    ran = json.loads(said(answers, "run"))
    assert ran["steps"]["fade"]["results"] == {"method": "half", "factor": 0.5}


def test_a_name_that_is_not_there_gets_the_near_one(answers: dict[str, Any]) -> None:
    told = answers["commands"]["no such method"]
    assert told["code"] == 2
    assert "did you mean 'surest'?" in told["err"]


def test_a_broken_entry_point_is_named(answers: dict[str, Any]) -> None:
    told = answers["broken"]
    assert told["code"] == 2
    assert "'broken' of the package broken does not import" in told["err"]
    assert "Traceback" not in told["err"]
