"""Do pictures ask for other experts than text? A tiny vision MoE (Aria's class, random weights) decides on both.

Prints, for each layer, the experts that frequency pruning keeps after text alone and after text and pictures, on equal
shares of tokens. The photographs are those that scikit-learn carries. Takes about ten seconds.

    python benchmarks/pictures.py
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import moekit
from tests.pictures import write_conversations, write_vision_model
from tests.tiny import write_text


def main() -> None:
    """Prune twice, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="random models")
    seeds = parser.parse_args().seeds
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        text, chat = write_text(folder / "text"), write_conversations(folder / "chat" / "chat.jsonl", 20)
        for seed in range(seeds):
            model = write_vision_model(folder / f"aria-{seed}", seed)
            kept = []
            for name, data in (("text", f"{text}"), ("both", f"{text}+{chat.parent}")):
                told = moekit.prune(
                    model,
                    method="frequency",
                    keep=4,
                    data=data,
                    max_tokens=1200,
                    seq_len=128,
                    heldout=text,
                    plan=str(folder / f"{name}-{seed}.json"),
                    progress=False,
                )
                kept.append([set(layer["kept"]) for layer in told.layers])
            for layer, (alone, both) in enumerate(zip(*kept, strict=True)):
                print(f"model {seed}, layer {layer}: text {sorted(alone)}, with pictures {sorted(both)}, ", end="")
                print(f"{len(both - alone)} of {len(both)} are others")


if __name__ == "__main__":
    main()
