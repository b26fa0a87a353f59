"""What docs/add-a-method.md says, done: the page's own code as a package of its own, seen everywhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


PAGE = (ROOT / "docs" / "add-a-method.md").read_text()
BLOCKS = dict(re.findall(r'```\w+ title="([\w./]+)"\n(.*?)```', PAGE, flags=re.DOTALL))


class Environment:
    """A virtual environment that sees the packages of this one, and what is installed into it."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False)
        self.python = folder / "bin" / "python"
        site = next((folder / "lib").glob("python*/site-packages"))
        (site / "outside.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))

    def install(self, package: Path) -> None:
        """`pip install -e .`, without a network."""
        self.run("-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", ".", folder=package)

    def run(self, *command: str, folder: Path = ROOT, code: int = 0) -> str:
        """What a command prints."""
        paths = [str(ROOT / "src"), str(ROOT)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        environment["PIP_DISABLE_PIP_VERSION_CHECK"] = environment["PIP_NO_INDEX"] = "1"
        done = subprocess.run(
            [str(self.python), *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The packages of the page, installed as it says."""
    environment = Environment(tmp_path_factory.mktemp("environment") / "venv")
    for name, files in {
        "coolest": {"pyproject.toml": "pyproject.toml", "coolest.py": "coolest.py", "surest.py": "surest.py"},
        "fading": {"pyproject.toml": "fading.toml"} | {file: file for file in BLOCKS if file.startswith("fading/")},
    }.items():
        folder = tmp_path_factory.mktemp(name)
        for file, block in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(BLOCKS[block])
        for inner in (folder / "fading" / "methods").parent.glob("methods"):
            (inner / "__init__.py").touch()
        environment.install(folder)
    return environment


def run(package: Environment, *command: str, folder: Path = ROOT) -> str:
    return package.run(*command, folder=folder)


CLI = ("-c", "from moekit.cli.main import main; main()")


def test_it_is_listed(package: Environment) -> None:
    records = json.loads(run(package, *CLI, "methods", "routing", "--json"))["methods"]
    (record,) = [r for r in records if r["name"] == "coolest"]
    assert record["origin"] == "coolest"
    assert record["options"]["temperature"]["help"] == "divides the logits; no unit (> 0) (default: 2.0)"


def test_help_shows_it_and_its_options(package: Environment) -> None:
    assert "coolest" in run(package, *CLI, "route", "--help")
    told = run(package, *CLI, "route", "coolest", "--help")
    assert "--temperature" in told
    assert "divides the logits" in told


def test_the_matrix_runs_it_on_every_family(package: Environment) -> None:
    from tests.families import FAMILIES

    listed = run(package, "-m", "pytest", "tests/matrix", "--collect-only", "-p", "no:cacheprovider")
    for family in FAMILIES:
        assert re.search(rf"coolest.*{family}|{family}.*coolest", listed), family
    some = "coolest and (olmoe or deepseek_v3)"
    passed = run(package, "-m", "pytest", "tests/matrix", "-v", "-p", "no:cacheprovider", "-k", some)
    assert re.search(r"\b4 passed", passed), passed
    assert "failed" not in passed


def test_a_pruning_method_prunes_and_takes_part(package: Environment, tmp_path: Path) -> None:
    from tests.tiny import write_model, write_text

    write_model(tmp_path / "moe", "qwen3_moe")
    write_text(tmp_path / "text", documents=20)
    page = (ROOT / "docs" / "add-a-method.md").read_text()
    prune, bench = re.findall(r"^moekit ((?:bench )?prune .*)$", page, flags=re.MULTILINE)
    pruned = json.loads(run(package, *CLI, *prune.split(), "--json", folder=tmp_path))
    assert pruned["method"] == "surest"
    assert all(len(layer["kept"]) == 4 for layer in pruned["layers"])
    benched = json.loads(run(package, *CLI, *bench.split(), "--json", folder=tmp_path))
    assert {"surest", "random", "frequency"} <= {r["name"] for r in benched["runs"]}


def test_the_matrix_runs_a_pruning_method_on_every_family(package: Environment) -> None:
    from tests.families import FAMILIES

    listed = run(package, "-m", "pytest", "tests/matrix", "--collect-only", "-p", "no:cacheprovider", "-k", "surest")
    for family in FAMILIES:
        assert re.search(rf"surest.*{family}|{family}.*surest", listed), family
    passed = run(package, "-m", "pytest", "tests/matrix", "-v", "-p", "no:cacheprovider", "-k", "surest and mixtral")
    assert "passed" in passed
    assert "failed" not in passed


def test_the_documentation_has_its_page(package: Environment) -> None:
    code = "import sys; sys.path.insert(0, 'docs'); import gen_methods, json; print(json.dumps(gen_methods.pages()))"
    pages = json.loads(run(package, "-c", code))
    assert "temperature" in pages["methods/routing-coolest.md"]
    assert "routing-coolest.md" in pages["methods/index.md"]


def test_a_kind_is_one_row_and_its_folder(package: Environment, tmp_path: Path) -> None:
    from tests.tiny import write_model

    assert re.search(r"fade +Scale the experts of a model down", run(package, *CLI, "--help"))
    told = run(package, *CLI, "fade", "--help")
    assert "--method" in told
    assert "--set" in told
    (record,) = json.loads(run(package, *CLI, "methods", "fade", "--json"))["methods"]
    assert (record["name"], record["origin"]) == ("half", "fading")
    write_model(tmp_path / "moe")
    done = json.loads(run(package, *CLI, "fade", "moe", "faded", "--method", "half", "--json", folder=tmp_path))
    assert done["factor"] == 0.5
    recipe = "name: a\nout: run\nsteps: [{use: fade, model: moe, method: half}]\n"
    (tmp_path / "recipe.yaml").write_text(recipe)
    ran = json.loads(run(package, *CLI, "run", "recipe.yaml", "--json", folder=tmp_path))
    assert ran["steps"]["fade"]["results"] == {"method": "half", "factor": 0.5}
    assert (tmp_path / "run" / "fade" / "factor.txt").read_text() == "0.5\n"
    code = "import sys; sys.path.insert(0, 'docs'); import gen_methods, json; print(json.dumps(gen_methods.pages()))"
    pages = json.loads(run(package, "-c", code))
    assert "one half" in pages["methods/fade-half.md"]
    assert "## Fading experts" in pages["methods/index.md"]


def test_a_broken_entry_point_is_named(package: Environment, tmp_path: Path) -> None:
    info = tmp_path / "broken-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[moekit.methods]\nbroken = absent_module\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])}
    done = subprocess.run(
        [sys.executable, *CLI, "methods"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "'broken' of the package broken does not import" in done.stderr
    assert "Traceback" not in done.stderr
