"""The comparison with official code: what it says without a checkout, and how it imports out of one."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from official import shared  # type: ignore[import-not-found]

    return shared


def test_repositories_that_are_not_named_are_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["official_code.py"])
    main = runpy.run_path(str(BENCHMARKS / "official_code.py"))
    assert main["main"]() == 0
    told = capsys.readouterr().out
    assert told.count("skipped: no --") == len(main["PARTS"]) == 9


def test_each_part_has_its_module() -> None:
    parts = runpy.run_path(str(BENCHMARKS / "official_code.py"))["PARTS"]
    for module, _ in parts.values():
        assert (BENCHMARKS / "official" / f"{module}.py").is_file()


def test_modules_come_out_of_a_checkout_without_what_surrounds_them(shared: Any, tmp_path: Path) -> None:
    package = tmp_path / "theirs"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('heavy')\n")
    (package / "maths.py").write_text(
        "import missing_library\nfrom missing_library.inner import Thing, decorate, is_there\n"
        "from torch.nn import NoSuchLayer\n\n@decorate('words')\ndef twice(x):\n    return 2 * x\n"
    )
    before, nn = set(sys.modules), torch.nn
    stubs, missing = ("missing_library", "missing_library.inner"), {"torch.nn": ["NoSuchLayer"]}
    with shared.importing(tmp_path, bare=("theirs",), stubs=stubs, missing=missing) as load:
        module = load("theirs.maths")
        assert module.twice(21) == 42
        assert isinstance(module.Thing, type)
        assert module.is_there() is False
    assert not {name for name in set(sys.modules) - before if name.startswith(("theirs", "missing_library"))}
    assert not hasattr(nn, "NoSuchLayer")
    assert str(tmp_path) not in sys.path
    assert not list(package.rglob("*.pyc"))


def test_a_module_of_the_same_name_is_there_again(shared: Any, tmp_path: Path) -> None:
    import json

    with shared.importing(tmp_path, stubs=("json",)):
        assert sys.modules["json"] is not json
    assert sys.modules["json"] is json


def test_the_table_tells_what_disagrees(shared: Any) -> None:
    table = shared.Table("one")
    one = torch.tensor([1.0, 2.0])
    table.close("close", one, one + 1e-7)
    table.same("same", [1, 2], [1, 2])
    table.tell("other", 1, 2, "official errs: so it is")
    assert not table.failed()
    assert [row.verdict for row in table.rows] == ["agrees", "agrees", "official errs: so it is"]
    table.close("far", one, one + 1e-2)
    assert table.failed()
    other = shared.Table("two")
    other.same("same", [1, 2], [1, 3])
    assert other.failed()
    assert other.rows[0].moekit == "1 of 2 equal"


def test_the_old_layout_computes_what_the_new_one_does(shared: Any) -> None:
    import copy

    for family, names in (("mixtral", ("w1", "w3", "w2")), ("olmoe", ("gate_proj", "up_proj", "down_proj"))):
        model, ids = shared.tiny(family), shared.tokens(2, 9)
        legacy = shared.Legacy(copy.deepcopy(model), names)
        with torch.no_grad():
            found = legacy(input_ids=ids)
            torch.testing.assert_close(found.logits, model(ids).logits, atol=1e-5, rtol=1e-5)
        assert [logits.shape for logits in found.router_logits] == [(18, shared.EXPERTS)] * shared.LAYERS
