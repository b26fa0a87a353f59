"""What the card of a smaller model says: method, experts, bytes, proof."""

from __future__ import annotations

from pathlib import Path

from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.record import Record
from moekit.compress.engine.apply import apply
from moekit.compress.engine.outcome import LayerOutcome
from tests.checkpoints import plain

PROOF = {
    "text": "news",
    "documents": 48,
    "tokens": 12_000,
    "perplexity": {
        "reap": {"all": {"before": 10.0, "after": 12.5, "ratio": [1.25, 1.2, 1.3]}},
        "random": {"all": {"before": 10.0, "after": 31.0, "ratio": None}},
    },
}


def card_of(folder: Path, source: Path, **record: object) -> str:
    kept = {layer: LayerOutcome(keep=(0, 1, 4, 5, 7)) for layer in (0, 1)}
    apply(Checkpoint.open(source), kept, folder, record=Record(command="prune", config={"method": "reap"}, **record))
    return (folder / "README.md").read_text()


def test_a_pruned_models_card_says_what_is_left_and_what_it_costs(tmp_path):
    source = plain(tmp_path / "source")
    card = card_of(tmp_path / "out", source, scores={"proof": PROOF})
    before = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    after = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert "Method: `reap`" in card
    assert "Experts: 10 of 16 are left, in 2 layers." in card
    (line,) = [line for line in card.splitlines() if line.startswith("- Weights")]
    told = [int(word.replace(",", "")) for word in line.split() if word.replace(",", "").isdigit()]
    # Each expert holds 3 matrices of 24 x 32 float32 numbers and a router row of 32; headers make up the rest.
    assert told[1] - told[0] == 2 * 3 * (3 * 24 * 32 + 32) * 4
    assert 0 <= after - told[0] < 40_000
    assert 0 <= before - told[1] < 40_000
    assert "48 documents of `news`, 12,000 tokens" in card
    assert "| reap | all | 10.00 | 12.50 | 1.250 (1.200 to 1.300) |" in card
    assert "| random | all | 10.00 | 31.00 |  |" in card


def test_a_card_without_a_proof_says_so(tmp_path):
    assert "Proof: none was made" in card_of(tmp_path / "out", plain(tmp_path / "source"))
