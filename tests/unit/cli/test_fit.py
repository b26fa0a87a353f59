"""`moekit fit` as a user calls it, from Python and in a recipe: what it writes, what it says, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import moekit as api
from moekit.checkpoint import Record
from moekit.compress.joint.measuring import _Measuring
from moekit.errors import BadConfig, MoekitError
from moekit.evaluation.documents import PerplexityResult
from moekit.jobs.fitting import choosing, costs, request
from moekit.jobs.fitting.choosing import halves, rank_correlation
from moekit.jobs.fitting.request import parse_bytes
from tests.commands import Moekit
from tests.tiny import write_model, write_text

FEW: dict[str, Any] = {
    "max_tokens": 200,
    "seq_len": 64,
    "proof_tokens": 120,
    "random_plans": 1,
    "tries": 2,
    "choices": 8,
}
WORDS = [word for name, value in FEW.items() for word in (f"--{name.replace('_', '-')}", value)]
BUDGET = 150_000


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_model(folder / "moe", "qwen3_moe", num_hidden_layers=2)
    write_text(folder / "text", documents=20)
    return folder


def fit(made: Path, out: Path | None, **more: Any) -> Any:
    return api.fit(made / "moe", **{"bytes": BUDGET, "data": made / "text", **FEW, "out": out, **more})


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_a_stock_folder_fits_and_loads_in_stock_transformers(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    done = moekit("fit", made / "moe", "--bytes", BUDGET, "--data", made / "text", *WORDS, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert "plans of these bytes, best first" in done.out
    assert "rank correlation" in done.out
    assert weight_bytes(tmp_path / "out") <= BUDGET
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert bool(model(torch.tensor([[5, 6, 7]])).logits.isfinite().all())
    record = Record.read(tmp_path / "out")
    assert record is not None
    assert (record.config["kind"], record.config["engine"]) == ("fit", "stock")


def test_the_plan_is_no_worse_than_what_each_kind_alone_makes_of_the_bytes(made: Path, tmp_path: Path) -> None:
    done = fit(made, tmp_path / "out", engine="moekit", plan=tmp_path / "p.json")
    tried = {plan["name"]: plan for plan in done.tried}
    best = min(plan["expected"] for plan in done.tried)
    for name in ("drop alone", "merge alone", "bits alone"):
        single = next(plan for own, plan in tried.items() if name in own)
        assert single["bytes"] <= BUDGET
        assert single["expected"] >= best
        assert single["chosen_on"] >= done.tried[0]["chosen_on"]
    assert next(plan["expected"] for own, plan in tried.items() if own.startswith("plan 1")) == best
    assert done.tried[0]["chosen_on"] == min(plan["chosen_on"] for plan in done.tried)
    assert done.measured == done.tried[0]["measured"]
    assert done.bytes["after"] <= BUDGET < done.bytes["folder"]
    assert done.bytes["folder"] == weight_bytes(tmp_path / "out")
    assert done.packed == "moekit's packed form"
    assert any("exported" in line for line in done.warnings)
    assert done.check["ok"]
    told = json.loads((tmp_path / "p.json").read_text())
    assert told["hash"] == done.plan
    assert {int(layer) for layer in told["recipes"]} == {0, 1}


def test_healing_changes_the_routers_alone_and_keeps_the_model_before_it(made: Path, tmp_path: Path) -> None:
    how: dict[str, Any] = {"heal": "router", "heal_settings": {"steps": 2, "seq_len": 32, "batch": 2}, "tries": 1}
    done = fit(made, tmp_path / "out", **how, random_plans=0)
    before, after = (
        {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
        for folder in (tmp_path / "out-unhealed", tmp_path / "out")
    )
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert changed
    assert all(name.endswith("mlp.gate.weight") for name in changed)
    assert done.healed is not None
    assert done.healed["changed"]["tensors"] == len(changed)
    assert next(model["name"] for model in done.healed["proof"]["models"]) == "parent"
    record = Record.read(tmp_path / "out")
    assert record is not None
    assert Path(record.parent).name == "out-unhealed"
    assert done.bytes["folder"] == weight_bytes(tmp_path / "out-unhealed")


def test_plans_are_chosen_on_one_half_of_the_documents_of_each_domain_and_measured_on_the_other() -> None:
    text = PerplexityResult(domains=("a", "b", "a", "a", "b", "a"), tokens=(5, 5, 0, 5, 5, 5), nll=(1.0,) * 6)
    assert halves(text) == ([0, 1, 5], [3, 4])
    alone = PerplexityResult(domains=("a", "b"), tokens=(5, 5), nll=(1.0, 1.0))
    assert halves(alone) == ([0, 1], [0, 1])


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("budget", [250_000, 160_000])
def test_what_fits_is_packed_into_the_bytes_that_were_asked_for(budget: int, tmp_path: Path) -> None:
    write_model(tmp_path / "moe", "qwen3_moe", num_hidden_layers=2, moe_intermediate_size=64)
    write_text(tmp_path / "text", documents=20)
    api.fit(tmp_path / "moe", bytes=budget, engine="moekit", data=tmp_path / "text", **FEW, out=tmp_path / "fits")
    api.export(tmp_path / "fits", to="packed", out=tmp_path / "packed")
    assert weight_bytes(tmp_path / "packed") <= budget
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        fits, packed = (api.load(tmp_path / name, device="cpu")(ids).logits for name in ("fits", "packed"))
    assert torch.allclose(packed, fits, rtol=1e-5, atol=1e-6)


@pytest.mark.full
@pytest.mark.slow
def test_a_budget_that_holds_all_changes_nothing(made: Path, tmp_path: Path) -> None:
    done = fit(made, tmp_path / "out", bytes="1MB")
    assert (done.expected, done.measured, done.correlation) == (0, 0, None)
    before, after = (
        {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
        for folder in (made / "moe", tmp_path / "out")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_too_few_bytes_are_refused_before_any_work(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    done = moekit("fit", made / "moe", "--bytes", "40KB", "--data", "no-such-text", "-o", tmp_path / "out")
    assert done.code == 2
    assert "allow at least" in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.full
@pytest.mark.slow
def test_the_fewest_bytes_that_are_told_do(made: Path, tmp_path: Path) -> None:
    with pytest.raises(BadConfig) as refused:
        fit(made, tmp_path / "out", bytes=40_000)
    least = int(str(refused.value.hint).partition("at least ")[2].partition(" bytes")[0].replace(",", ""))
    with pytest.raises(BadConfig, match="allow at least"):
        fit(made, tmp_path / "out", bytes=least - 1)
    assert fit(made, None, bytes=least, plan=tmp_path / "p.json", proof=False).bytes["after"] <= least


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"bits": (4,)}, "rounding saves no bytes for stock"),
        ({"bytes": "a lot"}, "is no number of bytes"),
        ({"bytes": 0}, "no number of bytes"),
        ({"drop": "naee"}, "runs the layers again"),
        ({"rounding": "gptq"}, "measures the very layer"),
        ({"settings": {"shrink": {}}}, "no methods of 'shrink'"),
        ({"settings": {"narrow": {"score": "kd"}}}, "by a teacher"),
        ({"settings": {"narrow": {"groups": 1}}}, "routed experts alone"),
        ({"experts": (1.5,)}, "fractions lie above 0"),
        ({"group": 7}, "groups of 7 do not divide"),
        ({"costs": "costs.txt"}, "costs are a .json file"),
        ({"heal_settings": {"steps": 2}}, "nothing heals"),
        ({"heal": "experts", "engine": "vllm"}, "does not stay rounded"),
        ({"heal": "router", "heal_settings": {"loss": "other"}}, "healing: loss"),
    ],
)
def test_what_cannot_be_is_refused(made: Path, tmp_path: Path, more: dict[str, Any], words: str) -> None:
    with pytest.raises(MoekitError, match=words):
        fit(made, tmp_path / "out", **more)


@pytest.mark.full
@pytest.mark.slow
def test_costs_are_measured_once_for_many_budgets(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how: dict[str, Any] = {"costs": tmp_path / "c.json", "experts": (1.0,), "ways": ("drop",), "proof": False}
    first = fit(made, None, plan=tmp_path / "a.json", engine="moekit", **how)
    rows = len(json.loads((tmp_path / "c.json").read_text())["rows"])
    monkeypatch.setattr(_Measuring, "_layer", None)
    again = fit(made, None, plan=tmp_path / "b.json", engine="moekit", **how)
    assert again.plan == first.plan
    assert len(json.loads((tmp_path / "c.json").read_text())["rows"]) == rows


@pytest.mark.full
@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_was(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(choosing, "compare_variants", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(made, tmp_path / "out")
    whole = fit(made, tmp_path / "whole")
    monkeypatch.setattr(_Measuring, "_layer", killed)
    monkeypatch.setattr(costs, "block_gradients", killed)
    done = fit(made, tmp_path / "out")
    assert (done.plan, done.measured) == (whole.plan, whole.measured)
    assert not list(tmp_path.glob(".out.scratch*"))


@pytest.mark.full
@pytest.mark.slow
def test_without_gradients_changes_of_the_stream_are_the_price(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request, "machine_bytes", lambda: 1000)
    done = fit(made, None, plan=tmp_path / "p.json", proof=False)
    assert done.price == "change"
    assert any("bytes of memory" in line for line in done.warnings)


@pytest.mark.full
@pytest.mark.slow
def test_a_recipe_fits_a_model(made: Path, tmp_path: Path) -> None:
    from moekit.recipe import runner
    from moekit.recipe.schema import load_recipe

    step = {"use": "fit", "id": "small", "model": str(made / "moe"), "data": str(made / "text"), **FEW}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"name": "fit", "out": str(tmp_path / "run"), "steps": [step | {"bytes": BUDGET}]}))
    runner.run(load_recipe(file))
    assert weight_bytes(tmp_path / "run" / "small") <= BUDGET


def test_a_dry_run_says_what_is_tried(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    done = moekit(
        "fit", made / "moe", "--bytes", BUDGET, "--data", made / "text", "-o", tmp_path / "out", "--dry-run", *WORDS
    )
    assert done.code == 0, done.err
    assert "recipes a layer" in done.out + done.err
    assert not (tmp_path / "out").exists()


def test_bytes_are_read_as_people_write_them() -> None:
    assert [parse_bytes(text) for text in ("12GiB", "1.5KB", "77", 78)] == [12 << 30, 1500, 77, 78]


def test_rank_correlation_by_hand() -> None:
    # Ranks 1 2 3 4 and 1 3 2 4: 1 - 6 * 2 / (4 * 15).
    assert rank_correlation([0.1, 0.2, 0.3, 0.4], [1, 30, 4, 500]) == pytest.approx(0.8)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2], [1, 2]) is None
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None


@pytest.mark.full
@pytest.mark.slow
def test_what_is_fitted_for_llama_cpp_is_packed_into_the_bytes_it_was_counted_with(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    sizes = {"hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2}
    write_model(tmp_path / "moe", "qwen3_moe", **sizes)
    write_text(tmp_path / "text", documents=20)
    whole = weight_bytes(tmp_path / "moe")
    out = tmp_path / "out"
    told = api.fit(
        tmp_path / "moe", bytes=whole // 3, engine="llama.cpp", data=tmp_path / "text", widths=(0.5,), out=out, **FEW
    )
    bits = {row["layer"]: row["bits"] for row in told.layers}
    assert any(bits.values())
    api.export(out, to="gguf", out=tmp_path / "packed")
    kinds = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0", None: "F32"}
    for tensor in gguf.GGUFReader(next((tmp_path / "packed").glob("*.gguf"))).tensors:
        if "_exps" in tensor.name:
            assert tensor.tensor_type.name == kinds[bits[int(tensor.name.split(".")[1])]], tensor.name


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"engine": "vllm", "bits": (8, 3)}, r"vllm do not hold .* in 3 bits \(held are: 8, 4\)"),
        ({"engine": "llama.cpp", "bits": (4,)}, r"llama\.cpp do not hold .* in 4 bits \(held are: none\)"),
        ({"engine": "vllm", "settings": {"bits": {"group": 4}}}, "the group is that of all that is planned"),
        ({"engine": "vllm", "settings": {"bits": {"symmetric": False}}}, "holds no zero points"),
    ],
)
def test_what_no_file_of_the_engine_holds_is_refused_before_work(made: Path, how: dict[str, Any], said: str) -> None:
    with pytest.raises(BadConfig, match=said):
        fit(made, made / "never", **how)
    assert not (made / "never").exists()


def test_groups_are_whole_blocks_of_llama_cpp(tmp_path: Path) -> None:
    write_model(tmp_path / "moe", "qwen3_moe", hidden_size=64, moe_intermediate_size=64)
    write_text(tmp_path / "text", documents=2)
    asked: dict[str, Any] = {"engine": "llama.cpp", "widths": (0.5,), "bytes": 10**6, "data": tmp_path / "text"}
    with pytest.raises(BadConfig, match="in blocks of 32, not in groups of 16"):
        api.fit(tmp_path / "moe", group=16, out=tmp_path / "out", **asked)
