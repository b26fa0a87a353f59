"""Does it pay to make experts narrow in two stages instead of one, at equal tokens of distillation?

    python benchmarks/slim_stages.py [--model FOLDER] [--steps 300] [--seeds 3] [--out runs/slim-stages]

Without --model the MoE of benchmarks/merge_ranking.py is trained first (some ten minutes on two cores). Its experts
then keep a quarter of their neurons: at once, with --steps of distillation from the model as it was; or half of them, a
third of the steps, then half of those, scored by the distance from the model as it was, and the rest of the steps.
Dropping experts to the same bytes, distilled alike, stands beside them. Prints losses on unseen text for every seed,
and whether the order of the paper holds (SlimMoE, arXiv:2506.18349: two stages below one; narrow below few).
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from compress_ranking import loss_of, measured
from merge_ranking import lab

import moekit

QUARTER, HALF = 0.25, 0.5


def parsed() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", default="six-domains")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16_384, help="decided on")
    parser.add_argument("--heldout-tokens", type=int, default=32_768)
    parser.add_argument("--out", type=Path, default=Path("runs/slim-stages"))
    return parser.parse_args()


class Stages:
    """Cuts and lessons of one model.

    Args:
        source: the model as it was.
        options: of the run.
    """

    def __init__(self, source: Path, options: argparse.Namespace) -> None:
        self.source = source
        self.options = options

    def narrowed(self, model: Path, share: float, name: str, **more: Any) -> Path:
        """Experts keep a share of their neurons."""
        out = self.options.out / name
        if not out.exists():
            settings = {"multiple": 4, **more.pop("settings", {})}
            text = {"data": self.options.data, "max_tokens": self.options.tokens, "seq_len": 256}
            moekit.slim(
                model, method="slimmoe", width=share, settings=settings, out=out, **self._quiet(), **text, **more
            )
        return out

    def dropped(self, share: float, name: str) -> Path:
        """A share of the experts stays."""
        out = self.options.out / name
        if not out.exists():
            text = {"data": self.options.data, "max_tokens": self.options.tokens, "seq_len": 256}
            moekit.prune(self.source, method="reap", keep=share, out=out, **self._quiet(), **text)
        return out

    def taught(self, model: Path, steps: int, seed: int, name: str) -> Path:
        """So many steps of distillation of the experts from the model as it was."""
        out = self.options.out / name
        if not out.exists():
            settings = {"steps": steps, "seq_len": 256, "batch": 8, "lr": 1e-3}
            how = {"data": self.options.data, "what": "experts", "settings": settings, "seed": seed}
            moekit.heal(model, teacher=self.source, out=out, **how, **self._quiet())
        return out

    def loss(self, model: Path) -> float:
        """Nats a token on unseen text."""
        return loss_of(measured(model, self.options, model.name))

    def one(self, seed: int) -> float:
        """One cut, all steps behind it."""
        cut = self.narrowed(self.source, QUARTER, "one")
        return self.loss(self.taught(cut, self.options.steps, seed, f"one-taught-{seed}"))

    def two(self, seed: int) -> float:
        """Half the neurons, a third of the steps; half of those, the other steps."""
        first = self.options.steps // 3
        half = self.taught(self.narrowed(self.source, HALF, "half"), first, seed, f"half-taught-{seed}")
        told = {"settings": {"score": "kd"}, "teacher": str(self.source)}
        cut = self.narrowed(half, HALF, f"two-{seed}", **told)
        return self.loss(self.taught(cut, self.options.steps - first, seed, f"two-taught-{seed}"))

    def few(self, seed: int) -> float:
        """A quarter of the experts, all steps behind it."""
        return self.loss(self.taught(self.dropped(QUARTER, "few"), self.options.steps, seed, f"few-taught-{seed}"))

    @staticmethod
    def _quiet() -> dict[str, Any]:
        return {"proof": False, "progress": False}


def main() -> None:
    """Train, cut, teach, measure, print."""
    options = parsed()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    start, stages = time.perf_counter(), Stages(lab(options), options)
    unchanged = loss_of(measured(stages.source, options, "unchanged"))
    bare = {
        name: stages.loss(options.out / name) - unchanged for name in ("one", "few") if stages.one(0) and stages.few(0)
    }
    print(f"unchanged {unchanged:.3f}; before any step: one cut {bare['one']:+.3f}, few experts {bare['few']:+.3f}")
    ways = {"one stage": stages.one, "two stages": stages.two, "few experts": stages.few}
    found = {name: [way(seed) - unchanged for seed in range(options.seeds)] for name, way in ways.items()}
    for name, rises in found.items():
        print(f"{name:<12} {fmean(rises):+.4f}  ({', '.join(f'{rise:+.4f}' for rise in rises)})")
    for name, than in (("two stages", "one stage"), ("one stage", "few experts")):
        gaps = [a - b for a, b in zip(found[name], found[than], strict=True)]
        holds = "holds" if max(gaps) < 0 else "does NOT hold" if min(gaps) > 0 else "holds in some seeds only"
        print(f"{holds}: {name} < {than}, {', '.join(f'{gap:+.4f}' for gap in gaps)}")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
