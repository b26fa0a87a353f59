"""Two ranks that hold half of the experts each, kept for many models: processes of their own that talk over gloo."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist

from moekit.api import load
from moekit.jobs.trials.cell import Cell, WrongResult, attempt
from moekit.jobs.trials.logits import logits_of, same
from moekit.parallel import Ranks, expert_mesh, expert_parallel

RANKS = 2
# Seconds that a rank waits for the other one.
_PATIENCE = 60


class Pair:
    """The two ranks; a context manager. They start with the first model, and anew after one that broke off."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._ranks: list[_Rank] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End both."""
        for rank in self._ranks:
            rank.end()
        self._ranks = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def share(self, model: Path) -> Cell:
        """Deal a model's experts out, and hold its logits against those of the whole model.

        Args:
            model: its folder.

        Returns:
            What became of it; the worse of what the two ranks say.
        """
        if not self._ranks:
            self._folder = tempfile.TemporaryDirectory(prefix="moekit-ranks-")
            self._ranks = [_Rank(rank, Path(self._folder.name) / "store") for rank in range(RANKS)]
        for rank in self._ranks:
            rank.ask(model)
        told = [rank.answer() for rank in self._ranks]
        worst = min(told, key=lambda cell: ("failed", "refused", "yes").index(cell.state))
        if worst.state == "failed":
            self.close()
        return worst


class _Rank:
    """One process, to which folders are named line by line."""

    def __init__(self, rank: int, store: Path) -> None:
        reading, writing = os.pipe()
        self._answers = os.fdopen(reading, encoding="utf-8")
        # Not by its standard output, which transformers may write to.
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(rank), str(store), str(writing)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(writing,),
            text=True,
        )
        os.close(writing)

    def ask(self, model: Path) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{model}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its answer tells

    def answer(self) -> Cell:
        line = self._answers.readline()
        if line:
            return Cell.model_validate_json(line)
        return Cell(state="failed", message=f"a rank ended with {self._process.wait()}", when="after work")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._answers.close()


def _share(folder: Path, ranks: Ranks) -> None:
    whole = load(folder, device="cpu")
    model = copy.deepcopy(whole)
    expert_parallel(model, ranks)
    same(logits_of(model), logits_of(whole), "shared", "whole")
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    torch.autograd.backward(logits_of(model, learning=True).square().mean())
    broken = [n for n, p in model.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
    if broken:
        raise WrongResult(f"gradients are not finite, such as that of {broken[0]}")


def serve(rank: int, store: Path, answers: int) -> None:
    """Work on what is named on the standard input, until it ends.

    Args:
        rank: of this process.
        store: file by which the ranks meet.
        answers: open file to answer to.
    """
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=store.as_uri(), rank=rank, world_size=RANKS, timeout=timedelta(seconds=_PATIENCE)
    )
    ranks = Ranks.of(expert_mesh(RANKS))
    for line in sys.stdin:
        folder = Path(line.rstrip("\n"))
        cell, _ = attempt(partial(_share, folder, ranks), unseen=str(folder.parent))
        os.write(answers, json.dumps(cell.model_dump()).encode() + b"\n")


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
