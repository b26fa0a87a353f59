"""Every command on a tiny model, as a user calls it, and what it says to bad input."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moekit.cli.main import COMMANDS, main
from tests.commands import Moekit
from tests.tiny import write_model, write_text


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and what profile and place make of them."""
    folder = tmp_path_factory.mktemp("made")
    write_model(folder / "moe")
    write_text(folder / "text")
    for command in (
        ["profile", folder / "moe", "-o", folder / "trace", "--data", folder / "text", "--seq-len", "64"],
        ["place", "swap", folder / "trace", "-o", folder / "placed", "--devices", "2,4"],
        ["route", "c2r", folder / "moe", "-o", folder / "plan", "--trace", folder / "trace", "--top-t", "3"],
    ):
        with pytest.raises(SystemExit) as left:
            main([*map(str, command), "--quiet"])
        assert left.value.code == 0, command
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example_and_the_common_options(moekit: Moekit, name: str) -> None:
    done = moekit(name, "--help")
    assert done.code == 0
    if "Commands" in done.out:  # a group: look at its first command
        first = {"bench": "ep", "data": "write", "convert": "residual", "route": "c2r", "place": "swap"}[name]
        done = moekit(name, first, "--help")
    assert "Example" in done.out
    assert f"moekit {name}" in done.out
    for option in ("--dry-run", "--json", "--seed", "--quiet", "--debug"):
        assert option in done.out


