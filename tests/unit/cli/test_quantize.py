"""`moekit quantize` as a user calls it, from Python and in a recipe, and what it says to bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import moekit as api
from moekit.cli.main import main
from moekit.compress.maths.rounding import round_to_nearest
from moekit.compress.quantize.gptq import Gptq
from moekit.trace.streamed import Streamed
from tests.commands import Moekit
from tests.families import EXPERTS, HIDDEN, WIDTH
from tests.quantizing import fp8_packer, fp8_settings, requantized
from tests.tiny import write_model, write_text

WEIGHTS = 2 * EXPERTS * 3 * HIDDEN * WIDTH
# 3 bits, and for each group of 8 a scale of 16 bits and a zero point of 3.
PACKED = WEIGHTS * 3 // 8 + WEIGHTS // 8 * 19 // 8
GROUP = ("--set", "group=8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a text, and the model at three bits by plain rounding."""
    folder = tmp_path_factory.mktemp("made")
    write_model(folder / "moe", "qwen3_moe")
    write_text(folder / "text", documents=20)
    command = ["quantize", folder / "moe", "--method", "rtn", "--bits", 3, *GROUP, "--no-proof", "-o", folder / "rtn"]
    with pytest.raises(SystemExit) as left:
        main([*map(str, command), "--quiet"])
    assert left.value.code == 0
    return folder


def quantize(made: Path, *options: object, method: str = "gptq") -> list[Any]:
    return ["quantize", made / "moe", "--method", method, "--data", made / "text", *GROUP, *options]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def test_plain_rounding_is_what_lies_in_the_folder(made: Path) -> None:
    before, after = tensors_of(made / "moe"), tensors_of(made / "rtn")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        experts = ".experts." in name
        assert torch.equal(after[name], round_to_nearest(tensor, 3, 8) if experts else tensor), name
    told = json.loads((made / "rtn" / "moekit.json").read_text())["scores"]["grids"]
    parts = {"gate": 3, "up": 3, "down": 3}
    assert told == {"group": 8, "symmetric": False, "bits": {"0": parts, "1": parts}}


