"""Real processes with a real gloo group, started once and asked again and again.

A job is a function of a module under `tests`, named by its import path: it is called in every process of a group of
1, 2 or 4 ranks with a `Ranks` and the job's arguments, and its answers come back in rank order.
"""

from __future__ import annotations

import importlib
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from tests.processes import free_port, warm

WORLD = 4
SIZES = (1, 2, 4)


def _serve(rank: int, port: int, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    from moekit.parallel.ranks import Ranks

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    groups: dict[Any, Any] = {size: dist.new_group(list(range(size))) for size in SIZES}
    pairs = {"inside": [[0, 1], [2, 3]], "across": [[0, 2], [1, 3]]}
    for name, members in pairs.items():
        for pair in members:
            group = dist.new_group(pair)
            if rank in pair:
                groups[name] = group
    groups["ones"] = [dist.new_group([member]) for member in range(WORLD)][rank]
    while True:
        job = pipe.recv()
        if job is None:
            dist.destroy_process_group()
            return
        size, name, args, kwargs = job
        module, _, function = name.rpartition(".")
        nodes = {"across": groups["across"], "inside": groups["inside"]} if size == WORLD else {}
        if size == 2:
            nodes = {"across": groups[2], "inside": groups["ones"]}
        try:
            answer = getattr(importlib.import_module(module), function)(Ranks(groups[size], **nodes), *args, **kwargs)
            pipe.send(("ok", answer))
        except BaseException:
            pipe.send(("error", traceback.format_exc()))


class Pool:
    """Four ranks that wait for work."""

    def __init__(self) -> None:
        context = warm()
        port = free_port()
        self.pipes, self.processes = [], []
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, port, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, size: int, job: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Call a function on the first `size` ranks; their answers, or the first failure."""
        used = self.pipes[:size]
        for pipe in used:
            pipe.send((size, job, args, kwargs))
        answers = []
        for rank, pipe in enumerate(used):
            if not pipe.poll(120):
                raise AssertionError(f"rank {rank} does not answer")
            answers.append(pipe.recv())
        for rank, (state, answer) in enumerate(answers):
            assert state == "ok", f"rank {rank}: {answer}"
        return [answer for _, answer in answers]

    def close(self) -> None:
        """Let them end."""
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(120)
            process.kill()
