"""Seeded damage to every kind of file that moekit reads: a typed error with a short message, or success; nothing else.

What each mutation does is decided by its number alone, so that a failing case is repeated by its id.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moekit
from moekit.checkpoint.expected import verify
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.model import read_extra_tensors
from moekit.checkpoint.record import Record
from moekit.cli.main import main
from moekit.compress.engine.plan import WeightPlan
from moekit.data import load_text
from moekit.errors import MoekitError
from moekit.evaluation.documents import PerplexityResult
from moekit.jobs.shared.opened import open_source
from moekit.jobs.weights.protection import parse_protected
from moekit.placement import Placement
from moekit.recipe.schema import load_recipe
from moekit.report.results import load_evaluation, load_replay
from moekit.routing import RoutingPlan
from moekit.runtime import detach, restore
from moekit.serving.expert_sets.store import ExpertSetStore
from moekit.trace import Trace
from tests.tiny import write_model, write_text

ROUNDS = 24
DEEP = json.loads("[" * 500 + "]" * 500)
NASTY: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**400, 0.5, float("nan"), float("inf"), "", "x", "0", "-1",
    "../../etc/passwd", "/dev/zero", "a" * 5000, "\x1b[2J", "\ud800", "\0", "[" * 300, 1e300, -1e300,
    [], {}, [[]], {"": {}}, DEEP,
    [1, 2, 3], {"0": [1]}, ["x"],
]  # fmt: skip


# --- the files


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each."""
    folder = tmp_path_factory.mktemp("artefacts")
    write_model(folder / "moe")
    text = write_text(folder / "text")
    options = ["--data", text, "--seq-len", 32]
    plan = ["--method", "frequency", "--keep", "0.5", "--data", text, "--plan", folder / "pruned" / "plan.json"]
    traced = ["--trace", folder / "trace", "--top-t", 3]
    (folder / "pruned").mkdir()
    for command in (
        ["profile", folder / "moe", "-o", folder / "trace", *options, "--max-tokens", 200],
        ["place", "swap", folder / "trace", "-o", folder / "placed", "--compare", "[]"],
        ["route", "c2r", folder / "moe", "-o", folder / "plan", *traced],
        ["route", "c2r", folder / "moe", "-o", folder / "routed", *traced, "--write", "model"],
        ["prune", folder / "moe", *plan],
        ["expert-sets", folder / "moe", "--task", "a", "--data", text, "-o", folder / "expert_sets"],
        ["evaluate", folder / "moe", "-o", folder / "evaluated", "--data", text],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as left:
            main([*map(str, command), "--quiet"])
        assert left.value.code == 0, command
    (folder / "results").mkdir()
    perplexity = PerplexityResult(domains=("a", "b"), tokens=(10, 20), nll=(1.0, 2.0))
    perplexity.save(folder / "results" / "perplexity.json")
    (folder / "results" / "protect.json").write_text('{"0": [1, 2], "1": [3]}')
    (folder / "results" / "lines.jsonl").write_text('{"text": "some text", "domain": "a"}\n' * 3)
    (folder / "results" / "recipe.yaml").write_text(RECIPE)
    return folder


RECIPE = """\
name: x
out: runs/x
vars: {model: smollm2, devices: [2, 4]}
steps:
  - {use: profile, id: look, model: "${model}", data: demo}
  - {use: place, id: "place-${d}", trace: "${steps.look}", method: swap, devices: ["${d}"], over: {d: "${devices}"}}
"""

TOKENS = torch.arange(12).view(1, 12)


class Readers:
    """What a command does with each kind of file."""

    def __init__(self, made: Path) -> None:
        self.made = made
        self.model = moekit.load(made / "moe", device="cpu")
        self.source = open_source(str(made / "moe"))

    def trace(self, folder: Path) -> None:
        trace = Trace.load(folder)
        trace.require(["load", "coactivation"])
        _ = trace.digest

    def placed(self, folder: Path) -> None:
        placement = Placement.load(folder / "placement-2.json")
        _ = (placement.is_equal, placement.gap, placement.hash, placement.orders())
        load_replay(folder)

    def plan(self, folder: Path) -> None:
        plan = RoutingPlan.load(folder)
        _ = plan.hash
        plan.permuted({0: list(reversed(range(plan.header.experts[0])))})
        self._routed(lambda: plan.apply(self.model))

    def routed(self, folder: Path) -> None:
        record = Record.read(folder)
        assert record is not None
        self._routed(lambda: restore(self.model, record.parts, read_extra_tensors(folder)))

    def _routed(self, attach: Callable[[], None]) -> None:
        """Attach and run; whatever happens, the model routes as before afterwards."""
        try:
            attach()
            self.model(input_ids=TOKENS)
        finally:
            detach(self.model)
        self.model(input_ids=TOKENS)

    def moe(self, folder: Path) -> None:
        checkpoint = Checkpoint.open(folder)
        _ = checkpoint.fingerprint
        verify(checkpoint)

    def pruned(self, folder: Path) -> None:
        plan = WeightPlan.load(folder / "plan.json")
        plan.check_model(self.source.checkpoint.fingerprint)
        _ = (plan.hash, plan.method, plan.outcomes)

    def expert_sets(self, folder: Path) -> None:
        ExpertSetStore(folder).load_all()

    def evaluated(self, folder: Path) -> None:
        _ = load_evaluation(folder).perplexity

    def results(self, folder: Path) -> None:
        with contextlib.suppress(MoekitError):
            result = PerplexityResult.load(folder / "perplexity.json")
            _ = (result.overall, result.per_domain())
        with contextlib.suppress(MoekitError):
            parse_protected(str(folder / "protect.json"), self.source)
        with contextlib.suppress(MoekitError):
            load_text(str(folder / "lines.jsonl"))
        load_recipe(folder / "recipe.yaml")


@pytest.fixture(scope="module")
def readers(made: Path) -> Readers:
    return Readers(made)


# --- the damage


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


def mutate_value(value: Any, rng: random.Random) -> Any:
    """Replace, remove, rename or add one thing."""
    value = copy.deepcopy(value)
    found = list(places(value))
    if not found:
        return rng.choice(NASTY)
    path = rng.choice(found)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    how = rng.randrange(4)
    if how == 0:
        del parent[path[-1]]
    elif how == 1 and isinstance(parent, dict):
        parent[rng.choice(["", "x", "-1", "99", "1" * 5000, "\ud800", "\x1b", "a.b.c"])] = parent.pop(path[-1])
    elif how == 2 and isinstance(parent, dict):
        parent[str(rng.choice(NASTY))[:2000]] = rng.choice(NASTY)
    else:
        parent[path[-1]] = rng.choice(NASTY)
    return value


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat or replace some bytes; change how they are encoded."""
    how = rng.randrange(5)
    at = rng.randrange(len(data) + 1)
    if how == 0:
        return data[:at]
    if how == 1:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if how == 2:
        return data[:at] + rng.choice([b"[", b"{", b"\xff", b"\0", b"9", b'"']) * rng.choice([1, 100_000]) + data[at:]
    if how == 3:
        return data[at:]
    return data.decode("latin-1").encode("utf-16")


def mutate_file(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    if rng.random() < 0.35 or path.suffix in (".yaml", ".jsonl"):
        path.write_bytes(mutate_bytes(data, rng))
    elif path.suffix == ".json":
        path.write_text(json.dumps(mutate_value(json.loads(data), rng)))
    else:
        size = int.from_bytes(data[:8], "little")
        header = json.dumps(mutate_value(json.loads(data[8 : 8 + size]), rng)).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


TARGETS = {
    "trace": ("trace.json", "trace.safetensors"),
    "placed": ("placement-2.json", "replay.json"),
    "plan": ("plan.json", "plan.safetensors"),
    "routed": ("moekit.json", "moekit.safetensors"),
    "moe": ("config.json", "model.safetensors"),
    "pruned": ("plan.json", "plan.safetensors"),
    "expert_sets": ("expert_sets.json", "*.safetensors"),
    "evaluated": ("evaluation.json",),
    "results": ("perplexity.json", "protect.json", "lines.jsonl", "recipe.yaml"),
}


def ended(read: Callable[[Path], None], folder: Path) -> Exception | None:
    """What reading ends in."""
    try:
        read(folder)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("kind", TARGETS)
def test_damaged_files_end_in_one_short_message(readers: Readers, made: Path, tmp_path: Path, kind: str) -> None:
    read: Callable[[Path], None] = getattr(readers, kind)
    read(made / kind)  # whole, it is read
    for number in range(ROUNDS):
        rng = random.Random(f"{kind} {number}")
        folder = shutil.copytree(made / kind, tmp_path / str(number))
        (target,) = rng.sample(sorted(f for name in TARGETS[kind] for f in folder.glob(name)), 1)
        mutate_file(target, rng)
        told = ended(read, folder)
        assert told is None or isinstance(told, MoekitError), (number, target.name, repr(told)[:500])
        assert told is None or (told.exit_code in (2, 3) and len(str(told)) < 2500), (number, target.name)
        shutil.rmtree(folder)


def test_an_index_of_shards_is_read_with_the_same_care(made: Path, tmp_path: Path) -> None:
    whole = shutil.copytree(made / "moe", tmp_path / "whole")
    (whole / "model.safetensors").rename(whole / "model-00001-of-00001.safetensors")
    names = Checkpoint.open(made / "moe").tensors
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (whole / "model.safetensors.index.json").write_text(json.dumps(index))
    Checkpoint.open(whole)
    for number in range(ROUNDS):
        rng = random.Random(f"index {number}")
        (whole / "model.safetensors.index.json").write_text(json.dumps(index))
        mutate_file(whole / "model.safetensors.index.json", rng)
        with contextlib.suppress(MoekitError):
            Checkpoint.open(whole)