def test_it_writes_a_rounded_model_and_says_what_it_costs(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    done = moekit(*quantize(made, "--bits", 3, "-o", tmp_path / "out"))
    assert done.code == 0, done.err
    for words in (
        f"{WEIGHTS:,} weights of routed experts rounded",
        "bits: gate 3, up 3, down 3; 5.3750 with scales and zeros",
        "the folder is as large as before",
        "gptq against rtn with the same bits",
        "error: gptq",
        "error: rtn",
        "proven: every tensor",
    ):
        assert words in done.out, words
    assert moekit("check", tmp_path / "out").code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    record = json.loads((tmp_path / "out" / "moekit.json").read_text())
    assert record["config"]["bits"] == {"gate": 3, "up": 3, "down": 3}
    assert set(record["scores"]["proof"]["perplexity"]) == {"gptq", "rtn"}


@pytest.mark.full
@pytest.mark.slow
def test_bytes_are_told_honestly(made: Path) -> None:
    result = api.quantize(made / "moe", method="rtn", bits=3, settings={"group": 8}, proof=False, plan=made / "p.json")
    stored = sum(t.numel() * t.element_size() for t in tensors_of(made / "moe").values())
    assert result.weights["rounded"] == WEIGHTS
    assert result.weights["packed_bytes"] == PACKED
    assert result.weights["bits"] == 3 + 19 / 8
    assert result.bytes == {"folder": stored, "packed": stored - 4 * WEIGHTS + PACKED}
    rounded = sum(t.numel() * t.element_size() for t in tensors_of(made / "rtn").values())
    assert rounded == stored


@pytest.mark.full
@pytest.mark.slow
def test_a_stored_plan_rounds_alike_on_the_text_that_it_names(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    bits = ("--bits", "gate=2,up=2,down=4")
    shutil.copytree(made / "text", tmp_path / "text")
    options = ("--data", tmp_path / "text", "--max-tokens", 300, "--seq-len", 24)
    done = moekit(*quantize(made, *bits, *options, "--plan", tmp_path / "p.json", "-o", tmp_path / "out", "--json"))
    assert done.code == 0, done.err
    own = done.json["proof"]["method"]["reconstruction"]
    plain = done.json["proof"]["baselines"][0]["reconstruction"]
    assert all(own[layer] < plain[layer] for layer in plain), "nearer than plain rounding in every layer"
    again = ("quantize", "--from", tmp_path / "p.json", "--no-proof")
    done = moekit(*again, "-o", tmp_path / "again", "--json")
    assert done.code == 0, done.err
    assert "not those that the plan was stored with" not in done.err
    assert done.json["layers"][0]["bits"] == {"gate": 2, "up": 2, "down": 4}
    one, two = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "again")
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    stored = sum(file.stat().st_size for file in tmp_path.glob("p.*"))
    assert stored < 8 * EXPERTS * HIDDEN**2, "less than the moments of one layer"
    next((tmp_path / "text").rglob("*.txt")).write_text("something else")
    done = moekit(*again, "-o", tmp_path / "third")
    assert (done.code, "has changed since" in done.err) == (2, True)


@pytest.mark.full
@pytest.mark.slow
def test_a_plan_without_a_text_rounds_alike(
    moekit: Moekit, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("quantize", made / "moe", "--method", "rtn", "--bits", 3, *GROUP, "--plan", tmp_path / "p.json")
    assert moekit(*command).code == 0

    def never(*_: object) -> None:
        raise AssertionError("a text was walked")

    monkeypatch.setattr(Streamed, "run", never)
    done = moekit("quantize", "--from", tmp_path / "p.json", "-o", tmp_path / "again", "--no-proof", "--json")
    assert done.code == 0, done.err
    one, two = tensors_of(made / "rtn"), tensors_of(tmp_path / "again")
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.full
@pytest.mark.slow
def test_a_run_that_was_killed_rounds_no_layer_twice(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"method": "gptq", "bits": 3, "settings": {"group": 8}, "data": made / "text"}
    api.quantize(made / "moe", **how, out=tmp_path / "whole")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def never(*_: object) -> None:
        raise AssertionError("a layer was rounded again")

    with monkeypatch.context() as patched:
        patched.setattr("moekit.jobs.weights.inplace_finish.apply", killed)
        with pytest.raises(KeyboardInterrupt):
            api.quantize(made / "moe", **how, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Gptq, "transform", never)
    api.quantize(made / "moe", **how, out=tmp_path / "out")
    one, two = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "out")
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.full
@pytest.mark.slow
def test_a_plan_alone_and_a_dry_run_write_no_model(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    done = moekit(*quantize(made, "--bits", 2, "--plan", tmp_path / "p.json"))
    assert done.code == 0, done.err
    assert "are to be rounded" in done.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.json", "p.safetensors"]
    done = moekit(*quantize(made, "--bits", 2, "-o", tmp_path / "out", "--dry-run"))
    assert (done.code, done.says("as large as the source")) == (0, True)
    assert not (tmp_path / "out").exists()
    done = moekit("sparsify", "--from", tmp_path / "p.json", "-o", tmp_path / "out")
    assert (done.code, "moekit quantize --from PLAN" in done.err) == (2, True)


REFUSED: dict[str, tuple[list[Any], str]] = {
    "no bits": ([], "nothing says how many bits"),
    "too many bits": (["--bits", 9], "'9' bits"),
    "no bits at all": (["--bits", 0], "'0' bits"),
    "half a bit": (["--bits", 2.5], "valid integer"),
    "no such part": (["--bits", "router=2"], "is no part"),
    "groups that do not divide": (["--bits", 3, "--set", "group=16"], "do not divide the 24 inputs of the down"),
    "bits and a mean": (["--bits", 3, "--mean-bits", 2.5], "both given"),
    "choices of no mean": (["--bits", 3, "--choices", "2,3"], "choices given, but no mean to share"),
    "a mean beyond the choices": (["--mean-bits", 2.5, "--choices", "3,4"], "cannot be had of widths 3, 4"),
    "no such sharer": (["--mean-bits", 2.5, "--share", "pqm"], "pmq"),
    "no such knob of a sharer": (["--mean-bits", 2.5, "--share", "{use: pmq, delta: 1}"], "delta"),
    "half a bit for all": (["--mean-bits", 9], "less than or equal to 8"),
    "one width a layer by frequency": (["--mean-bits", 3, "--share", "frequency", "--unit", "layer"], "--unit expert"),
    "no such knob": (["--bits", 3, "--set", "alpha=1"], "its options"),
    "no such method": (["--bits", 3, "--method", "gtpq"], "gptq"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_before_any_work(
    case: str, moekit: Moekit, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("layers were run")

    monkeypatch.setattr(Streamed, "run", never)
    options, message = REFUSED[case]
    done = moekit(*quantize(made, *options, "-o", tmp_path / "out"))
    assert done.code == 2, done.out
    assert message in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_mean_is_shared_and_proved_beside_other_shares(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    mixed = ("--mean-bits", 3, "--share", "{use: pmq, rounding: nearest}", "--max-tokens", 400)
    done = moekit(*quantize(made, *mixed, "--plan", tmp_path / "p.json", "-o", tmp_path / "out"))
    assert done.code == 0, done.err
    for words in (
        "bits shared by pmq (scope=layer, spread=True, rounding=nearest, alpha=1.0, beta=1.0, gamma=2.0)",
        "bits: 3 in the mean, at most 3; 5.3750 with scales and zeros",
        "gptq against rtn with the same bits in the mean",
        "gptq against uniform with the same bits in the mean",
        "gptq against random with the same bits in the mean",
    ):
        assert words in " ".join(done.out.split()), words
    plan = json.loads((tmp_path / "p.json").read_text())
    widths = plan["budget"]["widths"]
    assert all(sum(own) == 3 * EXPERTS and {3, 4} <= set(own) for own in widths.values())
    assert plan["layers"]["0"]["outcome"]["bits"]["down"] == widths["0"]
    record = json.loads((tmp_path / "out" / "moekit.json").read_text())
    assert record["config"]["widths"] == widths
    assert set(record["scores"]["proof"]["perplexity"]) == {"gptq", "rtn", "uniform", "random"}


@pytest.mark.full
@pytest.mark.slow
def test_a_stored_share_is_carried_out_as_it_was_shared(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    mixed = ("--mean-bits", 1.5, "--choices", "1,2,3", "--share", "gemq", "--unit", "layer", "--max-tokens", 400)
    done = moekit(*quantize(made, *mixed, "--plan", tmp_path / "p.json", "-o", tmp_path / "out", "--json"))
    assert done.code == 0, done.err
    assert done.json["mean_bits"]["share"]["use"] == "gemq"
    assert done.json["mean_bits"]["given"] == 1.5
    assert sorted(next(iter(layer["widths"])) for layer in done.json["layers"]) == ["1", "2"]
    assert [cost["name"] for cost in done.json["proof"]["baselines"]] == ["rtn", "random"]
    done = moekit("quantize", "--from", tmp_path / "p.json", "--no-proof", "-o", tmp_path / "again")
    assert done.code == 0, done.err
    one, two = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "again")
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


@pytest.mark.full
@pytest.mark.slow
def test_rules_without_a_text_share_without_one(made: Path) -> None:
    how: dict[str, Any] = {"method": "rtn", "settings": {"group": 8}, "proof": False, "mean_bits": 2.5}
    for share in ("layers", "outlier", "random"):
        result = api.quantize(made / "moe", share=share, plan=made / f"{share}.json", **how)
        assert result.mean_bits is not None
        assert result.mean_bits["given"] == 2.5
    even = api.quantize(made / "moe", share="uniform", plan=made / "even.json", **{**how, "mean_bits": 3})
    assert [layer["widths"] for layer in even.layers] == [{3: EXPERTS}] * 2


def test_texts_that_are_missing(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    bare = ["quantize", made / "moe", "--bits", 3, *GROUP, "-o", tmp_path / "out", "--method"]
    assert "--data" in moekit(*bare, "gptq").err
    assert "--heldout" in moekit(*bare, "rtn").err
    mixed = ["quantize", made / "moe", "--mean-bits", 3, *GROUP, "-o", tmp_path / "out", "--method", "rtn"]
    assert "pmq decides from a text" in moekit(*mixed).err
    assert list(tmp_path.iterdir()) == []


def test_quantized_weights_are_refused_before_any_work(moekit: Moekit, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "moe", tmp_path / "quantized")
    requantized(tmp_path / "quantized", fp8_settings((16, 16)), fp8_packer((16, 16)))
    shutil.rmtree(tmp_path / "quantized-as-floats")
    command = ["quantize", tmp_path / "quantized", "--method", "rtn", "--bits", 3, *GROUP, "--no-proof"]
    done = moekit(*command, "-o", tmp_path / "out")
    assert (done.code, "quantized (fp8): they cannot be changed" in done.err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["quantized"]


def test_moments_that_the_machine_cannot_hold_are_refused_before_any_work(
    moekit: Moekit, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("layers were run")

    monkeypatch.setattr(Streamed, "run", never)
    monkeypatch.setattr("moekit._memory.machine_bytes", lambda: 1 << 20)
    done = moekit(*quantize(made, "--bits", 3, "-o", tmp_path / "out"))
    assert (done.code, "second moments" in done.err, "--method rtn" in done.err) == (4, True, True)
    assert list(tmp_path.iterdir()) == []
