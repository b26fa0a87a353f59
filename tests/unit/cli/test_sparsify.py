"""`moekit sparsify` as a user calls it, alone and after `moekit prune`, and what it says to bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moekit.cli.main import main
from moekit.recipe import runner
from moekit.recipe.schema import load_recipe
from moekit.recipe.variables import parse_overrides
from moekit.trace.streamed import Streamed
from tests.commands import Moekit
from tests.contracts import FULL
from tests.families import EXPERTS, HIDDEN, WIDTH
from tests.quantizing import fp8_packer, fp8_settings, requantized
from tests.tiny import write_model, write_text

RECIPES = Path(__file__).resolve().parents[3] / "recipes"
ALL = 2 * EXPERTS * 3 * HIDDEN * WIDTH


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, the model with 6 of 8 experts left, and one of uneven layers."""
    folder = tmp_path_factory.mktemp("made")
    write_model(folder / "moe", "qwen3_moe")
    write_model(folder / "other", "qwen3_moe", seed=1)
    write_text(folder / "text", documents=20)
    for out, options in {
        "pruned": ["--method", "stun"],
        "uneven": ["--method", "gate-mass", "--scope", "global"],
    }.items():
        command = ["prune", folder / "moe", "--keep", "0.75", "--data", folder / "text", "-o", folder / out, *options]
        with pytest.raises(SystemExit) as left:
            main([*map(str, command), "--no-proof", "--quiet"])
        assert left.value.code == 0
    return folder


def sparsify(made: Path, *options: object, model: str = "moe", method: str = "wanda", data: str = "text") -> list[Any]:
    return ["sparsify", made / model, "--method", method, "--data", made / data, *options]


def experts_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
    return {name: t for name, t in tensors.items() if ".experts." in name}


def gone(folder: Path) -> float:
    """Share of the unpruned model's expert weights that are not there or zero, counted in the files."""
    found = experts_of(folder).values()
    return 1 - sum(int((t != 0).sum()) for t in found) / ALL


def assert_same(first: Path, second: Path) -> None:
    one, two = experts_of(first), experts_of(second)
    assert sorted(one) == sorted(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_it_writes_a_sparse_model_and_says_what_it_costs(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    done = moekit(*sparsify(made, "--sparsity", 0.5, "-o", tmp_path / "out"))
    assert done.code == 0, done.err
    told = (
        f"zeros: {ALL // 2:,} of {ALL:,} weights",
        "(50.0000%)",
        "held-out text",
        "unchanged",
        "wanda against magnitude",
    )
    for line in (*told, "error: wanda", "error: magnitude", "proven: every tensor"):
        assert line in done.out, line
    assert "gone in all" not in done.out
    assert gone(tmp_path / "out") == 0.5
    assert moekit("check", tmp_path / "out").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    record = json.loads((tmp_path / "out" / "moekit.json").read_text())
    assert record["parent"] == str((made / "moe").resolve())
    assert record["config"]["sparsity"] == 0.5
    assert set(record["scores"]["proof"]["perplexity"]) == {"wanda", "magnitude"}


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "model", "total"),
    [
        ("wanda", "pruned", 0.4),
        pytest.param("wanda", "uneven", 0.65, marks=FULL),
        pytest.param("owl", "pruned", 0.65, marks=FULL),
        pytest.param("owl", "uneven", 0.4, marks=FULL),
        pytest.param("magnitude", "pruned", 0.4, marks=FULL),
        ("magnitude", "uneven", 0.65),
    ],
)
def test_a_total_counts_what_went_with_the_experts(
    method: str, model: str, total: float, moekit: Moekit, made: Path, tmp_path: Path
) -> None:
    options = ["--total", total, "-o", tmp_path / "out", "--json", "--no-proof"]
    done = moekit(*sparsify(made, *options, model=model, method=method))
    assert done.code == 0, done.err
    weights = done.json["weights"]
    assert weights["original"] == ALL
    assert weights["present"] == ALL * 3 // 4
    assert weights["total"] == pytest.approx(total, abs=1 / WIDTH)
    assert weights["total"] == pytest.approx(gone(tmp_path / "out"), abs=1e-12)
    shares = {layer["sparsity"] for layer in done.json["layers"]}
    assert (len(shares) > 1) == (method == "owl")


