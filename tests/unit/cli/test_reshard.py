"""`moekit reshard` as a user calls it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moekit.cli.main import main
from moekit.parallel import load_sharded, save_sharded
from moekit.parallel.checkpoints.index import Index
from moekit.placement import Placement
from tests.families import build, logits
from tests.tiny import tokenizer


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with an optimizer's state."""
    folder = tmp_path_factory.mktemp("cli") / "sharded"
    model = build("olmoe")
    optimizer = torch.optim.AdamW(model.parameters())
    logits_sum = model(input_ids=torch.arange(3, 20)[None]).logits.sum()
    logits_sum.backward()
    optimizer.step()
    save_sharded(model, folder, optimizer=optimizer, tokenizer=tokenizer())
    return folder


def call(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(["reshard", *map(str, args)])
    told = capsys.readouterr()
    assert "Traceback" not in told.err
    assert isinstance(left.value.code, int)
    return left.value.code, told.out, told.err


def test_plain_writes_what_transformers_opens(
    capsys: pytest.CaptureFixture[str], sharded: Path, tmp_path: Path
) -> None:
    code, out, _ = call(capsys, sharded, "-o", tmp_path / "plain", "--plain")
    assert code == 0
    assert "transformers opens it" in out
    model = build("olmoe", seed=3)
    load_sharded(model, sharded)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "plain").decode([10, 11]) == tokenizer().decode([10, 11])


def test_ep_writes_a_file_for_each_rank(capsys: pytest.CaptureFixture[str], sharded: Path, tmp_path: Path) -> None:
    code, out, _ = call(capsys, sharded, "-o", tmp_path / "three", "--ep", 3, "--json")
    assert code == 0
    answer = json.loads(out)
    assert (answer["ranks_before"], answer["ranks"]) == (1, 3)
    assert len(answer["files"]) == 3
    index = Index.read(tmp_path / "three")
    assert index.tensors.keys() == Index.read(sharded).tensors.keys()
    owners = {"a": [0, 0, 0, 0, 0, 0, 0, 1]}
    groups = dict.fromkeys(range(2), owners["a"])
    Placement(devices=2, experts=8, layers=groups, solver="random").save(tmp_path / "placement.json")
    options = ("--ep", 2, "--placement", tmp_path / "placement.json")
    assert call(capsys, tmp_path / "three", "-o", tmp_path / "two", *options)[0] == 0
    placed = Index.read(tmp_path / "two")
    assert {placed.expert_of(k)[1] for k in placed.of_shard("rank-00001-of-00002.safetensors").values()} == {None, 7}


def test_dry_run_says_bytes_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], sharded: Path, tmp_path: Path
) -> None:
    code, out, _ = call(capsys, sharded, "-o", tmp_path / "plain", "--plain", "--dry-run", "--json")
    assert code == 0
    weights = sum(p.numel() * 4 for p in build("olmoe").parameters())
    assert json.loads(out)["disk_bytes"] == weights
    assert 0 < json.loads(out)["memory_bytes"] < 2 * weights
    code, out, _ = call(capsys, sharded, "-o", tmp_path / "two", "--ep", 2, "--dry-run", "--json")
    assert 2.9 * weights < json.loads(out)["disk_bytes"] < 3.1 * weights
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "either --ep N or --plain"),
        (["--ep", 2, "--plain"], "either --ep N or --plain"),
        (["--ep", 9], "8 experts cannot be dealt to 9 ranks"),
        (["--ep", 2, "--tokenizer", "x"], "--tokenizer with --plain"),
        (["--ep", 2, "--placement", "nowhere.json"], "no placement file"),
        (["--ep", 2, "--drop-unknown"], "--drop-unknown and --tokenizer with"),
    ],
)
def test_impossible_wishes_are_refused(
    capsys: pytest.CaptureFixture[str], sharded: Path, tmp_path: Path, options: list[Any], words: str
) -> None:
    code, _, err = call(capsys, sharded, "-o", tmp_path / "out", *options)
    assert code == 2
    assert words in " ".join(err.split())
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_stays_without_overwrite(
    capsys: pytest.CaptureFixture[str], sharded: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    code, _, err = call(capsys, sharded, "-o", tmp_path / "out", "--ep", 2)
    assert code == 2
    assert "exists" in err
    assert (tmp_path / "out" / "mine").read_text() == "keep"
    assert call(capsys, sharded, "-o", tmp_path / "out", "--ep", 2, "--overwrite")[0] == 0
    assert not (tmp_path / "out" / "mine").exists()


def test_damage_ends_with_exit_code_two(capsys: pytest.CaptureFixture[str], sharded: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sharded, tmp_path / "copy"))
    (copy / "rank-00000-of-00001.safetensors").unlink()
    code, _, err = call(capsys, copy, "-o", tmp_path / "out", "--plain")
    assert code == 2
    assert "rank-00000-of-00001.safetensors" in "".join(err.split())
    assert not (tmp_path / "out").exists()
    code, _, err = call(capsys, tmp_path, "-o", tmp_path / "out", "--plain")
    assert code == 2
    assert "no sharded checkpoint" in err
