"""`use: expert_set`: what it stores against traces recorded apart, adding and replacing, pooling, resuming, recipes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.skeleton import empty_model
from moekit.compress.engine.plan import make_method
from moekit.data import pack
from moekit.errors import BadConfig, BadData
from moekit.jobs.context import JobContext
from moekit.jobs.options.expert_sets import ExpertSetsOptions
from moekit.jobs.shared.inputs import load_tokenizer, read_text
from moekit.recipe import runner
from moekit.recipe.schema import load_recipe
from moekit.serving.expert_sets.expert_set import GENERALIST, ExpertSet, generalist
from moekit.serving.expert_sets.scoring import expert_set_of
from moekit.serving.expert_sets.store import ExpertSetStore
from moekit.streaming.loader import LayerLoader
from moekit.trace.streamed import record_streamed
from tests.tiny import write_model, write_text


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_model(folder / "moe", "qwen3_moe")
    write_text(folder / "text", documents=4)
    return folder


def step(made: Path, **options: Any) -> ExpertSetsOptions:
    return ExpertSetsOptions(**{"model": made / "moe", "data": made / "text", **options})


def place(folder: Path, name: str = "out") -> JobContext:
    return JobContext(out=folder / name, scratch=folder / f"scratch-{name}", command="a test")


def apart(made: Path, domain: str | None, method: str = "premoe", **knobs: Any) -> ExpertSet:
    """The expert set of a domain, or of all text, from a trace of that alone."""
    checkpoint, chosen = Checkpoint.open(made / "moe"), make_method("prune", method, knobs)
    documents = [d for d in read_text(str(made / "text")) if domain in (None, d.domain)]
    rows = pack(documents, load_tokenizer(str(made / "moe")), 128)
    trace = record_streamed(checkpoint, rows.batches(8), statistics=(*chosen.required, "load"))
    return expert_set_of("apart", empty_model(checkpoint), trace, chosen)


def alike(first: ExpertSet, second: ExpertSet) -> None:
    assert first.origin == second.origin
    assert first.tokens == second.tokens
    torch.testing.assert_close(first.scores(2), second.scores(2), rtol=1e-6, atol=1e-9)
    assert torch.equal(first.orders, second.orders)


def test_each_domain_becomes_a_task_by_one_pass(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded: list[int] = []
    stock = LayerLoader.load

    def load(self: LayerLoader, index: int) -> Any:
        loaded.append(index)
        return stock(self, index)

    monkeypatch.setattr(LayerLoader, "load", load)
    with caplog.at_level(logging.WARNING):
        results = step(made).run(place(tmp_path))
    assert loaded == [0, 1]
    monkeypatch.undo()
    found = ExpertSetStore(tmp_path / "out", Checkpoint.open(made / "moe").fingerprint).load_all()
    assert list(found) == ["prose", "sums"]
    for task, expert_set in found.items():
        alike(expert_set, apart(made, task))
        assert [(e.source, e.domain, e.documents) for e in expert_set.data] == [(str(made / "text"), task, 4)]
    told = {entry["task"]: entry for entry in results["made"]}
    assert told["sums"]["tokens"] == found["sums"].tokens
    missed = {str(n): experts for n, experts in found["sums"].never_routed.items() if experts}
    assert told["sums"]["never_routed"] == missed
    assert (f"sums: {sum(map(len, missed.values()))} experts" in caplog.text) == bool(missed)
    assert json.dumps(results)


@pytest.mark.parametrize(("method", "settings"), [("premoe", {"threshold": 0.6}), ("easy-ep", {}), ("reap", {})])
def test_a_named_task_takes_all_of_the_text(made: Path, tmp_path: Path, method: str, settings: dict[str, Any]) -> None:
    step(made, task="both", method=method, settings=settings).run(place(tmp_path))
    alike(ExpertSetStore(tmp_path / "out").load("both"), apart(made, None, method, **settings))


def test_tasks_are_added_and_replaced(made: Path, tmp_path: Path) -> None:
    first = {"task": "prose", "data": made / "text" / "prose", "existing": "add"}
    step(made, **first).run(place(tmp_path))
    results = step(made, task="sums", data=made / "text" / "sums", existing="add").run(place(tmp_path))
    assert results["tasks"] == ["prose", "sums"]
    with pytest.raises(BadConfig, match="expert sets of 'prose' already"):
        step(made, **first).run(place(tmp_path))
    short = step(made, **(first | {"existing": "replace", "max_tokens": 40})).run(place(tmp_path))
    assert short["tasks"] == ["prose", "sums"]
    assert ExpertSetStore(tmp_path / "out").load("prose").tokens == 40
    again = step(made, **(first | {"existing": "anew"})).run(place(tmp_path))
    assert again["tasks"] == ["prose"]


def test_the_generalist_pools_all_tasks_of_the_folder(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    step(made, task="prose", data=made / "text" / "prose", existing="add").run(place(tmp_path))
    rest = {"task": "sums", "data": made / "text" / "sums", "existing": "add"}
    step(made, generalist=True, **rest).run(place(tmp_path))
    store = ExpertSetStore(tmp_path / "out")
    alike(store.load(GENERALIST), generalist([store.load("prose"), store.load("sums")]))
    # The generalist of other tasks is replaced unasked; that of the tasks before is named as such.
    more = {"task": "more", "data": made / "text" / "sums", "existing": "add"}
    with caplog.at_level(logging.WARNING):
        step(made, **more).run(place(tmp_path))
    assert "still that of the tasks before" in caplog.text
    step(made, generalist=True, **(more | {"task": "most"})).run(place(tmp_path))
    assert store.load(GENERALIST).tokens == sum(store.load(t).tokens for t in ("prose", "sums", "more", "most"))


def test_scores_that_are_no_means_over_tokens_pool_by_statistics(made: Path, tmp_path: Path) -> None:
    step(made, method="reap", generalist=True).run(place(tmp_path))
    pooled = ExpertSetStore(tmp_path / "out").load(GENERALIST)
    alike(pooled, apart(made, None, "reap"))
    assert [entry.domain for entry in pooled.data] == ["prose", "sums"]
    with pytest.raises(BadConfig, match=r"no means over tokens.*prose, sums"):
        step(made, method="reap", generalist=True, task="more", existing="add").run(place(tmp_path))


def test_a_killed_run_goes_on(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = LayerLoader.load

    def once(self: LayerLoader, index: int) -> Any:
        if index == 1:
            raise KeyboardInterrupt
        return stock(self, index)

    monkeypatch.setattr(LayerLoader, "load", once)
    with pytest.raises(KeyboardInterrupt):
        step(made, existing="add").run(place(tmp_path))
    assert not (tmp_path / "out").exists()
    loaded: list[int] = []

    def load(self: LayerLoader, index: int) -> Any:
        loaded.append(index)
        return stock(self, index)

    monkeypatch.setattr(LayerLoader, "load", load)
    # Whether tasks may be replaced says nothing of what is recorded.
    assert step(made, existing="add").identity() == step(made, existing="replace").identity()
    step(made, existing="replace").run(place(tmp_path))
    assert loaded == [1]
    alike(ExpertSetStore(tmp_path / "out").load("sums"), apart(made, "sums"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "naee"}, "naee decides by trying"),
        ({"method": "dern"}, "dern changes the weights"),
        ({"method": "wanda-expert"}, "reads the weights"),
        ({"method": "stun"}, "stun changes the weights"),
        ({"method": "random"}, "looks at no text"),
        ({"method": "premo"}, "no prune method is called 'premo'"),
        ({"settings": {"pol": 1}}, "pol"),
        ({"task": GENERALIST}, "name of all tasks together"),
        ({"generalist": True, "further": False}, "pooled"),
    ],
)
def test_what_is_refused_before_anything_is_read(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=words):
        ExpertSetsOptions(**{"model": tmp_path / "none", "data": tmp_path / "none", **options}).check()


def test_folders_of_other_models_and_methods(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step(made, existing="add").run(place(tmp_path))
    write_model(tmp_path / "other", "qwen3_moe", seed=1)

    def never(*_: Any) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr(LayerLoader, "load", never)
    with pytest.raises(BadData, match="of the model"):
        step(made, model=tmp_path / "other", task="more", existing="add").run(place(tmp_path))
    for options in ({"method": "reap"}, {"settings": {"pool": 1}}):
        with pytest.raises(BadConfig, match="made by premoe with"):
            step(made, task="more", existing="add", **options).run(place(tmp_path))


def test_text_that_is_too_little_or_misnamed(made: Path, tmp_path: Path) -> None:
    for domain, text in (("long", "the old mill turns"), ("short", "t")):
        (tmp_path / "text" / domain).mkdir(parents=True)
        (tmp_path / "text" / domain / "a.txt").write_text(text)
    with pytest.raises(BadData, match=r"task 'short': .*two tokens"):
        step(made, data=tmp_path / "text").run(place(tmp_path))
    (tmp_path / "text" / "short").rename(tmp_path / "text" / GENERALIST)
    with pytest.raises(BadData, match="name of all tasks together"):
        step(made, data=tmp_path / "text").run(place(tmp_path))


def test_in_a_recipe(made: Path, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        f"name: tasks\nout: {tmp_path / 'run'}\nsteps:\n"
        f"  - {{use: expert-sets, model: {made / 'moe'}, data: {made / 'text'}, generalist: true}}\n"
    )
    runner.run(load_recipe(file))
    assert list(ExpertSetStore(tmp_path / "run" / "expert-sets").load_all()) == [GENERALIST, "prose", "sums"]
    assert runner.run(load_recipe(file)).ran == []
