"""`moekit expert-sets` and `moekit generate --expert-sets` as a user calls them: from text to answers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.record import Record
from moekit.cli.main import main
from moekit.compress.engine.apply import apply
from moekit.compress.engine.outcome import LayerOutcome
from moekit.evaluation import complete
from moekit.jobs.tasks import answering as loading
from moekit.serving.expert_sets.expert_set import keep_sets
from moekit.serving.expert_sets.store import INDEX_FILE, ExpertSetStore
from moekit.streaming.loader import LayerLoader
from tests.checkpoints import edit_json
from tests.commands import Moekit
from tests.tiny import tokenizer, write_model, write_text


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, a text of two domains, and expert sets of both."""
    folder = tmp_path_factory.mktemp("made")
    write_model(folder / "moe", "qwen3_moe", num_hidden_layers=3)
    write_model(folder / "other", "qwen3_moe", seed=1, num_hidden_layers=3)
    write_text(folder / "text", documents=4)
    command = ["expert-sets", folder / "moe", "--data", folder / "text", "--generalist", "-o", folder / "expert_sets"]
    with pytest.raises(SystemExit) as left:
        main([*map(str, command), "--quiet"])
    assert left.value.code == 0
    return folder


# Begun in the middle of a sentence, as no document of the text is.
PROMPTS = {
    "runs down to the sea and the old mill turns all day. the river": "prose",
    "81 / 9 = 9; 5 - 2 = 3; 12 + 7 = 19; 3 * 4 = 12; 81 / 9": "sums",
    "mill turns all day. the river runs down to the sea and": "prose",
}


def asked(made: Path, *options: object) -> list[object]:
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    common = ("--expert-sets", made / "expert_sets", "--max-new-tokens", 5, "--device", "cpu")
    return ["generate", made / "moe", *common, *prompts, *options]