def test_profile_says_what_it_saw(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    done = moekit("profile", made / "moe", "-o", tmp_path / "t", "--data", made / "text", "--max-tokens", 200, "--json")
    assert done.code == 0
    assert done.json["tokens"] <= 240  # type: ignore[operator]
    assert done.json["domains"] == ["prose", "sums"]


def test_place_counts_rows(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    done = moekit("place", "exact", made / "trace", "-o", tmp_path / "p", "--devices", "2", "--json")
    (part,) = done.json["devices"]  # type: ignore[misc]
    rows = {row["name"]: row for row in part["rows"]}
    assert set(rows) == {"contiguous", "random", "exact"}
    assert 1 <= rows["exact"]["rows_per_token"] <= rows["contiguous"]["rows_per_token"] <= 2
    assert part["proven_layers"] == part["layers"] == 2


def test_a_routed_model_is_restored_checked_and_undone(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    import moekit as library
    from moekit.runtime import attached
    from tests.families import logits

    routed = tmp_path / "routed"
    options = ("--trace", made / "trace", "--top-t", 2, "--write", "model")
    assert moekit("route", "c2r", made / "moe", "-o", routed, *options).code == 0
    model = library.load(routed, dtype=torch.float32, device="cpu")
    assert attached(model)[0].part.top_t == 2  # type: ignore[attr-defined]
    assert moekit("check", routed, "--parent", made / "moe").code == 0
    done = moekit("undo", routed)
    assert done.code == 0
    back = library.load(routed, dtype=torch.float32, device="cpu")
    assert attached(back) == []
    assert torch.equal(logits(back), logits(library.load(made / "moe", dtype=torch.float32, device="cpu")))
    assert attached(library.load(tmp_path / "routed.undone", device="cpu"))


def test_train_evaluate_and_generate(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    moe, text = made / "moe", made / "text"
    knobs = ("--steps", 2, "--seq-len", 32, "--lr", "1e-3", "--balance", "0.01", "--plan", made / "plan")
    trained = moekit("train", moe, "-o", tmp_path / "tuned", "--data", text, *knobs, "--json")
    assert trained.code == 0, trained.err
    assert trained.json["steps"] == 2
    assert not list(tmp_path.glob(".*scratch*"))
    assert moekit("evaluate", moe, "-o", tmp_path / "before", "--data", text, "--name", "stock").code == 0
    compared = ("--data", text, "--baseline", tmp_path / "before")
    after = moekit("evaluate", tmp_path / "tuned", *compared, "-o", tmp_path / "after", "--json")
    comparison = after.json["comparison"]
    assert comparison["a"] == "stock"  # type: ignore[index]
    assert comparison["overall"]["difference"]["n"] == 12  # type: ignore[index]
    both = moekit("generate", moe, tmp_path / "tuned", "--prompt", "the", "--max-new-tokens", 3, "--json")
    assert both.json["pairs"][0]["prompt"] == "the"  # type: ignore[index]
    page = moekit("report", "-o", tmp_path / "report", "--evaluations", tmp_path / "after", "--traces", made / "trace")
    assert page.code == 0, page.err
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000


def test_the_same_seed_trains_the_same_model(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        options = ("--data", made / "text", "--steps", 2, "--seq-len", 32, "--seed", seed)
        assert moekit("train", made / "moe", "-o", tmp_path / name, *options).code == 0
    first, same, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == same
    assert first != other


def test_estimate_reads_headers_alone(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "moe", tmp_path / "m")
    done = moekit("estimate", folder, "--json")
    assert (done.json["experts"], done.json["top_k"], done.json["moe_layers"]) == (8, 2, 2)


def test_a_dry_run_writes_nothing(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    out, text = tmp_path / "out", made / "text"
    for command in (
        ("profile", made / "moe", "-o", out, "--data", text),
        ("place", "swap", made / "trace", "-o", out, "--devices", "2"),
        ("route", "c2r", made / "moe", "-o", out, "--trace", made / "trace", "--top-t", 3, "--write", "model"),
        ("convert", "residual", made / "moe", "-o", out, "--experts", 8),
        ("train", made / "moe", "-o", out, "--data", text, "--steps", 2),
        ("evaluate", made / "moe", "-o", out, "--data", text),
        ("data", "write", text, "-o", out),
        ("report", "-o", out, "--traces", made / "trace"),
    ):
        done = moekit(*command, "--dry-run", "--json")
        assert done.code == 0, (command, done.err)
        assert done.json["dry_run"] is True
        assert done.json["reads"][0]["bytes"] > 0, command  # type: ignore[index]
        assert {"writes", "disk_bytes", "memory_bytes"} <= set(done.json)
    assert not list(tmp_path.iterdir())


def damaged(made: Path, tmp_path: Path, how: str) -> Path:
    folder = shutil.copytree(made / "moe", tmp_path / how)
    weights = folder / "model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "lying-header":
        weights.write_bytes((2**63).to_bytes(8, "little") + weights.read_bytes()[8:])
    elif how == "pickle-only":
        weights.rename(folder / "pytorch_model.bin")
    elif how == "outside-name":
        index = {"metadata": {}, "weight_map": {"lm_head.weight": "../moe/model.safetensors"}}
        weights.unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "remote-code":
        config = json.loads((folder / "config.json").read_text())
        config |= {"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "model_type": "evil"}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("how", "code"),
    [("truncated", 2), ("lying-header", 3), ("pickle-only", 3), ("outside-name", 3), ("remote-code", 2)],
)
def test_damaged_models_are_refused_by_every_command_that_opens_them(
    moekit: Moekit, made: Path, tmp_path: Path, how: str, code: int
) -> None:
    folder, text = damaged(made, tmp_path, how), made / "text"
    for command in (("profile", folder, "-o", tmp_path / "out", "--data", text), ("generate", folder, "-p", "x")):
        done = moekit(*command)
        assert done.code == code, done.err
        assert done.err.startswith("error: ")
        assert "\n  -> " in done.err
    checked = moekit("check", folder)
    assert checked.code in (2, 3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        ("route c2r MOE -o OUT --trace TRACE --top-t 0", 2, "top_t"),
        ("route c2r MOE -o OUT --trace TRACE --top-t 8", 2, "nearest legal value is 7"),
        ("route c2r MOE -o OUT --trace TRACE", 2, "top_t"),
        ("route c2r MOE -o OUT --trace TRACE --top-t many", 2, "top-t"),
        ("route c3r MOE -o OUT", 2, "c2r"),
        ("route c2r MOE -o OUT --trace nowhere --top-t 3", 2, "no trace here"),
        ("route c2r OTHER -o OUT --trace TRACE --top-t 3", 2, "another|recorded on"),
        ("place swap TRACE -o OUT --devices 9", 2, "9"),
        ("place swap TRACE -o OUT --devices 3 --model MOE", 2, "equal"),
        ("place swap TRACE -o OUT --devices two", 2, "devices"),
        ("convert residual MOE -o OUT", 2, "cannot be turned into a MoE"),
        ("profile MOE -o OUT --data EMPTY", 2, "no text|white space"),
        ("profile MOE -o OUT --data nowhere.txt", 2, "no such file"),
        ("profile MOE -o TRACE --data TEXT", 2, "--overwrite"),
        ("profile DENSE -o OUT --data TEXT", 2, "MoE|expert"),
        ("train MOE -o OUT --data TEXT --steps 2 --tokens 5", 2, "contradict"),
        ("train MOE -o OUT --data TEXT --steps 2 --parts nothing", 2, "nothing"),
        ("evaluate MOE -o OUT", 2, "nothing to measure"),
        ("evaluate MOE -o OUT --data TEXT --baseline TRACE", 2, "no evaluation here"),
        ("evaluate MOE -o OUT --data TOKEN", 2, "token"),
        ("undo MOE", 2, "nothing to undo"),
        ("report -o OUT --traces nowhere", 2, "no trace here"),
        ("generate MOE -p ''", 2, "empty"),
        ("run nowhere.yaml", 2, "no such recipe"),
        ("run TAGGED", 3, "YAML tag"),
        ("methods nothing", 2, "there are"),
        ("data fetch sourdough", 2, "no source"),
    ],
)
def test_bad_input_is_one_message(
    moekit: Moekit, made: Path, tmp_path: Path, command: str, code: int, words: str
) -> None:
    places = {name: made / name.lower() for name in ("MOE", "TEXT", "TRACE")} | {"OUT": tmp_path / "out"}
    if "OTHER" in command:
        places["OTHER"] = write_model(tmp_path / "other", seed=1)
    if "DENSE" in command:
        sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
        LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes)).save_pretrained(tmp_path / "dense")
        shutil.copy(made / "moe" / "tokenizer.json", tmp_path / "dense")
        shutil.copy(made / "moe" / "tokenizer_config.json", tmp_path / "dense")
        places["DENSE"] = tmp_path / "dense"
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "token.txt").write_text("a")
    (tmp_path / "tagged.yaml").write_text("name: !!python/name:os.system\n")
    places |= {"EMPTY": tmp_path / "empty.txt", "TOKEN": tmp_path / "token.txt", "TAGGED": tmp_path / "tagged.yaml"}
    done = moekit(*(places.get(word, word.strip("'")) for word in command.split()))
    assert done.code == code, done.err
    assert re.search(words, done.err + done.out), done.err
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_full_disk_is_exit_code_4(
    moekit: Moekit, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    done = moekit("route", "c2r", made / "moe", "-o", tmp_path / "out", "--trace", made / "trace", "--top-t", 3)
    assert done.code == 4
    assert "disk is full" in done.err
    assert not list(tmp_path.iterdir())


def test_a_training_that_left_experts_silent_is_kept_and_said(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=128, **sizes)).save_pretrained(tmp_path / "dense")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(made / "moe" / name, tmp_path / "dense")
    moe = tmp_path / "moe"
    assert moekit("convert", "residual", tmp_path / "dense", "-o", moe, "--experts", 16, "--top-k", 1).code == 0
    options = ("--data", made / "text", "--steps", 2, "--seq-len", 8, "--batch", 1, "--warmup", 0)
    done = moekit("train", moe, "-o", tmp_path / "tuned", *options)
    assert done.code == 0, done.err
    assert "experts can only answer zero" in done.err
    # Afterwards, without knowing where they come from, `check` calls them what they are.
    checked = moekit("check", tmp_path / "tuned", "--json")
    assert {finding["code"] for finding in checked.json["findings"]} == {"dead-expert"}  # type: ignore[index, union-attr]


def test_a_dry_run_of_several_sources_tells_all_of_them(moekit: Moekit) -> None:
    done = moekit("data", "fetch", "smollm2", "demo", "--dry-run", "--json")
    assert done.code == 0, done.err
    assert [item["what"] for item in done.json["reads"]] == ["smollm2", "demo"]
    each = [item["bytes"] for item in done.json["reads"]]
    assert done.json["disk_bytes"] == sum(each)