@pytest.mark.full
@pytest.mark.slow
def test_a_total_is_printed_with_its_parts(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    done = moekit(*sparsify(made, "--total", 0.5, "-o", tmp_path / "out", "--no-proof", model="pruned"))
    assert done.code == 0, done.err
    assert f"gone in all: {ALL // 4:,} with their experts + " in done.out
    assert f"of {ALL:,} (" in done.out


@pytest.mark.full
@pytest.mark.slow
def test_a_stored_plan_gives_the_same_zeros_without_a_text(
    moekit: Moekit, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--sparsity", 0.6, "--plan", tmp_path / "p.json", "-o", tmp_path / "out")
    assert moekit(*sparsify(made, *options, method="owl")).code == 0

    def never(*_: object) -> None:
        raise AssertionError("the text was walked again")

    monkeypatch.setattr(Streamed, "run", never)
    done = moekit("sparsify", "--from", tmp_path / "p.json", "-o", tmp_path / "again", "--json")
    assert done.code == 0, done.err
    assert_same(tmp_path / "out", tmp_path / "again")
    # The text that was kept apart when the plan was made is what the proof is on.
    assert done.json["proof"]["source"] == f"{made / 'text'}[heldout]"
    assert moekit("sparsify", "--from", tmp_path / "p.json", "-o", tmp_path / "third", "--no-proof").code == 0
    assert_same(tmp_path / "out", tmp_path / "third")


@pytest.mark.full
@pytest.mark.slow
def test_a_plan_alone_writes_no_model(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    done = moekit(*sparsify(made, "--set", "pattern=2:4", "--plan", tmp_path / "p.json"))
    assert done.code == 0, done.err
    assert "are to become zero" in done.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.json", "p.safetensors"]
    assert moekit("sparsify", "--from", tmp_path / "p.json", "-o", tmp_path / "out").code == 0
    for name, tensor in experts_of(tmp_path / "out").items():
        assert bool(((tensor.unflatten(-1, (-1, 4)) == 0).sum(-1) == 2).all()), name


def test_a_dry_run_does_nothing(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    done = moekit(*sparsify(made, "--sparsity", 0.5, "-o", tmp_path / "out", "--dry-run"))
    assert done.code == 0, done.err
    assert list(tmp_path.iterdir()) == []


REFUSED: dict[str, tuple[list[Any], str]] = {
    "no share": ([], "nothing says how many"),
    "both shares": (["--sparsity", 0.5, "--total", 0.5], "both given"),
    "a share of one": (["--sparsity", 1.0], "less than 1"),
    "a total below what is gone": (["--total", 0.1, "MODEL=pruned"], "is less than what goes with the experts"),
    "another share than the pattern's": (["--sparsity", 0.4, "--set", "pattern=2:4"], "exactly 0.5"),
    "another total than the pattern's": (["--total", 0.5, "--set", "pattern=2:4", "MODEL=pruned"], "a total of 0.625"),
    "no such method": (["--sparsity", 0.5, "--method", "wonda"], "wanda"),
    "no such knob": (["--sparsity", 0.5, "--set", "alpha=1"], "its options"),
    "an original of another shape": (["--total", 0.5, "--original", "tiny"], "is not what is left"),
    "a plan that is none": (["--sparsity", 0.5, "--plan", "p.txt"], ".json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(
    case: str, moekit: Moekit, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "tiny", "qwen3_moe", moe_intermediate_size=16)
    options, message = REFUSED[case]
    model = next((o.partition("=")[2] for o in options if str(o).startswith("MODEL=")), "moe")
    command = sparsify(made, *(o for o in options if not str(o).startswith("MODEL=")), model=model)
    done = moekit(*command, *([] if "--plan" in options else ["-o", tmp_path / "out"]))
    assert done.code == 2, done.out
    assert message in done.err
    assert not (tmp_path / "out").exists()


def test_text_and_parents_that_are_missing(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    bare = ["sparsify", made / "moe", "--method", "wanda", "--sparsity", 0.5, "-o", tmp_path / "out"]
    done = moekit(*bare)
    assert (done.code, "input_square" in done.err, "--data" in done.err) == (2, True, True)
    blind = ["sparsify", made / "moe", "--method", "magnitude", "--sparsity", 0.5, "-o", tmp_path / "out"]
    assert "--heldout" in moekit(*blind).err
    assert moekit(*blind, "--no-proof").code == 0
    assert "nothing says what to write" in moekit(*bare[:-2]).err

    shutil.copytree(made / "pruned", tmp_path / "orphan")
    record = json.loads((tmp_path / "orphan" / "moekit.json").read_text())
    (tmp_path / "orphan" / "moekit.json").write_text(json.dumps({**record, "parent": str(tmp_path / "gone")}))
    orphan = ["sparsify", tmp_path / "orphan", "--method", "magnitude", "--no-proof"]
    done = moekit(*orphan, "--total", 0.5, "-o", tmp_path / "sparse")
    assert (done.code, "--original" in done.err) == (2, True)
    assert moekit(*orphan, "--total", 0.5, "--original", made / "moe", "-o", tmp_path / "sparse").code == 0
    assert gone(tmp_path / "sparse") == pytest.approx(0.5, abs=1 / WIDTH)
    assert moekit(*orphan, "--sparsity", 0.5, "-o", tmp_path / "plain").code == 0, "only the total needs a parent"


def test_quantized_weights_are_refused_before_any_work(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "moe", tmp_path / "quantized")
    requantized(tmp_path / "quantized", fp8_settings((16, 16)), fp8_packer((16, 16)))
    shutil.rmtree(tmp_path / "quantized-as-floats")
    command = ["sparsify", tmp_path / "quantized", "--method", "magnitude", "--sparsity", 0.5, "--no-proof"]
    done = moekit(*command, "-o", tmp_path / "out")
    assert (done.code, "quantized (fp8): they cannot be changed" in done.err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["quantized"]


@pytest.mark.full
@pytest.mark.slow
def test_a_plan_of_another_model(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    assert moekit(*sparsify(made, "--sparsity", 0.5, "--plan", tmp_path / "p.json")).code == 0
    told = json.loads((tmp_path / "p.json").read_text())
    (tmp_path / "p.json").write_text(json.dumps({**told, "model": str(made / "other")}))
    done = moekit("sparsify", "--from", tmp_path / "p.json", "-o", tmp_path / "out")
    assert (done.code, "not for" in done.err) == (2, True)
    done = moekit("sparsify", made / "moe", "--from", tmp_path / "p.json", "-o", tmp_path / "out")
    assert (done.code, "model given as well" in done.err) == (2, True)
    done = moekit("apply", tmp_path / "p.json", "-o", tmp_path / "out")
    assert done.code == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.full
@pytest.mark.slow
def test_the_recipe_takes_both_stages(made: Path, tmp_path: Path) -> None:
    pairs = [f"model={made / 'moe'}", f"data={made / 'text'}", "keep=0.75", "total=0.5"]
    recipe = load_recipe(RECIPES / "stun.yaml", parse_overrides(pairs), out=str(tmp_path / "run"))
    result = runner.run(recipe)
    assert len(result.done) == len(recipe.steps)
    assert gone(tmp_path / "run" / "sparse") == pytest.approx(0.5, abs=1 / WIDTH)
    assert result.done["sparse"].results["weights"]["total"] == pytest.approx(0.5, abs=1 / WIDTH)
    page = (tmp_path / "run" / "report" / "report.html").read_text()
    assert "sparse" in page
    assert runner.run(recipe).ran == []