def test_expert_sets_are_made_and_added_to(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    out = tmp_path / "expert_sets"
    first = moekit("expert-sets", made / "moe", "--task", "maths", "--data", made / "text" / "sums", "-o", out)
    assert first.code == 0, first.err
    for words in ("premoe", "expert sets of 8 experts in 3 layers", r"maths 4 ", "tasks here: maths", "wrote"):
        assert first.says(words), words
    second = moekit(
        "expert-sets", made / "moe", "--task", "books", "--data", made / "text" / "prose", "-o", out, "--json"
    )
    assert second.code == 0, second.err
    assert second.json["tasks"] == ["books", "maths"]
    assert [entry["task"] for entry in second.json["made"]] == ["books"]
    again = ("expert-sets", made / "moe", "--task", "maths", "--data", made / "text" / "sums", "-o", out)
    refused = moekit(*again)
    assert refused.code == 2
    assert refused.says("expert sets of 'maths' already.*--overwrite")
    assert moekit(*again, "--overwrite", "--max-tokens", 50).code == 0
    assert ExpertSetStore(out).load("maths").tokens == 50  # four documents, of 12 and 13
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expert_sets"]


def test_knobs_and_methods(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    start = ("expert-sets", made / "moe", "--data", made / "text")
    done = moekit(*start, "--set", "pool=4", "--set", "threshold=0.3", "-o", tmp_path / "a", "--json")
    assert (done.json["settings"]["pool"], done.json["settings"]["threshold"]) == (4, 0.3)
    assert ExpertSetStore(tmp_path / "a").index().origin.knobs == done.json["settings"]
    assert moekit(*start, "--method", "weighted-ean", "-o", tmp_path / "b").code == 0
    for method, words in (("naee", "trying subsets"), ("uncurl", "changes the weights"), ("random", "no text")):
        refused = moekit(*start, "--method", method, "-o", tmp_path / "c")
        assert refused.code == 2
        assert refused.says(f"error: {method} .*{words}.*such as premoe")
    assert moekit(*start, "--set", "pol=4", "-o", tmp_path / "c").says("pol: Extra inputs.*its options: token_score")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("a")
    assert moekit(*start, "-o", tmp_path / "full").says("something else here")
    assert not (tmp_path / "c").exists()


def test_a_dry_run_of_expert_sets_writes_nothing(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    done = moekit("expert-sets", made / "moe", "--data", made / "text", "-o", tmp_path / "out", "--dry-run", "--json")
    assert done.code == 0, done.err
    assert done.json["reads"][0]["bytes"] > Checkpoint.open(made / "moe").nbytes
    assert list(tmp_path.iterdir()) == []


def test_prompts_find_their_task_and_are_answered_by_its_experts(
    moekit: Moekit, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers: list[int] = []
    tasks: list[str] = []
    load, load_task = LayerLoader.load, loading.load_task

    def seen(self: LayerLoader, index: int) -> Any:
        layers.append(index)
        return load(self, index)

    def seen_task(model: Any, expert_set: Any, *args: Any, **options: Any) -> Any:
        tasks.append(expert_set.task)
        return load_task(model, expert_set, *args, **options)

    monkeypatch.setattr(LayerLoader, "load", seen)
    monkeypatch.setattr(loading, "load_task", seen_task)
    done = moekit(*asked(made, "--keep", 0.5, "--json"))
    assert done.code == 0, done.err
    assert layers == [0]  # of three
    assert tasks == ["prose", "sums"]  # each once
    found = done.json["completions"]
    assert {entry["prompt"]: entry["task"] for entry in found} == PROMPTS
    for entry in found:
        near, far = entry["nearest"]
        assert near["task"] == entry["task"]
        assert near["distance"] < far["distance"]
    # What is said is what the folder that prune would write says.
    checkpoint, store = Checkpoint.open(made / "moe"), ExpertSetStore(made / "expert_sets")
    for task in ("prose", "sums"):
        keep = keep_sets(store.load(task), 4)
        assert done.json["loaded"][task]["experts"] == {str(layer): experts for layer, experts in keep.items()}
        outcomes = {layer: LayerOutcome(keep=tuple(experts)) for layer, experts in keep.items()}
        apply(checkpoint, outcomes, tmp_path / task, record=Record(command="a test"))
        assert done.json["loaded"][task]["bytes"] == Checkpoint.open(tmp_path / task).nbytes < checkpoint.nbytes
        model = AutoModelForCausalLM.from_pretrained(tmp_path / task).eval()
        prompts = [prompt for prompt, own in PROMPTS.items() if own == task]
        expected = complete(model, tokenizer(), prompts, max_new_tokens=5)
        mine = [entry["text"] for entry in found if entry["task"] == task]
        assert mine == [completion.text for completion in expected.completions]


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--metric", "cosine"), ("--retrieval-layers", 2), ("--retrieval-layers", 3)])
def test_ways_to_retrieve(moekit: Moekit, made: Path, options: tuple[Any, ...]) -> None:
    done = moekit(*asked(made, "--keep", 3, *options))
    assert done.code == 0, done.err
    metric = "cosine" if "cosine" in options else "l2"
    told = re.findall(rf"\[(\w+) \({metric} distance ([\d.e-]+); next (\w+), ([\d.e-]+)\)\]\n> (.*)", done.out)
    assert {prompt: task for task, _, _, _, prompt in told} == PROMPTS
    assert all(float(near) < float(far) for _, near, _, far, _ in told)
    assert done.says(r"prose: 3 of 8 experts a layer, [\d.]+ KiB of [\d.]+ KiB")


@pytest.mark.full
@pytest.mark.slow
def test_a_named_task_is_not_retrieved(moekit: Moekit, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerLoader, "load", lambda *_: pytest.fail("layers were read"))
    done = moekit(*asked(made, "--keep", 0.5, "--task", "sums", "--json"))
    assert done.code == 0, done.err
    assert {entry["task"] for entry in done.json["completions"]} == {"sums"}
    assert list(done.json["loaded"]) == ["sums"]
    protected = moekit(*asked(made, "--keep", 2, "--task", "sums", "--protect", "1:0,1:7", "--json"))
    assert protected.json["loaded"]["sums"]["experts"]["1"] == [0, 7]


@pytest.mark.full
@pytest.mark.slow
def test_far_prompts_get_the_generalist(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    done = moekit(*asked(made, "--keep", 0.5, "--max-distance", 0.0, "--json"))
    assert done.code == 0, done.err
    assert {entry["task"] for entry in done.json["completions"]} == {"generalist"}
    assert moekit(*asked(made, "--keep", 0.5, "--max-distance", 0.0)).says(r"\[generalist \(l2 distance .* from prose;")
    command = ("expert-sets", made / "moe", "--data", made / "text", "-o", tmp_path / "two")
    assert moekit(*command).code == 0
    lost = moekit(
        *("generate", made / "moe", "--expert-sets", tmp_path / "two", "--keep", 4, "--prompt", "a"),
        *("--max-distance", 0.0),
    )
    assert lost.code == 2
    assert lost.says("is of no task.*--generalist")


@pytest.mark.full
@pytest.mark.slow
def test_a_dry_run_knows_the_bytes(moekit: Moekit, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = moekit(*asked(made, "--keep", 4, "--json")).json
    monkeypatch.setattr(LayerLoader, "load", lambda *_: pytest.fail("layers were read"))
    done = moekit(*asked(made, "--keep", 4, "--dry-run", "--json"))
    assert done.code == 0, done.err
    assert done.json["reads"][0]["bytes"] == told["loaded"]["prose"]["bytes"]


FAULTS: dict[str, tuple[tuple[Any, ...], str]] = {
    "unknown task": (("--keep", 4, "--task", "law"), "no expert set of 'law' here.*there are: generalist, prose, sums"),
    "no budget": ((), "nothing says how many experts to load.*--keep"),
    "fewer than choices": (("--keep", 1), r"1 of 8 experts would stay.*chooses 2.*--top-k 1"),
    "more than there are": (("--keep", 9), "there are 8"),
    "no number": (("--keep", "half"), "the budget is impossible"),
    "too many layers": (("--keep", 4, "--retrieval-layers", 4), "4 layers, but the model has 3 MoE layers"),
    "no layers": (("--keep", 4, "--retrieval-layers", 0), "retrieval_layers: .*greater than or equal to 1"),
    "super": (("--keep", 4, "--protect", "super"), "super experts are found on text"),
    "protected": (("--keep", 4, "--protect", "1:8"), "a protected expert is not there"),
    "empty prompt": (("--keep", 4, "--prompt", ""), "a prompt is empty"),
    "ranks": (("--keep", 4, "--ep", 2), "by one process"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_loaded_is_said(moekit: Moekit, made: Path, name: str) -> None:
    options, words = FAULTS[name]
    done = moekit(*asked(made, *options))
    assert done.code == 2
    assert done.says(words), done.err


def test_folders_that_are_no_expert_sets_of_this_model(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    start = ("--keep", 4, "--prompt", "the old mill", "--max-new-tokens", 2)
    wrong = moekit("generate", made / "other", "--expert-sets", made / "expert_sets", *start)
    assert wrong.code == 2
    assert wrong.says("these expert sets are of the model .*make expert sets of this model")
    # The same shape may be asked for, as for a quantized copy.
    options = ("--expert-sets", made / "expert_sets", *start, "--other-weights")
    assert moekit("generate", made / "other", *options).code == 0
    assert moekit("generate", made / "moe", "--expert-sets", tmp_path, *start).says("no expert sets here")
    ExpertSetStore(tmp_path / "empty").save(ExpertSetStore(made / "expert_sets").load("sums"))
    edit_json(tmp_path / "empty" / INDEX_FILE, lambda index: index.update(tasks={}))
    assert moekit("generate", made / "moe", "--expert-sets", tmp_path / "empty", *start).says("holds no expert sets")
    assert moekit("generate", made / "moe", *start).says("--keep: about a task's experts.*--expert-sets")
    two = moekit("generate", made / "moe", made / "other", "--expert-sets", made / "expert_sets", *start)
    assert two.says("for one model, by one process")
