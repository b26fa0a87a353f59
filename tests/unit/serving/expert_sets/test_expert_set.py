"""Expert sets of tasks: ranks against a plain sort, the folder against damage, retrieval against distances by hand."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

from moekit.anatomy import find_moe_layers
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.prune.premoe import PreMoe
from moekit.errors import BadConfig, BadData, MoekitError, NumericFault, UnsafeInput, UnsupportedModel
from moekit.serving.expert_sets.expert_set import ExpertSet, generalist, keep_sets, make_expert_set
from moekit.serving.expert_sets.retrieval import retrieve
from moekit.serving.expert_sets.scoring import expert_set_of
from moekit.serving.expert_sets.store import INDEX_FILE, ExpertSetStore
from moekit.trace import record
from moekit.trace.meta import DataEntry
from tests.checkpoints import edit_json, write_raw
from tests.expert_sets import query
from tests.families import EXPERTS, build, tokens
from tests.tiny import tokenizer

# Layers 1, 2 and 4; equal scores in the first and the last.
SCORES = {
    2: torch.tensor([0.1, 0.9, 0.5, 0.3]),
    1: torch.tensor([0.2, 0.7, 0.7, 0.0]),
    4: torch.tensor([1.0, 1.0, 1.0, 2.0]),
}


def expert_set(task: str = "maths", scores: dict[int, torch.Tensor] | None = None, **changes: Any) -> ExpertSet:
    facts = {"tokens": 10, "fingerprint": "model-a", "method": "premoe", "knobs": {"pool": None}}
    return make_expert_set(task, SCORES if scores is None else scores, **(facts | changes))


def top(scores_E: torch.Tensor, keep: int) -> list[int]:
    """By a plain sort: equal scores keep the lower number."""
    return sorted(sorted(range(len(scores_E)), key=lambda e: (-float(scores_E[e]), e))[:keep])


def test_the_permutation_carries_ranks_over() -> None:
    # Layer 1 ranks 1, 2, 0, 3; layer 2 ranks 1, 2, 3, 0; layer 4 ranks 3, 0, 1, 2.
    assert expert_set().permutations.tolist() == [[3, 1, 2, 0], [1, 3, 0, 2]]
    assert keep_sets(expert_set(), 2) == {1: [1, 2], 2: [1, 2], 4: [0, 3]}


@settings(max_examples=60, deadline=None)
@given(layers=st.integers(1, 4), experts=st.integers(1, 12), seed=st.integers(0, 2**31), ties=st.booleans())
def test_the_set_of_every_budget_is_the_top_of_every_layer(layers: int, experts: int, seed: int, ties: bool) -> None:
    table = torch.randn(layers, experts, generator=torch.Generator().manual_seed(seed))
    scores = dict(enumerate(table.round() if ties else table, start=3))
    made = expert_set(scores=scores)
    for keep in range(1, experts + 1):
        assert keep_sets(made, keep) == {layer: top(s, keep) for layer, s in scores.items()}


def test_budgets_outside_the_layer_and_protected_experts() -> None:
    for keep in (0, 5):
        with pytest.raises(BadConfig, match="of 4"):
            keep_sets(expert_set(), keep)
    sets = keep_sets(expert_set(), 2, protected={2: {0}})
    assert sets == {1: [1, 2], 2: [0, 1], 4: [0, 3]}
    for wrong in ({0, 1}, {4}):
        with pytest.raises(BadConfig, match="protected") as caught:
            keep_sets(expert_set(), 1, protected={4: wrong})
        assert caught.value.layer == 4


def test_scores_that_make_no_expert_set() -> None:
    with pytest.raises(UnsupportedModel) as uneven:
        expert_set(scores={0: torch.zeros(4), 3: torch.zeros(3)})
    assert uneven.value.layer == 3
    with pytest.raises(NumericFault) as broken:
        expert_set(scores={0: torch.tensor([0.0, float("nan")])})
    assert (broken.value.layer, broken.value.expert) == (0, 1)
    with pytest.raises(BadData):
        expert_set(scores={})


def test_tasks_pool_by_their_tokens() -> None:
    few = expert_set("maths", {0: torch.tensor([1.0, 0.0]), 1: torch.tensor([0.0, 1.0])}, tokens=1)
    many = expert_set("code", {0: torch.tensor([0.0, 2.0]), 1: torch.tensor([4.0, 1.0])}, tokens=3)
    pooled = generalist([few, many])
    assert pooled.scores(2).tolist() == [[0.25, 1.5], [3.0, 1.0]]
    assert (pooled.task, pooled.tokens, pooled.origin) == ("generalist", 4, few.origin)
    assert keep_sets(pooled, 1) == {0: [1], 1: [0]}
    with pytest.raises(BadData, match="further"):
        generalist([few, expert_set("law", {0: torch.zeros(2), 1: torch.zeros(2)}, keep_further=False)])
    with pytest.raises(BadData, match="fingerprint"):
        generalist([few, replace(many, origin=many.origin.model_copy(update={"fingerprint": "model-b"}))])
    with pytest.raises(BadData):
        generalist([])
    with pytest.raises(BadData, match="no tokens"):
        generalist([replace(few, tokens=0)])


STORED = {
    "maths": expert_set("maths", {0: torch.tensor([3.0, 0.0]), 1: torch.tensor([0.0, 1.0])}),
    "code": expert_set("code", {0: torch.tensor([0.0, 4.0]), 1: torch.tensor([6.0, 0.0])}),
}


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_stored_task_finds_itself(metric: Any, layers: int) -> None:
    for task, stored in STORED.items():
        found = retrieve(STORED, stored.scores(layers), metric=metric)
        assert found.task == task
        assert found.distance == pytest.approx(0, abs=1e-12)
        assert [name for name, _ in found.ranked] == [task, next(t for t in STORED if t != task)]


def test_distances_by_hand() -> None:
    asked = torch.tensor([3.0, 4.0])
    assert dict(retrieve(STORED, asked).ranked) == pytest.approx({"maths": 4.0, "code": 3.0})
    assert dict(retrieve(STORED, asked, metric="cosine").ranked) == pytest.approx({"maths": 0.4, "code": 0.2})
    both = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    far = {"maths": 4.0 / 2, "code": (3.0 + 37.0**0.5) / 2}
    assert dict(retrieve(STORED, both).ranked) == pytest.approx(far)
    assert retrieve(STORED, both).task == "maths"


def test_a_prompt_far_from_all_tasks_is_none_of_them() -> None:
    asked = torch.tensor([3.0, 4.0])
    assert retrieve(STORED, asked, limit=3.0).task == "code"
    lost = retrieve(STORED, asked, limit=2.9)
    assert (lost.task, lost.distance) == (None, 3.0)
    with_all = STORED | {"generalist": expert_set("generalist", {0: asked, 1: asked})}
    assert retrieve(with_all, asked).task == "generalist"
    assert retrieve(with_all, asked, limit=2.9, fallback="generalist").task == "generalist"
    kept = retrieve(with_all, asked, limit=3.0, fallback="generalist")
    assert kept.task == "code"
    assert [name for name, _ in kept.ranked] == ["code", "maths"]


def test_scores_that_cannot_be_compared() -> None:
    with pytest.raises(BadData, match="scored by 3 experts"):
        retrieve(STORED, torch.zeros(3))
    with pytest.raises(BadData, match="not of 3"):
        retrieve(STORED, torch.zeros(3, 2))
    with pytest.raises(NumericFault):
        retrieve(STORED, torch.tensor([float("nan"), 0.0]))
    with pytest.raises(BadData, match="no expert sets"):
        retrieve({}, torch.zeros(2))


def same(first: ExpertSet, second: ExpertSet) -> None:
    assert (first.task, first.origin, first.tokens, first.data) == (
        second.task,
        second.origin,
        second.tokens,
        second.data,
    )
    assert torch.equal(first.first_E, second.first_E)
    assert torch.equal(first.permutations, second.permutations)
    assert (first.further is None) == (second.further is None)
    assert first.further is None or second.further is None or torch.equal(first.further, second.further)


def test_saved_expert_sets_come_back(tmp_path: Path) -> None:
    store = ExpertSetStore(tmp_path / "expert_sets", "model-a")
    data = [DataEntry(source="here", domain="maths", documents=2, tokens=10)]
    made = [expert_set("maths", data=data), expert_set("../Lean 4", keep_further=False)]
    for each in made:
        assert store.save(each).parent == store.folder
    for each in made:
        same(store.load(each.task), each)
    assert list(store.load_all()) == ["../Lean 4", "maths"]
    single, one = ExpertSetStore(tmp_path / "single"), expert_set("one", {0: SCORES[1]})
    single.save(one)
    same(single.load("one"), one)
    assert sorted(p.suffix for p in store.folder.iterdir()) == [".json", ".safetensors", ".safetensors"]
    index = json.loads((store.folder / INDEX_FILE).read_text())
    assert index["origin"]["fingerprint"] == "model-a"
    assert index["origin"]["method"] == "premoe"
    assert index["tasks"]["maths"]["data"][0]["source"] == "here"


def test_a_task_is_replaced_only_if_asked(tmp_path: Path) -> None:
    store = ExpertSetStore(tmp_path)
    old = store.save(expert_set())
    changed = expert_set(scores=SCORES | {4: torch.arange(4.0)})
    with pytest.raises(BadConfig, match="already"):
        store.save(changed)
    same(store.load("maths"), expert_set())
    assert store.save(changed, overwrite=True) != old
    assert not old.exists()
    same(store.load("maths"), changed)
    assert store.save(changed, overwrite=True).exists()


def test_a_write_that_dies_leaves_the_old_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moekit.serving.expert_sets import store as module

    store = ExpertSetStore(tmp_path)
    store.save(expert_set())
    write = module.atomic_write

    def dies(path: Path, data: bytes | str) -> None:
        if path.name == INDEX_FILE:
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(module, "atomic_write", dies)
    with pytest.raises(KeyboardInterrupt):
        store.save(expert_set(scores=SCORES | {4: torch.arange(4.0)}), overwrite=True)
    same(store.load("maths"), expert_set())


def test_other_models_and_methods_are_refused(tmp_path: Path) -> None:
    ExpertSetStore(tmp_path).save(expert_set())
    with pytest.raises(BadData, match="of the model model-a"):
        ExpertSetStore(tmp_path, "model-b").load("maths")
    for change in ({"fingerprint": "model-b"}, {"method": "easy-ep"}, {"knobs": {"pool": 1}}):
        with pytest.raises(BadData, match=next(iter(change))):
            ExpertSetStore(tmp_path).save(expert_set("code", **change))
    with pytest.raises(BadData, match="layers"):
        ExpertSetStore(tmp_path).save(expert_set("code", {1: SCORES[1], 2: SCORES[2]}))
    assert list(ExpertSetStore(tmp_path).index().tasks) == ["maths"]


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="no expert sets here"):
        ExpertSetStore(tmp_path / "nowhere").load_all()
    ExpertSetStore(tmp_path).save(expert_set())
    with pytest.raises(BadData, match="'law'") as caught:
        ExpertSetStore(tmp_path).load("law")
    assert "maths" in str(caught.value.hint)


def rewrite(folder: Path, **tensors: torch.Tensor) -> None:
    """Change tensors of the one task, and the index with them, as a crafted folder would have it."""
    file = next(folder.glob("*.safetensors"))
    save_file(load_file(file) | tensors, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    edit_json(folder / INDEX_FILE, lambda index: index["tasks"]["maths"].update(sha256=digest))


def damage(folder: Path, how: str) -> None:
    file, index = next(folder.glob("*.safetensors")), folder / INDEX_FILE
    whole = file.read_bytes()
    match how:
        case "truncated":
            file.write_bytes(whole[:-3])
        case "empty":
            file.write_bytes(b"")
        case "missing":
            file.unlink()
        case "flipped":
            file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        case "huge header":
            write_raw(file, b"{}", length=2**60)
        case "twice":
            rewrite(folder, permutations=torch.tensor([[0, 0, 1, 2], [0, 1, 2, 3]], dtype=torch.int16))
        case "outside":
            rewrite(folder, permutations=torch.tensor([[0, 1, 2, 3], [0, 1, 2, 99]], dtype=torch.int16))
        case "other experts":
            rewrite(folder, first=torch.zeros(5, dtype=torch.float64))
        case "other type":
            rewrite(folder, first=torch.zeros(4))
        case "stranger":
            rewrite(folder, more=torch.zeros(1))
        case "not finite":
            rewrite(folder, first=torch.tensor([0, 0, 0, float("inf")], dtype=torch.float64))
        case "no JSON":
            index.write_text("{")
        case "list":
            index.write_text("[]")
        case "unknown field":
            edit_json(index, lambda value: value.update(evil=1))
        case "layers":
            edit_json(index, lambda value: value["origin"].update(layers=[1, 1, 2]))
        case "experts":
            edit_json(index, lambda value: value["origin"].update(experts=2**40))
        case "leads out":
            edit_json(index, lambda value: value["tasks"]["maths"].update(file="../secret.safetensors"))
        case "deep":
            index.write_text('{"a":' * 5000 + "1" + "}" * 5000)


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ("truncated", BadData, "truncated"),
        ("empty", BadData, "truncated"),
        ("missing", BadData, "missing"),
        ("flipped", BadData, "not the file"),
        ("huge header", UnsafeInput, "header"),
        ("twice", BadData, "layer 2: .*permutation"),
        ("outside", BadData, "layer 4: .*permutation"),
        ("other experts", BadData, "it holds"),
        ("other type", BadData, "it holds"),
        ("stranger", BadData, "it holds"),
        ("not finite", BadData, "finite"),
        ("no JSON", BadData, "damaged index"),
        ("list", BadData, "damaged index"),
        ("unknown field", BadData, "evil"),
        ("layers", BadData, "ascending"),
        ("experts", BadData, "experts"),
        ("leads out", UnsafeInput, "leads out"),
        ("deep", UnsafeInput, "nested"),
    ],
)
def test_damaged_and_hostile_folders(tmp_path: Path, how: str, error: type[MoekitError], says: str) -> None:
    ExpertSetStore(tmp_path).save(expert_set())
    damage(tmp_path, how)
    with pytest.raises(error, match=says) as caught:
        ExpertSetStore(tmp_path).load("maths")
    assert str(tmp_path) in str(caught.value.file)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_expert_sets_of_a_model_keep_what_the_method_keeps(family: str, tmp_path: Path) -> None:
    model, method = build(family), PreMoe()
    trace = record(model, [tokens(4, 24)], statistics=method.required, fingerprint="model-a", source="made")
    made = expert_set_of("text", model, trace, method)
    assert made.origin.layers == tuple(layer.index for layer in find_moe_layers(model))
    assert (made.tokens, made.data[0].source, made.origin.method) == (96, "made", "premoe")
    found = trace.require(method.required)
    for keep in range(1, EXPERTS + 1):
        sets = keep_sets(made, keep)
        for layer in find_moe_layers(model):
            scores_E = method.score(LayerInputs(layer.index, layer.geometry, found[layer.index]))
            assert sets[layer.index] == top(scores_E, keep)
    ExpertSetStore(tmp_path).save(made)
    same(ExpertSetStore(tmp_path, "model-a").load("text"), made)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_prompt_is_scored_as_its_task_is(layers: int) -> None:
    model, method = build("qwen3_moe", num_hidden_layers=3), PreMoe()
    texts = {"prose": "the old mill turns all day", "sums": "12 + 7 = 19; 81 / 9 = 9"}
    stored = {}
    for task, text in texts.items():
        ids = torch.tensor([tokenizer()(text)["input_ids"]])
        stored[task] = expert_set_of(task, model, record(model, [ids], statistics=method.required), method)
    for task, text in texts.items():
        scores = query(model, tokenizer()(text)["input_ids"], method=method, layers=layers)
        torch.testing.assert_close(scores, stored[task].scores(layers), rtol=1e-5, atol=1e-6)
        assert retrieve(stored, scores).task == task


def test_a_trace_of_another_model_makes_no_expert_set() -> None:
    trace = record(build("qwen3_moe", num_hidden_layers=3), [tokens()], statistics=PreMoe().required)
    with pytest.raises(BadData) as caught:
        expert_set_of("text", build("qwen3_moe"), trace, PreMoe())
    assert caught.value.layer == 2


def test_what_no_token_chose_ranks_behind_all_that_was_chosen(tmp_path: Path) -> None:
    # Expert 0 scores best in layer 1 and 3 ties with 1 in layer 2, but no token chose them.
    scores = {1: torch.tensor([9.0, -1.0, 2.0, 0.0]), 2: torch.tensor([1.0, 0.0, 5.0, 0.0])}
    made = make_expert_set("maths", scores, tokens=4, never_routed={1: [0], 2: [0, 3]})
    assert made.orders.tolist() == [[2, 3, 1, 0], [2, 1, 0, 3]]
    assert made.chosen == (3, 2)
    assert made.never_routed == {1: [0], 2: [0, 3]}
    assert made.first_E.tolist() == [9.0, -1.0, 2.0, 0.0]  # what prompts are compared with stays as it was
    assert [keep_sets(made, keep) for keep in (1, 2, 3, 4)] == [
        {1: [2], 2: [2]},
        {1: [2, 3], 2: [1, 2]},
        {1: [1, 2, 3], 2: [0, 1, 2]},
        {1: [0, 1, 2, 3], 2: [0, 1, 2, 3]},
    ]
    assert keep_sets(made, 2, protected={1: [0]})[1] == [0, 2]
    ExpertSetStore(tmp_path).save(made)
    same(ExpertSetStore(tmp_path).load("maths"), made)
    # Pooled, an expert that any of the tasks chose was chosen.
    other = make_expert_set("code", {1: torch.zeros(4), 2: torch.ones(4)}, tokens=4, never_routed={1: [1], 2: [0]})
    assert generalist([made, other]).never_routed == {1: [], 2: [0]}


@settings(max_examples=60, deadline=None)
@given(layers=st.integers(1, 4), experts=st.integers(2, 9), seed=st.integers(0, 2**31))
def test_for_every_budget_the_chosen_go_first(layers: int, experts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(layers, experts, generator=generator).round()
    unseen = torch.rand(layers, experts, generator=generator) < 0.4
    missed = {layer: row.nonzero().flatten().tolist() for layer, row in enumerate(unseen)}
    made = make_expert_set("maths", dict(enumerate(table)), tokens=1, never_routed=missed)
    for keep in range(1, experts + 1):
        for layer, kept in keep_sets(made, keep).items():
            lost = set(range(experts)) - set(kept)
            if len(missed[layer]) < experts:
                assert not set(kept) & set(missed[layer]) or lost <= set(missed[layer])


@pytest.mark.parametrize("knobs", [{}, {"token_score": "tcess", "pool": 1, "threshold": None}, {"threshold": 0.9}])
def test_unchosen_experts_of_a_model_come_last(knobs: dict[str, Any]) -> None:
    model, method = build("deepseek_v3"), PreMoe(**knobs)
    trace = record(model, [tokens(1, 3)], statistics=method.required)
    made = expert_set_of("text", model, trace, method)
    load = trace.require(("load",))
    tied = 0
    for layer, statistics in load.items():
        unseen = set(statistics.never_routed)
        assert unseen
        assert made.never_routed[layer] == sorted(unseen)
        scores = made.scores(2)[made.origin.layers.index(layer)]
        tied += sum(bool(scores[u] >= scores[c]) for u in unseen for c in set(range(EXPERTS)) - unseen)
        for keep in range(1, EXPERTS + 1):
            assert not set(keep_sets(made, keep)[layer]) & unseen or keep > EXPERTS - len(unseen)
    assert tied  # by scores alone some would have come first


@pytest.mark.parametrize("name", ["naee", "dern", "uncurl", "wanda-expert", "random", "stun"])
def test_methods_that_give_no_ranks(name: str) -> None:
    from moekit import catalogue
    from moekit.serving.expert_sets.scoring import check_method

    with pytest.raises(BadConfig, match=name) as caught:
        check_method(catalogue.get("prune", name).cls())
    assert "premoe" in str(caught.value.hint)


def test_ranks_that_contradict_the_scores(tmp_path: Path) -> None:
    ExpertSetStore(tmp_path).save(expert_set())
    rewrite(tmp_path, order=torch.tensor([3, 0, 2, 1], dtype=torch.int16))
    with pytest.raises(BadData, match="contradict"):
        ExpertSetStore(tmp_path).load("maths")
    rewrite(tmp_path, chosen=torch.tensor([4, 0, 4], dtype=torch.int16))
    with pytest.raises(BadData, match=r"were chosen|contradict"):
        ExpertSetStore(tmp_path).load("maths")


def test_several_tasks_are_added_together_or_not_at_all(tmp_path: Path) -> None:
    store = ExpertSetStore(tmp_path)
    store.save(expert_set("maths"))
    with pytest.raises(BadConfig, match="'maths'"):
        store.save_all([expert_set("code"), expert_set("maths")])
    assert list(store.index().tasks) == ["maths"]
    assert len(store.save_all([expert_set("code"), expert_set("maths")], overwrite=["maths"])) == 2
    assert list(store.load_all()) == ["code", "maths"]
