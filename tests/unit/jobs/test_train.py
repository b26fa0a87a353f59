"""A trained model is stored as the one that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import moekit
from tests.families import build
from tests.tiny import tokenizer, write_text

SETTINGS = {"steps": 1, "seq_len": 32, "lr": 1e-1}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    (shard,) = folder.glob("model*.safetensors")
    return load_file(shard)


def test_weights_come_back_in_the_dtype_that_they_came_in(tmp_path: Path) -> None:
    build("olmoe").to(torch.bfloat16).save_pretrained(tmp_path / "moe")
    tokenizer().save_pretrained(tmp_path / "moe")
    write_text(tmp_path / "text", documents=1)
    for name, how in (("as-it-came", {}), ("wide", {"saved_as": "float32"})):
        asked: dict[str, Any] = {"data": tmp_path / "text", "settings": SETTINGS, "device": "cpu", **how}
        moekit.train(tmp_path / "moe", **asked, out=tmp_path / name)
    before, narrow, wide = (stored(tmp_path / name) for name in ("moe", "as-it-came", "wide"))
    assert {t.dtype for t in narrow.values()} == {torch.bfloat16}
    assert {t.dtype for t in wide.values()} == {torch.float32}
    assert narrow.keys() == wide.keys() == before.keys()
    # What learnt is rounded once, at the end.
    assert all(torch.equal(narrow[name], wide[name].bfloat16()) for name in wide)
    assert not torch.equal(narrow["lm_head.weight"], before["lm_head.weight"])
