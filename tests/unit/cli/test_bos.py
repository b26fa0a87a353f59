"""Commands begin documents as the tokenizer does, or as --bos says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from moekit.recipe.steps import STEPS
from moekit.training.config import TrainConfig
from tests.families import build
from tests.tiny import BOS, bos_tokenizer, write_text
from tests.unit.cli.conftest import Moekit


@pytest.mark.parametrize("bos", ["auto", "never"])
def test_a_perplexity_is_that_with_one_beginning_token(bos: str, tmp_path: Path, moekit: Moekit) -> None:
    """The command against a plain loop over documents."""
    model, begins = build("olmoe"), bos_tokenizer()
    model.save_pretrained(tmp_path / "model")
    begins.save_pretrained(tmp_path / "model")
    folder = write_text(tmp_path / "text", documents=2, repeats=1)
    loss = count = 0.0
    for path in sorted(folder.rglob("*.txt")):
        ids = torch.tensor(
            [[*([BOS] if bos == "auto" else []), *begins(path.read_text(), add_special_tokens=False)["input_ids"]]]
        )
        with torch.no_grad():
            logprobs = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0, :-1]
        loss -= float(logprobs.gather(1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    told = moekit("evaluate", tmp_path / "model", "-o", tmp_path / "out", "--data", folder, "--bos", bos, "--json")
    (whole,) = [d for d in told.json["domains"] if d["domain"] == "all"]
    assert whole["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-4)


@pytest.mark.parametrize("use", sorted(STEPS))
def test_every_step_that_reads_text_has_the_option(use: str) -> None:
    fields = STEPS[use].model_fields
    reads = {"data", "heldout"} & set(fields)
    own = "bos" in fields or ("bos" in TrainConfig.model_fields and use in ("train", "pretrain-tiny"))
    assert own or not reads or use == "report"
