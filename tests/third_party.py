"""What an installed package adds to moekit, asked in one process.

`python -m tests.third_party FOLDER SITE` writes FOLDER/answers.json; SITE is the folder that pip installed into. It
asks the command line and the builder of the documentation, and runs the laws of each kind on the package's methods.
Which parameters pytest would try is read off the law functions themselves, so nothing is listed by hand.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import os
import re
import site
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.contracts import pair

ROOT = Path(__file__).resolve().parents[1]
METHODS = (("routing", "coolest"), ("objective", "purest"), ("prune", "surest"), ("fade", "half"))


def cli(*args: str) -> dict[str, Any]:
    """What a command prints."""
    from moekit.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(list(args))
        except SystemExit as left:
            code = left.code
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def commands(page: str) -> dict[str, Any]:
    """The page's commands, and what lists and explains methods."""
    lines = re.findall(r"^moekit (\S.*?) *(?:#.*)?$", page, flags=re.MULTILINE)
    told = {f"methods {kind} --json": cli("methods", kind, "--json") for kind in ("objective", "prune", "fade")}
    told |= {line: cli(*line.split()) for line in ("--help", "prune --help", "train --help", "fade --help")}
    told["methods routing --json"] = cli("methods", "routing", "--json")
    for line in lines:
        told[line] = cli(*line.split(), *(() if "--help" in line or line.startswith("methods") else ("--json",)))
    told["fade"] = cli("fade", "moe", "-o", "faded", "--method", "half", "--json")
    Path("recipe.yaml").write_text("name: a\nout: run\nsteps: [{use: fade, model: moe, method: half}]\n")
    told["run"] = cli("run", "recipe.yaml", "--json")
    told["no such method"] = cli("prune", "moe", "--method", "surestt", "--keep", "0.5", "-o", "no")
    return told


def tries(law: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """The parameters that pytest would call a law with; those of `make test-all` alone are left out."""
    axes = []
    for mark in getattr(law, "pytestmark", []):
        if mark.name != "parametrize":
            continue
        names, values = mark.args[0], mark.args[1]
        names = [names] if isinstance(names, str) else list(names)
        rows = []
        for value in values:
            slow = any(m.name == "slow" for m in getattr(value, "marks", ()))
            given = getattr(value, "values", None) if isinstance(value, type(pytest.param(0))) else None
            given = given if given is not None else (value if len(names) > 1 else (value,))
            if not slow:
                rows.append(dict(zip(names, given, strict=True)))
        axes.append(rows)
    for rows in itertools.product(*axes):
        yield {name: value for row in rows for name, value in row.items()}


def is_about(values: dict[str, Any], kind: str, name: str) -> bool:
    """Whether parameters name a method: by its record, or by its name."""
    record = values.get("record")
    return (getattr(record, "kind", ""), getattr(record, "name", "")) == (kind, name) or name in values.values()


def fixtures(module: ModuleType, law: Callable[..., Any], values: dict[str, Any]) -> dict[str, Any]:
    """What else a law asks for."""
    made: dict[str, Any] = {}
    for wanted in set(inspect.signature(law).parameters) - values.keys():
        if wanted == "tmp_path":
            made[wanted] = Path(tempfile.mkdtemp(dir="."))
        elif wanted == "monkeypatch":
            made[wanted] = pytest.MonkeyPatch()
        elif wanted == "layer":
            made[wanted] = module.some_layer()
        elif wanted == "recorded":
            folder = Path(tempfile.mkdtemp(dir=".")) / "m"
            made[wanted] = module.record(values["family"], folder, ["surest"], fused=values.get("fused", False))
    return made


def module_of(path: str) -> ModuleType:
    """A law file, of moekit or of the package."""
    if (ROOT / path).exists():
        return importlib.import_module(path.removesuffix(".py").replace("/", "."))
    fading = importlib.import_module("fading").__file__
    assert fading is not None
    spec = importlib.util.spec_from_file_location("laws_of_fading", Path(fading).parents[1] / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_laws(kind: str, name: str) -> dict[str, list[str]]:
    """Law function -> the families (or "") it was run on; the first that fails ends everything."""
    from moekit.catalogue import kind_of

    done: dict[str, list[str]] = {}
    for path in kind_of(kind).laws:
        module = module_of(path)
        for law_name, law in vars(module).items():
            if not law_name.startswith("test_"):
                continue
            for values in tries(law):
                if not is_about(values, kind, name):
                    continue
                family = str(values.get("family", ""))
                done.setdefault(f"{path}::{law_name}", []).append(family)
                if "matrix" in path and family != pair(name)[0]:
                    continue
                others = fixtures(module, law, values)
                law(**values, **others)
                for other in others.values():
                    if isinstance(other, pytest.MonkeyPatch):
                        other.undo()
    return done


def purity() -> float:
    """The page's objective on the table that all objectives on routers are worked out by hand on."""
    import torch

    from moekit import catalogue
    from moekit.training.batch import MicroBatch
    from moekit.training.collector import Routed
    from tests.laws import test_objectives as hand

    scores_TE, indices_TK = torch.tensor(hand.SCORES), torch.tensor(hand.CHOSEN)
    batch = MicroBatch(torch.zeros(4, 1, dtype=torch.int64))
    seen = Routed(hand.some_layer(), scores_TE.log(), scores_TE.gather(1, indices_TK), indices_TK, None, False, batch)
    return float(catalogue.make("objective", "purest", {}).loss(seen))


def broken() -> dict[str, Any]:
    """What `moekit methods` says when one more package is found whose entry point names nothing."""
    from moekit.catalogue import method

    info = Path("broken") / "broken-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[moekit.methods]\nbroken = absent_module\n")
    sys.path.insert(0, str(info.parent.resolve()))
    method._loaded = False  # as a new process would begin
    return cli("methods")


def main(folder: Path, site_packages: str) -> None:
    """Ask everything, in an empty folder."""
    site.addsitedir(site_packages)
    os.chdir(folder)
    from tests.tiny import write_model, write_text

    write_model(Path("moe"), "qwen3_moe")
    write_text(Path("text"), documents=20)
    page = (ROOT / "docs" / "add-a-method.md").read_text()
    answers: dict[str, Any] = {"commands": commands(page)}
    sys.path.insert(0, str(ROOT / "docs"))
    answers["pages"] = importlib.import_module("gen_methods").pages()
    answers["laws"] = {f"{kind} {name}": run_laws(kind, name) for kind, name in METHODS}
    answers["purity"] = purity()
    answers["broken"] = broken()
    Path("answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
