"""`moekit prune` and `moekit apply` as a user calls them, and what they say to bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moekit.cli.main import main
from moekit.trace.streamed import Streamed
from tests.checkpoints import edit_json, edit_shard
from tests.commands import Moekit
from tests.tiny import write_model, write_text


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, a text, and a plan with the model made by it."""
    folder = tmp_path_factory.mktemp("made")
    write_model(folder / "moe", "qwen3_moe")
    write_model(folder / "other", "qwen3_moe", seed=1)
    write_model(folder / "grouped", "deepseek_v3")
    write_text(folder / "my-domain", documents=20)
    command = ["prune", folder / "moe", "--method", "easy-ep", "--keep", "0.5", "--data", folder / "my-domain"]
    with pytest.raises(SystemExit) as left:
        main([*map(str, command), "--plan", str(folder / "p.json"), "-o", str(folder / "half"), "--quiet"])
    assert left.value.code == 0
    return folder


def prune(made: Path, *options: object, keep: object = 0.5, method: str = "reap", data: str = "my-domain") -> list[Any]:
    return ["prune", made / "moe", "--method", method, "--keep", keep, "--data", made / data, *options]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def assert_same_weights(first: Path, second: Path) -> None:
    one, two = tensors(first), tensors(second)
    assert sorted(one) == sorted(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_it_writes_a_model_and_says_what_it_costs(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    done = moekit(*prune(made, "-o", tmp_path / "out", method="easy-ep"))
    assert done.code == 0, done.err
    assert "experts 16 -> 8" in done.out
    for told in ("held-out text", "unchanged", "frequency", "random", "error: easy-ep", "proven: every tensor"):
        assert told in done.out
    assert moekit("check", tmp_path / "out").code == 0
    assert_same_weights(tmp_path / "out", made / "half")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.full
@pytest.mark.slow
def test_a_plan_is_applied_again_without_a_pass_over_the_text(
    moekit: Moekit, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct = moekit(*prune(made, "-o", tmp_path / "direct", method="easy-ep", keep=0.75))
    assert direct.code == 0, direct.err

    def never(*_: object) -> None:
        raise AssertionError("the text was walked again")

    monkeypatch.setattr(Streamed, "run", never)
    done = moekit("apply", made / "p.json", "--keep", "0.75", "-o", tmp_path / "again", "--json")
    assert done.code == 0, done.err
    assert_same_weights(tmp_path / "direct", tmp_path / "again")
    # The text that was kept apart when the plan was made is what the proof is on.
    assert done.json["proof"]["source"] == f"{made / 'my-domain'}[heldout]"
    assert moekit("apply", made / "p.json", "-o", tmp_path / "same", "--no-proof").code == 0
    assert_same_weights(tmp_path / "same", made / "half")


@pytest.mark.full
@pytest.mark.slow
def test_a_plan_alone_writes_no_model(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    done = moekit(*prune(made, "--plan", tmp_path / "p.json"))
    assert done.code == 0, done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.json", "p.safetensors"]
    assert "experts 16 -> 8" in done.out
    again = moekit(*prune(made, "--plan", tmp_path / "p.json"))
    assert again.code == 2
    assert "the file exists" in again.err
    assert moekit(*prune(made, "--plan", tmp_path / "p.json", "--overwrite")).code == 0
    assert "a plan is a .json file" in moekit(*prune(made, "--plan", tmp_path / "plan")).err


@pytest.mark.full
@pytest.mark.slow
def test_json_holds_all_of_it(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    done = moekit(*prune(made, "-o", tmp_path / "out", "--random-seeds", 3, "--json"))
    told = done.json
    assert told["experts"] == {"before": 16, "after": 8}
    assert told["bytes"]["before"] > told["bytes"]["after"] > 0
    assert [layer["layer"] for layer in told["layers"]] == [0, 1]
    proof = told["proof"]
    assert [cost["name"] for cost in proof["baselines"]] == ["frequency", "random 0", "random 1", "random 2"]
    assert {part["domain"] for part in proof["method"]["text"]["domains"]} == {"prose", "sums"}
    assert proof["method"]["text"]["overall"]["difference"]["low"] is not None
    assert len(proof["against"]) == 4
    assert proof["random"]["seeds"] == 3
    assert told["check"]["ok"] is True


@pytest.mark.full
@pytest.mark.slow
def test_knobs_are_set_and_the_methods_own_figures_are_told(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    options = ("--set", "alpha=0.0", "--set", "router=mean", "--no-proof", "-o", tmp_path / "out", "--json")
    told = moekit(*prune(made, *options, method="dern")).json
    assert told["settings"]["alpha"] == 0.0
    assert told["settings"]["router"] == "mean"
    assert all(layer["figures"]["moved_share"] > 0 for layer in told["layers"])


def test_a_dry_run_writes_nothing_and_knows_the_bytes(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    done = moekit(*prune(made, "-o", tmp_path / "out", "--dry-run", "--json", method="easy-ep"))
    assert done.code == 0, done.err
    assert list(tmp_path.iterdir()) == []
    written = {file.name: file.stat().st_size for file in (made / "half").iterdir()}
    # The record's and the card's bytes are not known before: at most so many.
    assert sum(written.values()) <= done.json["writes"][0]["bytes"] <= 1.25 * sum(written.values())


@pytest.mark.full
@pytest.mark.slow
def test_uneven_layers_are_announced_and_load_in_moekit(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    import moekit as library
    from tests.families import logits

    done = moekit(*prune(made, "-o", tmp_path / "out", "--scope", "global", "--least", 2, "--most", 7, keep=9))
    assert done.code == 2  # more than there are
    done = moekit(*prune(made, "-o", tmp_path / "out", "--scope", "global", "--most", 7, keep=0.7, method="ean"))
    assert done.code == 0, done.err
    assert "loads through moekit.load only" in done.err.splitlines()[0]
    model = library.load(tmp_path / "out", device="cpu")
    assert torch.isfinite(logits(model)).all()


FAULTS: dict[str, tuple[list[Any], str]] = {
    "keep below k": (["--keep", "1"], r"1 of 8 experts would stay, but every token chooses 2.*keep at least 2"),
    "keep nothing": (["--keep", "0"], r"a count is at least 1 \(given: 0\)"),
    "keep a zero share": (["--keep", "0.0"], r"a fraction lies above 0"),
    "keep more than there are": (["--keep", "9"], r"there are 8.*keep at most 8"),
    "keep nonsense": (["--keep", "half"], r"no count, no fraction and no size"),
    "too few bytes": (["--keep", "1KB"], r"1,000 bytes do not hold 2 experts a layer.*allow at least"),
    "unknown method": (["--method", "reep"], r"no prune method is called 'reep'.*'reap'"),
    "unknown knob": (["--method", "dern", "--set", "alfa=1"], r"alfa: Extra inputs.*its options: alpha"),
    "knob out of bounds": (["--method", "dern", "--set", "alpha=9"], r"alpha: .*less than or equal to 2 \(given: 9\)"),
    "no knob": (["--set", "alpha"], r"'alpha' is no override"),
    "uneven for stock": (["--scope", "global", "--stock-only"], r"do not load in stock transformers.*--scope uniform"),
    "search without counts": (["--method", "naee", "--scope", "global"], r"needs to know how many"),
    "bounds of equal layers": (["--least", "3"], r"--scope global"),
    "impossible bounds": (["--scope", "global", "--most", "3", "--keep", "6"], r"12 experts .* 2 to 3.*4 to 6 can"),
    "protected twice as many": (["--keep", "2", "--protect", "1:1,1:2,1:3"], r"layer 1: 3 experts are protected"),
    "protected expert is not there": (["--protect", "1:8"], r"layer 1, expert 8.*experts are 0 to 7"),
    "protected layer is not there": (["--protect", "5:1"], r"layer 5.*layers with experts: 0 to 1"),
    "protected nothing": (["--protect", "nothing"], r"names no protected experts.*super"),
    "text and trace": (["--trace", "x"], r"data and trace are both given"),
    "top-k above E": (["--top-k", "5", "--keep", "4"], r"every token chooses 5"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_impossible_wishes_are_refused_before_any_work(
    moekit: Moekit, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    options, words = FAULTS[name]
    monkeypatch.setattr(Streamed, "run", lambda *_: pytest.fail("work was done"))
    done = moekit(*prune(made, *options, "-o", tmp_path / "out"))
    assert done.code == 2
    assert_told(done.err, words)
    assert list(tmp_path.iterdir()) == []


def assert_told(text: str, words: str) -> None:
    import re

    assert re.search(words, " ".join(text.split())), text


@pytest.mark.full
@pytest.mark.slow
def test_routing_groups_stay_equal_or_are_refused(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    options = ("--method", "reap", "--data", made / "my-domain", "--groups", "equal", "-o", tmp_path / "out")
    uneven = moekit("prune", made / "grouped", "--keep", 6, *options)
    assert_told(uneven.err, "6 experts are not equally many in 4 routing groups.*keep 4 or 8")
    other = moekit("prune", made / "grouped", "--keep", 8, *options, "--scope", "global")
    assert_told(other.err, "cannot all keep equal routing groups")
    merging = moekit("prune", made / "grouped", "--keep", 8, *options, "--method", "uncurl")
    assert_told(merging.err, "uncurl decides in its own way")
    wide = write_model(tmp_path / "wide", "deepseek_v3", n_routed_experts=16)
    done = moekit("prune", wide, "--keep", 8, *options, "--no-proof", "--json")
    assert done.code == 0, done.err
    for layer in done.json["layers"]:
        assert [sum(e // 4 == group for e in layer["kept"]) for group in range(4)] == [2, 2, 2, 2]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["n_group"] == 4


def test_outputs_that_are_in_the_way(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    done = moekit(*prune(made, "-o", made / "half"))
    assert done.code == 2
    assert "the folder exists" in done.err
    assert "nothing says what to write" in moekit(*prune(made)).err
    assert "Missing option '--out' / '-o'" in moekit("apply", made / "p.json").err


def test_what_is_read_is_not_replaced(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    for name in ("moe", "my-domain"):
        shutil.copytree(made / name, tmp_path / "all" / name)
    here = tmp_path / "all"
    before = sorted(path for path in here.rglob("*"))
    for *options, told in (
        ["-o", here / "moe", "would replace"],
        ["-o", here, "would replace"],
        ["-o", here / "my-domain", "would replace"],
        ["-o", here / "my-domain" / "half", "lies in"],
        ["-o", tmp_path / "out", "--plan", here / "moe" / "p.json", "lies in"],
        ["--plan", here / "moe" / "config.json", "lies in"],
    ):
        done = moekit(*prune(here, *options, "--overwrite"))
        assert done.code == 2
        assert_told(done.err, f"this {told} .*, which is read")
    for model in (["--model", made / "moe"], []):
        done = moekit("apply", made / "p.json", *model, "-o", made / "moe", "--overwrite")
        assert done.code == 2
        assert_told(done.err, "this would replace")
    assert sorted(path for path in here.rglob("*")) == before


def test_the_same_command_twice_at_once(
    moekit: Moekit, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moekit.jobs import call

    monkeypatch.setattr("moekit.checkpoint.atomic.LOCK_WAIT_SECONDS", 0.0)
    command, real, seconds = prune(made, "-o", tmp_path / "out"), call._run, []

    def run(*given: Any) -> dict[str, Any]:
        seconds.append(moekit(*command))
        return real(*given)

    monkeypatch.setattr(call, "_run", run)
    assert moekit(*command).code == 0
    assert [done.code for done in seconds] == [2]
    assert_told(seconds[0].err, "process [0-9]+ is writing this folder")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_run_that_wrote_its_plan_goes_on(
    moekit: Moekit, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    command = prune(made, "-o", tmp_path / "out", "--plan", tmp_path / "p.json")
    with monkeypatch.context() as patched:
        patched.setattr("moekit.jobs.weights.fewer_job.finish", interrupted)
        assert moekit(*command).code == 130
    assert (tmp_path / "p.json").exists()
    assert not (tmp_path / "out").exists()
    done = moekit(*prune(made, "-o", tmp_path / "out2", "--plan", tmp_path / "p.json"))
    assert done.code == 2
    assert_told(done.err, "the file exists")
    assert moekit(*command).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "p.json", "p.safetensors"]


@pytest.mark.full
@pytest.mark.slow
def test_an_interrupted_run_does_not_go_on_with_other_inputs(
    moekit: Moekit, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    protect = tmp_path / "protect.json"
    command = prune(made, "-o", tmp_path / "out", "--protect", protect)
    free = moekit(*prune(made, "-o", tmp_path / "free", "--json")).json["layers"][0]["kept"]
    protect.write_text(json.dumps({"0": free[:1]}))
    with monkeypatch.context() as patched:
        patched.setattr("moekit.jobs.weights.fewer_job.finish", interrupted)
        assert moekit(*command).code == 130
    lost = [expert for expert in range(8) if expert not in free]
    protect.write_text(json.dumps({"0": lost}))
    assert set(moekit(*command, "--json").json["layers"][0]["kept"]) == set(lost)


def test_a_device_that_is_not_here(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    done = moekit(*prune(made, "-o", tmp_path / "out", "--device", "nonsense"))
    assert done.code == 2
    assert_told(done.err, "device 'nonsense' cannot be used")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_told_first(
    moekit: Moekit, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moekit.jobs.weights.sizes.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1000))
    for command in (prune(made), ["apply", made / "p.json"]):
        done = moekit(*command, "-o", tmp_path / "out")
        assert done.code == 4
        assert_told(done.err, r"the disk is too small: [\d,]+ bytes are needed.*1,000 bytes are free.*nothing was done")
    assert list(tmp_path.iterdir()) == []


def test_text_that_is_empty_or_too_little(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("  \n ")
    command = ["prune", made / "moe", "--method", "reap", "--keep", "4", "-o", tmp_path / "out"]
    assert_told(moekit(*command, "--data", tmp_path / "empty").err, "holds no text")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.txt").write_text("the old m")
    # One document of a few tokens reaches few experts.
    assert_told(
        moekit(*command, "--data", tmp_path / "one").err, "no document has two tokens in the tenth that is kept apart"
    )
    few = moekit(*command, "--data", tmp_path / "one", "--heldout", made / "my-domain", "--json", "--max-tokens", 3)
    assert few.code == 0, few.err
    assert "the calibration text is a single document" in few.err
    layers = few.json["layers"]
    never = [len(layer["never_routed"]) for layer in layers]
    assert all(n >= 8 - 3 * 2 for n in never)  # three tokens, two choices each
    assert f"{sum(never)} experts in 2 of 2 layers were never routed" in few.err
    for layer in layers:
        # Four are kept; those that were chosen go before those that never were.
        chosen = 8 - len(layer["never_routed"])
        assert len(set(layer["kept"]) - set(layer["never_routed"])) == min(4, chosen)


def test_models_that_cannot_be_pruned(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes)).save_pretrained(tmp_path / "dense")
    rest = ("--method", "reap", "--keep", "4", "--data", made / "my-domain", "-o", tmp_path / "out")
    done = moekit("prune", tmp_path / "dense", *rest)
    assert done.code == 2
    assert_told(done.err, "not a Mixture of Experts|no MoE|no Mixture")
    assert moekit("prune", tmp_path / "nothing", *rest).code == 2


def test_a_plan_of_another_model(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    for more in ([], ["--dry-run"]):
        done = moekit("apply", made / "p.json", "--model", made / "other", "-o", tmp_path / "out", *more)
        assert done.code == 2
        assert_told(done.err, "this plan was made for .*moe.*not for")
    done = moekit(
        "apply", made / "p.json", "--keep", "0.5", "--scope", "global", "--stock-only", "-o", "x", "--dry-run"
    )
    assert done.code == 2
    shape = moekit("apply", made / "p.json", "--model", made / "grouped", "--other-weights", "-o", tmp_path / "out")
    assert_told(shape.err, "a model of another shape")
    # The same shape may be asked for, as for a quantized copy.
    options = ("--other-weights", "-o", tmp_path / "out", "--quiet")
    assert moekit("apply", made / "p.json", "--model", made / "other", *options).code == 0
    assert "there is no plan of `moekit prune` here" in moekit("apply", tmp_path / "q.json", "-o", tmp_path / "x").err
    assert "give --keep as well" in moekit("apply", made / "p.json", "--scope", "global", "-o", tmp_path / "x").err


@pytest.mark.full
@pytest.mark.slow
def test_text_that_changed_since_the_plan_proves_nothing(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "my-domain", tmp_path / "text")
    command = ["prune", made / "moe", "--method", "reap", "--keep", 4, "--data", tmp_path / "text"]
    assert moekit(*command, "--plan", tmp_path / "p.json").code == 0
    file = next((tmp_path / "text").rglob("*.txt"))
    file.write_text(file.read_text() + " and more of it")
    done = moekit("apply", tmp_path / "p.json", "-o", tmp_path / "out")
    assert done.code == 2
    assert_told(done.err, "the text of this plan has changed.*--heldout")
    assert moekit("apply", tmp_path / "p.json", "-o", tmp_path / "out", "--no-proof").code == 0


def test_methods_that_need_text_or_none(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    bare = ["prune", made / "moe", "--keep", "4", "-o", tmp_path / "out"]
    assert_told(moekit(*bare, "--method", "reap").err, "reap decides from load.*--data")
    assert_told(moekit(*bare, "--method", "naee").err, "naee runs layers on text")
    assert_told(moekit(*bare, "--method", "random").err, "no text to prove the result on.*--no-proof")
    assert_told(moekit(*bare, "--method", "random", "--protect", "super").err, "super experts are found on text")
    assert moekit(*bare, "--method", "random", "--no-proof").code == 0


def quantize(folder: Path) -> Path:
    """Experts in fp8 with scales of blocks of 16 x 16."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in list(tensors.items()):
            if "experts." in name:
                rows, columns = -(-tensor.shape[0] // 16), -(-tensor.shape[1] // 16)
                tensors[name.removesuffix(".weight") + ".weight_scale_inv"] = torch.ones(rows, columns)
                tensors[name] = tensor.to(torch.float8_e4m3fn)

    edit_shard(folder / "model.safetensors", change)
    told = {"quant_method": "fp8", "weight_block_size": [16, 16], "modules_to_not_convert": ["lm_head"]}
    edit_json(folder / "config.json", lambda config: config.update(quantization_config=told))
    return folder


def test_a_quantized_copy_is_pruned_by_the_plan_of_the_original(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    copy = quantize(shutil.copytree(made / "moe", tmp_path / "fp8"))
    command = ["apply", made / "p.json", "--model", copy, "-o", tmp_path / "out"]
    assert_told(moekit(*command).err, "this plan was made for")
    done = moekit(*command, "--other-weights", "--no-proof", "--json")
    assert done.code == 0, done.err
    before, after = tensors(copy), tensors(tmp_path / "out")
    for layer in done.json["layers"]:
        for new, old in enumerate(layer["kept"]):
            name = f"model.layers.{layer['layer']}.mlp.experts.{{}}.down_proj.weight"
            assert torch.equal(after[name.format(new)].view(torch.uint8), before[name.format(old)].view(torch.uint8))
    free = ("--method", "random", "--keep", 4, "--no-proof", "-o", tmp_path / "free")
    assert moekit("prune", copy, *free).code == 0
