"""One family, from a tiny folder to one that is pruned, merged, rounded, narrowed, routed and trained."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moekit.api import load
from moekit.checkpoint import Checkpoint
from moekit.checkpoint.digest import tensor_digests
from moekit.checkpoint.folder import CONFIG_FILE
from moekit.checkpoint.model import quiet_transformers
from moekit.checkpoint.names import config_groups
from moekit.checkpoint.strictjson import read_json
from moekit.family import Family, holds_experts, texts, write
from moekit.jobs.check import check
from moekit.jobs.merge import merge
from moekit.jobs.profile import profile
from moekit.jobs.prune import prune
from moekit.jobs.quantize import quantize
from moekit.jobs.route import route
from moekit.jobs.slim import slim
from moekit.jobs.train import train
from moekit.jobs.trials.cell import UNTRIED, Cell, WrongResult, attempt
from moekit.jobs.trials.logits import ATOL, RTOL, logits_of, same
from moekit.jobs.trials.masking import without
from moekit.jobs.trials.pair import Pair
from moekit.jobs.weights.fewer_job import FewerResult

# In the order in which they are tried; `build` and `load` are what all others need.
STEPS = ("build", "load", "profile", "prune", "stock", "check", "merge", "quantize", "slim", "route", "train", "ranks")
_KEEP = 0.5


@dataclass
class Trial:
    """A family that is tried.

    Attributes:
        family: which.
        folder: where everything is written; gone afterwards.
        seed: of weights and of everything random.
        pair: ranks to deal the experts out to; None leaves that step out.
        cells: step -> what became of it.
        pruned: what pruning told, where it came to its end.
    """

    family: Family
    folder: Path
    seed: int = 0
    pair: Pair | None = None
    cells: dict[str, Cell] = field(default_factory=dict)
    pruned: FewerResult | None = None

    def run(self, wanted: Sequence[str] = STEPS) -> dict[str, Cell]:
        """Try these steps, each if what it needs has worked."""
        steps: dict[str, tuple[Callable[[], object], tuple[str, ...]]] = {
            "build": (self._build, ()),
            "load": (self._load, ("build",)),
            "profile": (self._profile, ("build",)),
            "prune": (self._prune, ("build",)),
            "stock": (self._stock, ("prune",)),
            "check": (self._check, ("prune",)),
            "merge": (self._merge, ("build",)),
            "quantize": (self._quantize, ("build",)),
            "slim": (self._slim, ("build",)),
            "route": (self._route, ("profile",)),
            "train": (self._train, ("build",)),
        }
        for name in (step for step in wanted if step in steps):
            function, needs = steps[name]
            self.cells[name] = attempt(function, unseen=str(self.folder))[0] if self._works(*needs) else UNTRIED
        if "ranks" in wanted:
            ranks = self.pair if self._works("load") else None
            self.cells["ranks"] = UNTRIED if ranks is None else ranks.share(self._source)
        return self.cells

    def _works(self, *steps: str) -> bool:
        return all(step in self.cells and self.cells[step].state == "yes" for step in steps)

    @property
    def _source(self) -> Path:
        return self.folder / "model"

    def _build(self) -> None:
        if not holds_experts(self.family):
            raise WrongResult("its config counts experts, and its model holds none")
        write(self.family, self._source, self.seed)
        for domain, documents in texts(documents=4, repeats=1).items():
            (self.folder / "text" / domain).mkdir(parents=True)
            for number, document in enumerate(documents):
                (self.folder / "text" / domain / f"{number}.txt").write_text(document, encoding="utf-8")

    def _load(self) -> None:
        same(logits_of(load(self._source, device="cpu")), logits_of(_stock(self._source)), "loaded", "stock")

    def _profile(self) -> None:
        told = profile(
            self._source, data=self.folder / "text", out=self.folder / "trace", device="cpu", progress=False
        ).to_dict()
        if not told:
            raise WrongResult("profile tells nothing")

    def _prune(self) -> None:
        self.pruned = prune(
            self._source,
            method="reap",
            keep=_KEEP,
            data=self.folder / "text",
            out=self.folder / "pruned",
            device="cpu",
            seed=self.seed,
            progress=False,
        )

    def _stock(self) -> None:
        folder = self.folder / "pruned"
        found = _stock(folder)
        same(logits_of(load(folder, device="cpu")), logits_of(found), "pruned", "stock")
        assert self.pruned is not None
        # Pruning may lift a limit to groups, which masking would leave.
        if self.pruned.groups == "free" and config_groups(_config(self._source)) != config_groups(_config(folder)):
            return
        source = _stock(self._source)
        with without(source, {row["layer"]: row["kept"] for row in self.pruned.layers}) as told:
            masked = logits_of(source, finite=False)
        if not told and not torch.allclose(masked, logits_of(found), rtol=RTOL, atol=ATOL):
            raise WrongResult("the pruned model is not the source with the dropped experts masked: logits differ")

    def _check(self) -> None:
        found = check(self.folder / "pruned", parent=self._source, progress=False)
        if not found.ok:
            worst = found.findings[0]
            raise WrongResult(f"check finds in the pruned model: {worst.message}")

    def _merge(self) -> None:
        merge(
            self._source,
            method="hc-smoe",
            keep=_KEEP,
            data=self.folder / "text",
            proof=False,
            out=self.folder / "merged",
            device="cpu",
            seed=self.seed,
            progress=False,
        )
        self._loads_as_stock("merged")

    def _quantize(self) -> None:
        settings, out = {"group": 0, "symmetric": True}, self.folder / "rounded"
        quantize(
            self._source, method="rtn", bits=4, settings=settings, proof=False, out=out, device="cpu", progress=False
        )
        self._loads_as_stock("rounded")

    def _slim(self) -> None:
        slim(
            self._source,
            method="magnitude",
            settings={"repair": "none"},
            width="1/2",
            proof=False,
            out=self.folder / "narrower",
            device="cpu",
            progress=False,
        )
        self._loads_as_stock("narrower")

    def _loads_as_stock(self, name: str) -> None:
        folder = self.folder / name
        same(logits_of(load(folder, device="cpu")), logits_of(_stock(folder)), name, "stock")

    def _route(self) -> None:
        route(
            self._source,
            method="c2r",
            settings={"top_t": 4},
            trace=self.folder / "trace",
            write="model",
            out=self.folder / "routed",
            seed=self.seed,
            progress=False,
        )
        logits_of(load(self.folder / "routed", device="cpu"))

    def _train(self) -> None:
        told = train(
            self._source,
            data=self.folder / "text",
            settings={"steps": 1, "seq_len": 16, "batch": 1, "lr": 1e-3, "precision": "fp32"},
            device="cpu",
            out=self.folder / "trained",
            seed=self.seed,
            progress=False,
        )
        if not math.isfinite(told.final_loss):
            raise WrongResult(f"the loss is {told.final_loss}")
        before, after = (Checkpoint.open(self.folder / name) for name in ("model", "trained"))
        if lost := sorted(before.tensors.keys() - after.tensors.keys()):
            raise WrongResult(f"training lost {len(lost)} of {len(before.tensors)} tensors, such as {lost[0]}")
        for name, info in before.tensors.items():
            kept = after.tensors[name]
            if (kept.dtype, kept.shape) != (info.dtype, info.shape):
                raise WrongResult(f"training made {kept.dtype} {kept.shape} of {name}, {info.dtype} {info.shape}")
        stored, trained = (tensor_digests(c.path, c.tensors.values()) for c in (before, after))
        if all(trained[name] == digest for name, digest in stored.items()):
            raise WrongResult("training changed no weight")


def try_family(family: Family, pair: Pair, seed: int = 0) -> dict[str, Cell]:
    """Try every step on a family, in a temporary folder.

    Args:
        family: which.
        pair: ranks to deal its experts out to.
        seed: of weights and of everything random.

    Returns:
        Step (see `STEPS`) -> what became of it.
    """
    folder = Path(tempfile.mkdtemp(prefix="moekit-family-"))
    try:
        return Trial(family, folder, seed, pair).run()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _config(folder: Path) -> dict[str, Any]:
    return read_json(folder / CONFIG_FILE)


def _stock(folder: Path) -> PreTrainedModel:
    """The model as its own class loads it, without moekit."""
    import transformers

    name = _config(folder)["architectures"][0]
    kind: Any = getattr(transformers, name)
    with quiet_transformers():
        model, told = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = sorted(map(str, [*told["missing_keys"], *told["unexpected_keys"], *told["mismatched_keys"]]))
    if wrong:
        raise WrongResult(f"{name} does not load the folder as it is: {len(wrong)} tensors, such as {wrong[0]}")
    found: PreTrainedModel = model.eval()
    return found
