"""One rank of the bench: `python -m moekit.bench.dispatch.workers FOLDER FD`, started by the harness inside its node.

It builds every entry, then does what lines on its standard input say, and answers each with a line of JSON on the file
descriptor FD. When its input ends, so does it.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import random
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from moekit.bench.dispatch.competitors.base import Material, Peer, peer_class
from moekit.bench.dispatch.counting import CollectiveBytes
from moekit.bench.dispatch.network import sent_bytes
from moekit.bench.dispatch.setting import Entry, Job
from moekit.bench.dispatch.workload import EXPERTS, JOB, REFERENCE, TENSORS, empty_experts, read_config
from moekit.parallel.layout import ExpertLayout
from moekit.parallel.ranks import Ranks, expert_mesh

TIMEOUT = timedelta(seconds=120)
# Relative to the token's own norm.
EXACT = 1e-5
BYTE_ROUNDS = 3


@dataclass(eq=False)
class Layer:
    """One layer of one entry, ready to run."""

    number: int
    peer: Peer
    layout: ExpertLayout
    x_NH: Tensor
    indices_NK: Tensor
    weights_NK: Tensor
    grad_NH: Tensor
    reference: dict[str, Tensor]

    def clear(self) -> None:
        """Forget gradients."""
        self.peer.clear()
        self.x_NH.grad = self.weights_NK.grad = None


@dataclass(eq=False)
class Runner:
    """All layers of one entry."""

    entry: Entry
    layers: list[Layer]
    seconds: dict[str, float] = field(default_factory=dict)

    def step(self, backward: bool = True) -> tuple[float, float, list[Tensor]]:
        """Forward through all layers, then backward; seconds of forward, of both, and the outputs."""
        for layer in self.layers:
            layer.clear()
        started = time.perf_counter()
        outputs = [layer.peer(layer.x_NH, layer.indices_NK, layer.weights_NK) for layer in self.layers]
        middle = time.perf_counter()
        if backward:
            for layer, y_NH in zip(reversed(self.layers), reversed(outputs), strict=True):
                torch.autograd.backward(y_NH, layer.grad_NH)
        ended = time.perf_counter()
        return middle - started, ended - started, [y.detach() for y in outputs]


class Rank:
    """What one rank holds."""

    def __init__(self, folder: Path) -> None:
        self.job = Job.model_validate_json((folder / JOB).read_text())
        setting = self.job.setting
        self.ranks = Ranks.of(expert_mesh(setting.ranks, setting.nodes, "cpu"))
        self.node = self.ranks.rank // setting.per_node
        self.device = os.environ.get("MOEKIT_BENCH_DEVICE", "")
        tensors = load_file(folder / TENSORS)
        references = load_file(folder / REFERENCE)
        weights: dict[int, dict[str, Tensor]] = {}
        for key, values in load_file(folder / EXPERTS).items():
            layer, _, name = key.partition(".")
            weights.setdefault(int(layer), {})[name] = values
        modules = empty_experts(read_config(folder))
        self.runners = [
            Runner(entry, [self._layer(entry, n, modules[n], weights[n], tensors, references) for n in self.job.layers])
            for entry in self.job.entries
        ]

    def _layer(
        self,
        entry: Entry,
        number: int,
        module: Any,
        weights: dict[str, Tensor],
        tensors: dict[str, Tensor],
        references: dict[str, Tensor],
    ) -> Layer:
        setting = self.job.setting
        if entry.placement:
            layout = ExpertLayout.make(self.job.layouts[entry.placement][number], setting.ranks)
        else:
            layout = ExpertLayout.contiguous(setting.experts, setting.ranks)
        kind = peer_class(entry.peer)
        peer = kind(Material(setting, entry, self.ranks, layout, module, weights))
        start = self.ranks.rank * setting.tokens
        mine = slice(None) if kind.shares_batch(entry.variant) else slice(start, start + setting.tokens)
        prefix = f"{entry.routing}.{number}."
        known = {key[len(prefix) :]: values for key, values in references.items() if key.startswith(prefix)}
        return Layer(
            number=number,
            peer=peer,
            layout=layout,
            x_NH=tensors[f"x.{number}"][mine].clone().requires_grad_(),
            indices_NK=tensors[f"indices.{entry.routing}.{number}"][mine].clone(),
            weights_NK=tensors[f"weights.{entry.routing}.{number}"][mine].clone().requires_grad_(),
            grad_NH=tensors[f"grad.{number}"][mine].clone(),
            reference={
                name: values[mine] if name in {"y", "x", "weights"} else values for name, values in known.items()
            },
        )

    def exact(self, number: int) -> dict[str, Any]:
        """Outputs and gradients of an entry against the reference, and what its own counters say of that one step."""
        runner = self.runners[number]
        for layer in runner.layers:
            for traffic in layer.peer.traffic.values():
                traffic.reset()
        _, _, outputs = runner.step()
        answer: dict[str, Any] = {"tokens": 0, "exact": 0, "error": 0.0, "largest": 0.0, "gradients": {}}
        for layer, y_NH in zip(runner.layers, outputs, strict=True):
            expected_NH = layer.reference["y"]
            error_N = (y_NH - expected_NH).norm(dim=1)
            answer["tokens"] += len(y_NH)
            answer["exact"] += int((error_N <= EXACT * expected_NH.norm(dim=1)).sum())
            answer["error"] = max(answer["error"], float((y_NH - expected_NH).abs().max()))
            answer["largest"] = max(answer["largest"], float(expected_NH.abs().max()))
            _add_errors(answer["gradients"], self._gradients(layer))
        answer["traffic"] = [self._traffic(layer) for layer in runner.layers]
        return answer

    def _gradients(self, layer: Layer) -> dict[str, tuple[Tensor, Tensor]]:
        """Found and expected, for this rank's part of each."""
        owned = layer.layout.owned(self.ranks.rank)
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for name, value in layer.peer.gradients().items():
            found[name] = (value, layer.reference[name][owned])
        assert layer.x_NH.grad is not None
        found["hidden states"] = (layer.x_NH.grad, layer.reference["x"])
        if layer.peer.gives_weight_gradient and layer.weights_NK.grad is not None:
            found["router weights"] = (layer.weights_NK.grad, layer.reference["weights"])
        return found

    def _traffic(self, layer: Layer) -> dict[str, Any]:
        """Rows and bytes to each rank or node, as its own counters have them."""
        return {
            link: {
                "rows": {" ".join(key): rows for key, rows in traffic.rows.items()},
                "bytes": {" ".join(key): sent for key, sent in traffic.bytes.items()},
                "counts": traffic.count_bytes,
                "collectives": traffic.collectives,
            }
            for link, traffic in layer.peer.traffic.items()
        }

    def bytes(self, number: int) -> dict[str, Any]:
        """Bytes that left this node in one step: by the device's counter, and by the arguments of collectives."""
        runner = self.runners[number]
        answer: dict[str, Any] = {}
        for name, backward in (("forward", False), ("total", True)):
            before = self._sent()
            for _ in range(BYTE_ROUNDS):
                runner.step(backward)
            sent = self._sent() - before
            with CollectiveBytes(self.job.setting.per_node) as counted:
                runner.step(backward)
            answer[name] = {
                "sent": sent / BYTE_ROUNDS if self.device else None,
                "counted": counted.across,
                "calls": counted.calls,
                "unknown": sorted(counted.unknown),
            }
        return answer

    def _sent(self) -> int:
        """The device's counter, while all ranks stand still."""
        dist.barrier()
        count = sent_bytes(self.device) if self.device else 0
        # Nobody goes on before everybody has read.
        dist.barrier()
        return count

    def time(self, turns: list[list[int]], seed: int) -> list[tuple[int, int, float, float]]:
        """Entry, round, seconds of forward and of both; in each round the order is drawn anew.

        Args:
            turns: for each round, who takes part.
            seed: of the order.
        """
        taken = []
        shuffle = random.Random(seed)
        for turn, numbers in enumerate(turns):
            order = list(numbers)
            shuffle.shuffle(order)
            for number in order:
                dist.barrier()
                forward, total, _ = self.runners[number].step()
                taken.append((number, turn, forward, total))
        return taken

    def profile(self, number: int, rounds: int) -> dict[str, Any]:
        """Where this rank's time goes."""
        from moekit.bench.dispatch.profiling import profile

        return profile(self.runners[number].step, [x.peer for x in self.runners[number].layers], rounds)


def _add_errors(sums: dict[str, list[float]], found: dict[str, tuple[Tensor, Tensor]]) -> None:
    for name, (value, expected) in found.items():
        pair = sums.setdefault(name, [0.0, 0.0])
        pair[0] += float((value - expected).double().square().sum())
        pair[1] += float(expected.double().square().sum())


def _commands() -> Callable[[], dict[str, Any]]:
    """Lines of standard input; when it ends this process ends at once, whatever it waits for."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    return lambda: json.loads(lines.get())


def main(folder: Path, answers: int) -> None:
    """Serve until told to quit."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the harness
    torch.set_num_threads(1)
    command = _commands()
    with os.fdopen(answers, "w") as pipe:

        def answer(**values: Any) -> None:
            pipe.write(json.dumps(values) + "\n")
            pipe.flush()

        try:
            dist.init_process_group("gloo", timeout=TIMEOUT)
            rank = Rank(folder)
            answer(ok=True)
            while (order := command())["do"] != "quit":
                answer(ok=getattr(rank, order.pop("do"))(**order))
            dist.destroy_process_group()
        except BaseException:
            answer(error=traceback.format_exc())
            raise


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
