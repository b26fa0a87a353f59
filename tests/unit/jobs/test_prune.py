"""`use: prune` and `use: apply`: what they measure against slow ways to measure it, resuming, recipes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moekit
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.record import Record
from moekit.compress.engine.plan import WeightPlan, make_method
from moekit.compress.engine.planning import plan_weights
from moekit.compress.engine.request import PlanRequest
from moekit.data import tokenize
from moekit.errors import BadConfig
from moekit.evaluation import perplexity_of_documents
from moekit.jobs.context import JobContext
from moekit.jobs.estimates import ByteSizes
from moekit.jobs.options.apply import ApplyOptions
from moekit.jobs.options.prune import PruneOptions
from moekit.jobs.shared.inputs import load_tokenizer, read_text, rows_of
from moekit.jobs.weights.sizes import budget_of
from moekit.recipe import runner
from moekit.recipe.schema import load_recipe
from moekit.recipe.variables import parse_overrides
from moekit.trace.streamed import Streamed, record_streamed
from tests.families import logits
from tests.odd_folders import with_mtp
from tests.tiny import tokenizer, write_model, write_text

RECIPES = Path(__file__).resolve().parents[3] / "recipes"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_model(folder / "moe", "qwen3_moe")
    write_text(folder / "text", documents=20)
    return folder


def step(made: Path, **options: Any) -> PruneOptions:
    asked = {"model": made / "moe", "method": "reap", "keep": 4, "data": made / "text"}
    return PruneOptions(**{**asked, **options})


def place(folder: Path, name: str = "out", seed: int = 0) -> JobContext:
    return JobContext(out=folder / name, scratch=folder / f"scratch-{name}", seed=seed, command="a test")


def kept(results: dict[str, Any]) -> dict[int, list[int]]:
    return {layer["layer"]: layer["kept"] for layer in results["layers"]}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def perplexities(cost: dict[str, Any]) -> dict[str, float]:
    text = cost["text"]
    return {part["domain"]: part["b"]["perplexity"] for part in (text["overall"], *text["domains"])}


@pytest.fixture(scope="module")
def pruned(made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A model that was pruned, and what was told of it."""
    folder = tmp_path_factory.mktemp("pruned")
    return folder / "out", step(made).run(place(folder))


def test_the_proof_is_what_the_written_model_gives(made: Path, pruned: tuple[Path, dict[str, Any]]) -> None:
    out, results = pruned
    tokenizer = load_tokenizer(str(made / "moe"))
    documents = tokenize(read_text(str(made / "text"), split="heldout"), tokenizer)
    for folder, which in ((out, "b"), (made / "moe", "a")):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        slow = perplexity_of_documents(model, documents, window=128)
        parts = results["proof"]["method"]["text"]
        assert parts["overall"][which]["perplexity"] == pytest.approx(slow.overall.perplexity, rel=1e-5)
        assert {p["domain"]: p[which]["perplexity"] for p in parts["domains"]} == pytest.approx(
            {d.domain: d.perplexity for d in slow.per_domain()}, rel=1e-5
        )
    assert results["proof"]["documents"] == len(documents) == 4


