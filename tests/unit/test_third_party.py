"""What docs/add-a-method.md says, done: the page's own code as a package of its own, seen everywhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `pip install --no-deps --target` leaves it, from the code blocks of the page."""
    page = (ROOT / "docs" / "add-a-method.md").read_text()
    blocks = dict(re.findall(r'```\w+ title="([\w.]+)"\n(.*?)```', page, flags=re.DOTALL))
    folder = tmp_path_factory.mktemp("site")
    for name in ("coolest.py", "surest.py", "overlap.py"):
        (folder / name).write_text(blocks[name])
    found = re.search(r'entry-points\."(.+?)"\]\n(\w+) = "(\w+)"', blocks["pyproject.toml"])
    second = re.search(r'`(\w+) = "(\w+)"`', page)
    assert found is not None
    assert second is not None
    info = folder / "coolest-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: coolest\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(
        f"[{found[1]}]\n{found[2]} = {found[3]}\n{second[1]} = {second[2]}\noverlap = overlap\n"
    )
    return folder


def run(package: Path, *command: str, folder: Path = ROOT) -> str:
    paths = [str(package), str(ROOT / "src"), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


CLI = ("-c", "from moekit.cli.main import main; main()")


def test_it_is_listed(package: Path) -> None:
    records = json.loads(run(package, *CLI, "methods", "routing", "--json"))["methods"]
    (record,) = [r for r in records if r["name"] == "coolest"]
    assert record["origin"] == "coolest"
    assert record["options"]["temperature"]["help"] == "divides the logits; no unit (> 0) (default: 2.0)"


def test_its_statistics_are_listed_and_recorded(package: Path) -> None:
    listed = json.loads(run(package, *CLI, "methods", "statistics", "--json"))["statistics"]
    (entry,) = [s for s in listed if s["name"] == "output_overlap"]
    assert (entry["origin"], entry["shape"], list(entry["looks_at"])) == ("overlap", "EE", ["all_outputs"])
    code = (
        "from tests.families import build, tokens; from moekit.trace import record; "
        "names = ('output_overlap', 'neuron_gain', 'all_output_gram', 'neuron_taylor'); "
        "s = record(build('qwen3_moe'), [tokens()], statistics=names).statistics[0]; "
        "print(s['output_overlap'].equal(s['all_output_gram']), s['neuron_gain'].equal(s['neuron_taylor']))"
    )
    assert run(package, "-c", code).split() == ["True", "True"]


def test_help_shows_it_and_its_options(package: Path) -> None:
    assert "coolest" in run(package, *CLI, "route", "--help")
    told = run(package, *CLI, "route", "coolest", "--help")
    assert "--temperature" in told
    assert "divides the logits" in told


def test_the_matrix_runs_it_on_every_family(package: Path) -> None:
    from tests.families import FAMILIES

    listed = run(package, "-m", "pytest", "tests/matrix", "--collect-only", "-p", "no:cacheprovider")
    for family in FAMILIES:
        assert re.search(rf"coolest.*{family}|{family}.*coolest", listed), family
    some = "coolest and (olmoe or deepseek_v3)"
    passed = run(package, "-m", "pytest", "tests/matrix", "-v", "-p", "no:cacheprovider", "-k", some)
    assert re.search(r"\b4 passed", passed), passed
    assert "failed" not in passed


def test_a_pruning_method_prunes_and_takes_part(package: Path, tmp_path: Path) -> None:
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


def test_the_matrix_runs_a_pruning_method_on_every_family(package: Path) -> None:
    from tests.families import FAMILIES

    listed = run(package, "-m", "pytest", "tests/matrix", "--collect-only", "-p", "no:cacheprovider", "-k", "surest")
    for family in FAMILIES:
        assert re.search(rf"surest.*{family}|{family}.*surest", listed), family
    passed = run(package, "-m", "pytest", "tests/matrix", "-v", "-p", "no:cacheprovider", "-k", "surest and mixtral")
    assert "passed" in passed
    assert "failed" not in passed


def test_the_documentation_has_its_page(package: Path) -> None:
    code = "import sys; sys.path.insert(0, 'docs'); import gen_methods, json; print(json.dumps(gen_methods.pages()))"
    pages = json.loads(run(package, "-c", code))
    assert "temperature" in pages["methods/routing-coolest.md"]
    assert "routing-coolest.md" in pages["methods/index.md"]


def test_a_broken_entry_point_is_named(package: Path, tmp_path: Path) -> None:
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
