"""Variants of odd families, measured layer by layer, cost what the same models cost when pruned and run whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from moekit.anatomy import find_moe_layers
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.record import Record
from moekit.compress.engine.apply import apply
from moekit.compress.engine.outcome import LayerOutcome
from moekit.evaluation.changes import Variant
from moekit.evaluation.documents import perplexity_of_documents
from moekit.evaluation.variants import compare_variants
from moekit.trace import record
from tests.families import tokens
from tests.odd_families import build

KEEP = (0, 2, 3, 5, 7)


@dataclass(frozen=True)
class Document:
    ids: list[int]
    domain: str = "a"


DOCUMENTS = [Document(tokens(1, length, seed=seed)[0].tolist()) for seed, length in enumerate([12, 7, 15])]


def opened(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


@pytest.mark.parametrize(
    "family", ["afmoe", "hy_v3", "lfm2_moe", "minimax_m2", "aria_text", "inkling_text", "longcat_flash"]
)
def test_a_variant_costs_what_the_pruned_model_costs(family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path / "m")
    checkpoint, before = Checkpoint.open(tmp_path / "m"), opened(tmp_path / "m")
    outcomes = {layer.index: LayerOutcome(keep=KEEP) for layer in find_moe_layers(before)}
    unchanged, [result] = compare_variants(checkpoint, DOCUMENTS, [Variant("five", outcomes)], window=20)
    apply(checkpoint, outcomes, tmp_path / "out", record=Record(command="a test"))
    pruned = perplexity_of_documents(opened(tmp_path / "out"), DOCUMENTS, window=20)
    assert unchanged.nll == pytest.approx(perplexity_of_documents(before, DOCUMENTS, window=20).nll, abs=1e-4)
    assert result.perplexity.nll == pytest.approx(pruned.nll, abs=1e-4)
    assert result.perplexity.nll != pytest.approx(unchanged.nll, abs=1e-3), "the variant must change something"
    trace = record(before, [torch.tensor([document.ids[:-1]]) for document in DOCUMENTS], keep_choices=True)
    for layer in outcomes:
        chosen = trace.indices(layer).flatten().tolist()
        experts = len(KEEP) + 3  # beyond stands "no expert", which is not lost
        gone = [choice not in KEEP and choice < experts for choice in chosen]
        assert result.lost_choices[layer] == pytest.approx(sum(gone) / len(gone))