def test_lost_choices_and_errors_are_those_of_a_slow_count(made: Path, pruned: tuple[Path, dict[str, Any]]) -> None:
    out, results = pruned
    tokenizer = load_tokenizer(str(made / "moe"))
    documents = tokenize(read_text(str(made / "text"), split="heldout"), tokenizer)
    assert all(len(document.ids) < 300 for document in documents)
    dense, small = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (made / "moe", out))
    inputs: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    chosen: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for index, layer in enumerate(dense.model.layers):
        layer.mlp.register_forward_pre_hook(lambda _m, args, index=index: inputs[index].append(args[0].detach()))
        layer.mlp.gate.register_forward_hook(lambda _m, _a, given, index=index: chosen[index].append(given[2]))
    window = 128
    with torch.no_grad():
        for document in documents:
            # What a window reads: all but its last token; the last window moves back to be full.
            starts = range(0, max(1, len(document.ids) - window // 2), window // 2)
            for begin in sorted({max(0, min(b, len(document.ids) - window)) for b in starts}):
                dense(input_ids=torch.tensor([document.ids[begin : begin + window][:-1]]), use_cache=False)
        for index in (0, 1):
            choices_NK = torch.cat(chosen[index])
            gone_NK = ~torch.isin(choices_NK, torch.tensor(kept(results)[index]))
            told = results["proof"]["method"]
            assert told["lost_choices"][str(index)] == pytest.approx(float(gone_NK.float().mean()), rel=1e-6)
            assert told["lost_tokens"][str(index)] == pytest.approx(float(gone_NK.any(1).float().mean()), rel=1e-6)
            pairs = [(dense.model.layers[index].mlp(x), small.model.layers[index].mlp(x)) for x in list(inputs[index])]
            full, cut = (torch.cat([pair[i].flatten(0, 1) for pair in pairs]) for i in (0, 1))
            error = float((full - cut).norm() / full.norm())
            assert told["reconstruction"][str(index)] == pytest.approx(error, rel=1e-4)


def test_baselines_are_what_those_methods_give_themselves(
    made: Path, pruned: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, results = pruned
    others = {cost["name"]: cost for cost in results["proof"]["baselines"]}
    assert set(others) == {"frequency", "random"}
    for name in others:
        own = step(made, method=name).run(place(tmp_path, name))
        assert perplexities(own["proof"]["method"]) == pytest.approx(perplexities(others[name]), rel=1e-12)
        # A method is not compared with itself.
        assert name not in [cost["name"] for cost in own["proof"]["baselines"]]
    against = {text["a"]: text for text in results["proof"]["against"]}
    for name, cost in others.items():
        mine, other = perplexities(results["proof"]["method"])["all"], perplexities(cost)["all"]
        assert against[name]["overall"]["difference"]["ratio"] == pytest.approx(mine / other)


def test_the_record_tells_how_it_was_made(made: Path, pruned: tuple[Path, dict[str, Any]]) -> None:
    out, results = pruned
    record = Record.read(out)
    assert record is not None
    assert record.parent == str((made / "moe").resolve())
    assert record.parent_fingerprint == Checkpoint.open(made / "moe").fingerprint
    assert record.plan_hash == results["plan"]
    assert record.config["method"] == "reap"
    assert record.scores["kept"] == {str(layer): experts for layer, experts in kept(results).items()}
    short = record.scores["proof"]["perplexity"]
    assert short["reap"]["all"]["after"] == perplexities(results["proof"]["method"])["all"]
    assert record.expectations.experts == {0: 4, 1: 4}
    assert results["bytes"]["after"] == Checkpoint.open(out).nbytes


@pytest.mark.full
@pytest.mark.slow
def test_keeping_everything_changes_no_bit(made: Path, tmp_path: Path) -> None:
    results = step(made, keep=1.0).run(place(tmp_path))
    before, after = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (made / "moe", tmp_path / "out"))
    assert torch.equal(logits(before), logits(after))
    assert results["proof"]["method"]["text"]["overall"]["difference"]["mean"] == 0


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("method", ["dern", "uncurl", "stun"])
def test_methods_that_rewrite_are_proved_on_what_is_written(made: Path, tmp_path: Path, method: str) -> None:
    settings = {"dern": {"alpha": 0.0}, "uncurl": {}, "stun": {}}[method]
    results = step(made, method=method, settings=settings, random_seeds=2).run(place(tmp_path))
    documents = tokenize(read_text(str(made / "text"), split="heldout"), load_tokenizer(str(made / "moe")))
    slow = perplexity_of_documents(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval(), documents, window=128)
    assert perplexities(results["proof"]["method"])["all"] == pytest.approx(slow.overall.perplexity, rel=1e-5)
    assert all(layer["figures"] for layer in results["layers"])
    spread = results["proof"]["random"]
    found = [perplexities(cost)["all"] for cost in results["proof"]["baselines"][1:]]
    assert spread["mean"] == pytest.approx(sum(found) / 2)
    assert spread["deviation"] == pytest.approx(abs(found[0] - found[1]) / 2**0.5)


@pytest.mark.full
@pytest.mark.slow
def test_a_search_is_carried_out(made: Path, tmp_path: Path) -> None:
    results = step(made, method="naee", keep=6, settings={"strategy": "greedy"}, max_tokens=400).run(place(tmp_path))
    assert all(len(experts) == 6 for experts in kept(results).values())
    assert all(layer["figures"]["evaluations"] > 0 for layer in results["layers"])
    # Its plan is for its budget alone.
    step(made, method="naee", keep=6, settings={"strategy": "greedy"}, max_tokens=400, write="plan").run(
        place(tmp_path, "plan.json")
    )
    with pytest.raises(BadConfig, match="another budget needs another search"):
        ApplyOptions(plan=tmp_path / "plan.json", keep=4, proof=False).run(place(tmp_path, "again"))


@pytest.mark.full
@pytest.mark.slow
def test_a_trace_gives_what_its_text_gives(made: Path, tmp_path: Path) -> None:
    text = str(made / "text")
    tokenizer = load_tokenizer(str(made / "moe"))
    rows = rows_of(read_text(text), tokenizer, seq_len=128, max_tokens=65536)
    names = make_method("prune", "reap", {}).required
    trace = record_streamed(Checkpoint.open(made / "moe"), rows.batches(8), statistics=names, tokenizer=tokenizer)
    trace.save(tmp_path / "trace")
    by_trace = step(made, data=None, trace=tmp_path / "trace", heldout=text).run(place(tmp_path, "a"))
    by_text = step(made, heldout=text).run(place(tmp_path, "b"))
    assert kept(by_trace) == kept(by_text)
    assert perplexities(by_trace["proof"]["method"]) == perplexities(by_text["proof"]["method"])


def test_protected_experts_stay(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = kept(step(made, write="plan").run(place(tmp_path, "free.json")))
    worst = {layer: next(e for e in range(8) if e not in experts) for layer, experts in free.items()}
    pairs = ",".join(f"{layer}:{expert}" for layer, expert in worst.items())
    by_pairs = kept(step(made, write="plan", protect=pairs).run(place(tmp_path, "pairs.json")))
    assert all(worst[layer] in experts for layer, experts in by_pairs.items())
    file = tmp_path / "protect.json"
    file.write_text(json.dumps({str(layer): [expert] for layer, expert in worst.items()}))
    assert kept(step(made, write="plan", protect=str(file)).run(place(tmp_path, "file.json"))) == by_pairs
    for wrong in ("[1]", '{"0": "12"}', '{"0": [1.7]}', '{"0": [true]}', '{"0": 3}'):
        file.write_text(wrong)
        with pytest.raises(BadConfig, match="protected experts cannot be read"):
            step(made, write="plan", protect=str(file)).run(place(tmp_path, "bad.json"))
    file.write_text('{"0": [-1]}')
    with pytest.raises(BadConfig, match="a protected expert is not there: experts are 0 to 7"):
        step(made, write="plan", protect=str(file)).run(place(tmp_path, "bad.json"))

    import moekit.jobs.weights.protection as module

    real = module.find_super_experts

    def found(*args: Any, **kwargs: Any) -> Any:
        report = real(*args, **kwargs)
        mark = report.others[0].model_copy(update={"layer": 1, "expert": worst[1]})
        return report.model_copy(update={"found": (mark,)})

    monkeypatch.setattr(module, "find_super_experts", found)
    by_super = kept(step(made, write="plan", protect="super").run(place(tmp_path, "super.json")))
    assert by_super == {0: free[0], 1: by_pairs[1]}
    assert WeightPlan.load(tmp_path / "super.json").file.protected == {1: (worst[1],)}


def test_the_plan_is_that_of_the_library(made: Path, tmp_path: Path) -> None:
    step(made, write="plan", method="easy-ep", keep=0.75).run(place(tmp_path, "p.json", seed=3))
    plan = WeightPlan.load(tmp_path / "p.json")
    tokenizer = load_tokenizer(str(made / "moe"))
    rows = rows_of(read_text(str(made / "text"), split="train"), tokenizer, seq_len=128, max_tokens=65536)
    checkpoint, method = Checkpoint.open(made / "moe"), make_method("prune", "easy-ep", {})
    trace = record_streamed(checkpoint, rows.batches(8), statistics=method.required)
    slow = plan_weights(checkpoint, trace, PlanRequest(method, budget_of(0.75, "uniform", None, None), seed=3))
    assert plan.outcomes == slow.outcomes
    assert plan.hash == slow.hash


@pytest.mark.full
@pytest.mark.slow
def test_what_is_done_is_not_done_again(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import moekit.jobs.weights.fewer_finish as engine
    import moekit.jobs.weights.proof as proof
    from moekit.compress.prune.dern import DERN

    real = engine.apply
    options = {"method": "dern", "settings": {"alpha": 0.0}}
    whole = step(made, **options).run(place(tmp_path, "whole"))

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "apply", interrupted)
    with pytest.raises(KeyboardInterrupt):
        step(made, **options).run(place(tmp_path))
    assert not (tmp_path / "out").exists()

    def again(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("done twice")

    monkeypatch.setattr(engine, "apply", real)
    monkeypatch.setattr(Streamed, "_layer", again)
    monkeypatch.setattr(proof, "compare_variants", again)
    monkeypatch.setattr(DERN, "transform", again)
    monkeypatch.setattr(DERN, "score", again)
    results = step(made, **options).run(place(tmp_path))
    assert {**results, "model": ""} == {**whole, "model": ""}
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.full
@pytest.mark.slow
def test_a_plan_whose_text_is_gone_is_applied_without_proof(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = write_text(tmp_path / "text", documents=10)
    step(made, data=text, write="plan").run(place(tmp_path, "p.json"))
    text.rename(tmp_path / "moved")
    with caplog.at_level(logging.WARNING):
        results = ApplyOptions(plan=tmp_path / "p.json").run(place(tmp_path))
    assert results["proof"] is None
    assert "cannot be read again" in caplog.text
    again = ApplyOptions(plan=tmp_path / "p.json", heldout=tmp_path / "moved").run(place(tmp_path, "proved"))
    assert again["proof"]["source"] == str(tmp_path / "moved")


def test_forecasts_of_both_steps(made: Path, tmp_path: Path) -> None:
    step(made, write="plan").run(place(tmp_path, "p.json"))
    by_plan = ApplyOptions(plan=tmp_path / "p.json").estimate(tmp_path / "x", ByteSizes())
    by_method = step(made).estimate(tmp_path / "x", ByteSizes())
    assert by_plan.writes == by_method.writes
    assert by_method.disk is not None
    assert by_method.writes[0].nbytes is not None
    assert by_method.disk > by_method.writes[0].nbytes
    uneven = step(made, scope="global").estimate(tmp_path / "x", ByteSizes())
    assert any("moekit.load only" in note for note in uneven.notes)
    # A model that is not here yet: as large as its parent at most.
    later = step(made, model=tmp_path / "later").estimate(tmp_path / "x", ByteSizes({str(tmp_path / "later"): 77}))
    assert later.writes[0].nbytes == 77
    assert ApplyOptions(plan=tmp_path / "later.json").estimate(tmp_path / "x", ByteSizes()).writes[0].nbytes is None


RECIPE = """
name: prune
out: {out}
steps:
  - {{use: prune, id: plan, model: {model}, method: reap, keep: 0.5, data: {text}, write: plan}}
  - use: apply
    id: keep-${{k}}
    over: {{k: [2, 6]}}
    plan: ${{steps.plan}}
    keep: ${{k}}
  - {{use: prune, id: direct, model: {model}, method: reap, keep: 6, data: {text}, proof: false}}
"""


@pytest.mark.full
@pytest.mark.slow
def test_a_recipe_plans_once_and_applies_several_budgets(made: Path, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE.format(out=tmp_path / "run", model=made / "moe", text=made / "text"))
    recipe = load_recipe(file)
    done = runner.run(recipe).done
    assert done["keep-2"].results["experts"] == {"before": 16, "after": 4}
    assert done["keep-6"].results["proof"]["method"]["name"] == "reap"
    one, two = weights(tmp_path / "run" / "keep-6"), weights(tmp_path / "run" / "direct")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert runner.run(recipe).ran == []
    assert not list((tmp_path / "run" / ".scratch").iterdir())


@pytest.mark.full
@pytest.mark.slow
def test_the_ready_recipe_runs_to_its_page(made: Path, tmp_path: Path) -> None:
    text = write_text(tmp_path / "text", documents=24, repeats=12)
    pairs = [f"model={made / 'moe'}", f"data={text}", "keep=[0.5, 6]", "random_seeds=2"]
    recipe = load_recipe(RECIPES / "prune.yaml", parse_overrides(pairs), out=str(tmp_path / "run"))
    done = runner.run(recipe).done
    assert done["keep-0.5"].results["experts"]["after"] == 8
    assert done["keep-6"].results["experts"]["after"] == 12
    # The proof made before writing, and the evaluation of what was written, agree.
    for k in ("0.5", "6"):
        proof = done[f"keep-{k}"].results["proof"]["method"]["text"]["overall"]["difference"]["mean"]
        after = done[f"after-{k}"].results["comparison"]["overall"]["difference"]["mean"]
        assert proof == pytest.approx(after, abs=1e-4)
    assert "keep 0.5" in (tmp_path / "run" / "report.html").read_text()


def test_prompts_are_answered_by_the_model_and_both_are_decided_on(made: Path, tmp_path: Path) -> None:
    prompts = ["the old mill ", "12 + 7 = ", "a river ran ", "too long " * 60]
    lines = [json.dumps({"text": text, "domain": "prose"}) for text in prompts]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    asked = step(made, data=tmp_path / "prompts.jsonl", heldout=made / "text", self_generated=6, write="plan", keep=5)
    results = asked.run(place(tmp_path))
    plan = WeightPlan.load(tmp_path / "out" / "plan.json")

    model = AutoModelForCausalLM.from_pretrained(made / "moe").eval()
    tokenizer = load_tokenizer(str(made / "moe"))
    sequences = []
    for text in prompts[:3]:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        sequences.append(model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0])
    chosen = torch.zeros(8, dtype=torch.long)

    def count(_module: Any, _args: Any, given: Any) -> None:
        chosen.add_(torch.bincount(given[2].flatten(), minlength=8))

    model.model.layers[1].mlp.gate.register_forward_hook(count)
    with torch.no_grad():
        for sequence in sequences:  # each alone
            model(sequence[None, :])
    assert plan.statistics[1]["load"].long().sum() == 2 * sum(map(len, sequences))
    assert results["layers"][1]["kept"] == list(plan.outcomes[1].keep)
    torch.testing.assert_close(plan.statistics[1]["load"].long(), chosen)


def test_without_prompts_nothing_can_be_answered(made: Path, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="no prompts"):
        step(made, data=None, trace=made / "trace", self_generated=4, proof=False).check()
    with pytest.raises(BadConfig, match="leaves room"):
        step(made, self_generated=128, write="plan", proof=False).run(place(tmp_path))


@pytest.mark.full
@pytest.mark.slow
def test_a_head_that_looks_ahead_follows_the_decoder(tmp_path: Path) -> None:
    source, _ = with_mtp(tmp_path / "moe")
    tensors = weights(source)
    tensors["model.layers.2.hnorm.weight"] = torch.ones(32)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save_pretrained(source)
    write_text(tmp_path / "text", documents=10)
    asked = {"model": source, "data": str(tmp_path / "text"), "method": "frequency", "proof": False}
    done = moekit.prune(**asked, keep=4, mtp="prune", plan=str(tmp_path / "p.json"), out=tmp_path / "out")
    assert done.check is not None
    assert done.check["ok"]
    scores = torch.tensor(WeightPlan.load(tmp_path / "p.json").file.mtp["model.layers.2."])
    assert any("model.layers.2.*" in line and "was not measured" in line for line in done.warnings)
    for keep, folder in ((4, tmp_path / "out"), (2, tmp_path / "again")):
        if keep == 2:
            moekit.apply(tmp_path / "p.json", keep=2, proof=False, mtp="prune", out=folder)
        best = sorted(scores.argsort(descending=True)[:keep].tolist())
        made = weights(folder)
        assert torch.equal(made["model.layers.2.mlp.gate.weight"], tensors["model.layers.2.mlp.gate.weight"][best])
        for new, old in enumerate(best):
            name = "model.layers.2.mlp.experts.{}.up_proj.weight"
            assert torch.equal(made[name.format(new)], tensors[name.format(old)])
        assert not any(f"layers.2.mlp.experts.{keep}." in name for name in made)
    trace = record_streamed(Checkpoint.open(source), [torch.arange(4, 20)[None]], statistics=("load",))
    trace.save(tmp_path / "trace")
    with pytest.raises(BadConfig, match="no trace holds what its router chooses"):
        moekit.prune(**{**asked, "data": None}, trace=tmp_path / "trace", keep=4, mtp="prune", out=tmp_path / "x")
    with pytest.raises(BadConfig, match="layers may keep different numbers"):
        moekit.prune(**asked, keep=0.5, scope="global", mtp="prune", out=tmp_path / "x")
    assert not (tmp_path / "x").exists()
