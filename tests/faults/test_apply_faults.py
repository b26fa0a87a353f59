"""Whatever ends a pruning run, its target is absent or complete, the next run finishes, and its bytes are the same."""

from __future__ import annotations

import hashlib
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moekit.checkpoint.digest import tensor_digests
from moekit.checkpoint.expected import verify
from moekit.checkpoint.folder import SINGLE_FILE, Checkpoint
from moekit.checkpoint.record import Record
from moekit.compress.engine.apply import apply
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.weights import LayerWeights
from moekit.errors import BadCheckpoint, BadConfig, OutOfBudget
from tests.checkpoints import plain
from tests.contracts import FULL

KEEP = (1, 2, 5, 6)
DECISIONS = {layer: LayerOutcome(keep=KEEP) for layer in range(2)}


def halve(layer: int, weights: LayerWeights) -> LayerWeights:
    return weights.select(KEEP).map(lambda tensor: tensor / 2, router=False)


def prune(source: Path, target: Path, progress: object = None, rewrite: object = None) -> None:
    record = Record(command="a test", parent="parent", parent_fingerprint="f")
    apply(
        Checkpoint.open(source), DECISIONS, target, rewrite=rewrite, record=record, max_shard_bytes=60_000,
        progress=progress,
    )  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


def fork(work: Callable[[], object]) -> int:
    """Run `work` in a forked child, which shares the imported libraries and so starts at once."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Killer:
    """Kills the process once so many bytes are written."""

    def __init__(self, after: int) -> None:
        self.left = after

    def start(self, label: str, total: int | None) -> None:
        pass

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.left -= amount
        if self.left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def finish(self) -> None:
        pass


@pytest.mark.parametrize("rewrite", [None, pytest.param(halve, marks=FULL)], ids=["copy", "rewrite"])
def test_kill_at_ten_random_moments(rewrite: object, tmp_path: Path) -> None:
    source = plain(tmp_path / "source", "qwen2_moe")
    start = time.monotonic()
    prune(source, tmp_path / "whole", rewrite=rewrite)
    took = time.monotonic() - start
    expected, nbytes = digests(tmp_path / "whole"), Checkpoint.open(tmp_path / "whole").nbytes
    target, moments, absent = tmp_path / "out", random.Random(0), 0
    for number in range(10):
        if number % 2:  # while bytes are written
            killer = Killer(moments.randrange(1, nbytes))
            pid = fork(lambda killer=killer: prune(source, target, killer, rewrite=rewrite))
        else:  # at any time, sealing and the last renaming among them
            pid = fork(lambda: prune(source, target, rewrite=rewrite))
            time.sleep(moments.uniform(0, 1.3 * took))
            os.kill(pid, signal.SIGKILL)
        if ended(pid) not in (0, -signal.SIGKILL):
            pytest.fail("the run failed by itself")
        if target.exists():
            assert digests(target) == expected
            os.rename(target, tmp_path / f"done-{number}")
        else:
            absent += 1
    assert absent >= 5
    prune(source, target, rewrite=rewrite)
    assert digests(target) == expected
    assert {p.name.split("-")[0] for p in tmp_path.iterdir()} <= {"source", "whole", "out", "done"}  # nothing left over
    written = Checkpoint.open(target)
    assert written.record is not None
    assert written.record.expectations.tensors == tensor_digests(target, written.tensors.values())


def test_a_second_run_waits_for_no_dead_one_but_refuses_beside_a_living(tmp_path: Path) -> None:
    source = plain(tmp_path / "source", "mixtral")

    class Sleeper(Killer):
        def advance(self, amount: int = 1, note: str = "") -> None:
            time.sleep(60)

    pid = fork(lambda: prune(source, tmp_path / "out", Sleeper(0)))
    while not list(tmp_path.glob(".out.moekit-tmp-*")):
        time.sleep(0.01)
    with pytest.raises(BadConfig, match=f"process {pid} is writing"):
        prune(source, tmp_path / "out")
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    prune(source, tmp_path / "out")
    verify(Checkpoint.open(tmp_path / "out"))


def test_a_disk_that_fills_up(tmp_path: Path) -> None:
    source = plain(tmp_path / "source", "mixtral")

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with pytest.raises(OutOfBudget, match="disk is full"):
            prune(source, tmp_path / "out")

    assert ended(fork(limited)) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_source_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    source = plain(tmp_path / "source", "mixtral")
    checkpoint = Checkpoint.open(source)
    os.truncate(source / "model.safetensors", 100_000)
    with pytest.raises(BadCheckpoint, match="became shorter") as caught:
        apply(checkpoint, DECISIONS, tmp_path / "out", record=Record(command="x", parent="p"))
    assert caught.value.file == str(source / SINGLE_FILE)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]
