"""Expert sets of tasks on disk: a folder of one model and method, to which tasks are added one by one.

`expert_sets.json`, which a person can read, names the tasks; each has one .safetensors of 10 E bytes for the first
layer's scores and ranks, 2 E (L-1) for the permutations, 2 L for how many experts were chosen, and 8 E (L-1) for the
scores of the further layers where they are kept: for 58 layers of 256 experts 32 KB, or 149 KB with them. Files are
checked against the index before they are read.

Legend: L MoE layers, E experts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from moekit._validation import parse
from moekit.checkpoint.atomic import atomic_write, lock
from moekit.checkpoint.safety import check_name, read_bytes, read_header, read_json
from moekit.errors import BadCheckpoint, BadConfig, BadData
from moekit.serving.expert_sets.expert_set import ExpertSet, Origin, check_same
from moekit.trace.meta import DataEntry

INDEX_FILE = "expert_sets.json"
MAX_INDEX_BYTES = 16 << 20
_AGAIN = "make the expert set again, or copy the whole folder"


class Entry(BaseModel):
    """One task of a folder.

    Attributes:
        file: with its tensors.
        sha256: of the file.
        tokens: see `ExpertSet`.
        data: see `ExpertSet`.
        further: whether scores of further layers are kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    sha256: str
    tokens: int = Field(ge=0)
    data: tuple[DataEntry, ...] = ()
    further: bool


class Index(BaseModel):
    """All tasks of a folder.

    Attributes:
        format: version of the files.
        origin: model and method of all of them.
        tasks: by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    origin: Origin
    tasks: dict[str, Entry] = Field(default_factory=dict)


class ExpertSetStore:
    """A folder of expert sets of one model and method.

    Args:
        folder: made by the first `save`.
        fingerprint: of the model they are wanted for; "" takes any.
    """

    def __init__(self, folder: str | Path, fingerprint: str = "") -> None:
        self.folder = Path(folder).expanduser()
        self.fingerprint = fingerprint

    def index(self) -> Index:
        """What the folder holds.

        Raises:
            BadData: no expert sets here, damaged, or of another model.
            UnsafeInput: an index too large or too deep.
        """
        file = self.folder / INDEX_FILE
        if not file.is_file():
            raise BadData("no expert sets here", file=self.folder, hint="save one first")
        try:
            value = read_json(file, limit=MAX_INDEX_BYTES)
        except BadCheckpoint as error:
            raise BadData(f"damaged index: {error.message}", file=file, hint=_AGAIN) from error
        index = parse(Index, value, what="index", file=file, hint=_AGAIN)
        known = index.origin.fingerprint
        if self.fingerprint and known and self.fingerprint != known:
            raise BadData(
                f"these expert sets are of the model {known[:12]}, not of {self.fingerprint[:12]}",
                file=file,
                hint="make expert sets of this model",
            )
        return index

    def save(self, expert_set: ExpertSet, *, overwrite: bool = False) -> Path:
        """Add a task, whole or not at all; returns its file.

        Raises:
            BadConfig: the task is there already, or another process is writing.
            BadData: the folder's expert sets are of another model or method.
            OutOfBudget: the disk is full; the folder is as it was.
        """
        return self.save_all([expert_set], overwrite=[expert_set.task] if overwrite else [])[0]

    def save_all(self, expert_sets: Sequence[ExpertSet], *, overwrite: Collection[str] = ()) -> list[Path]:
        """Add tasks, all of them or none; returns their files.

        Args:
            expert_sets: of distinct tasks.
            overwrite: tasks that may be replaced.

        Raises:
            BadConfig, BadData, OutOfBudget: see `save`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with lock(self.folder):
            fresh = not (self.folder / INDEX_FILE).exists()
            index = Index(origin=expert_sets[0].origin) if fresh else self.index()
            tasks = dict(index.tasks)
            for expert_set in expert_sets:
                check_same(index.origin, expert_set.origin, self.folder / INDEX_FILE)
                if expert_set.task in index.tasks and expert_set.task not in overwrite:
                    raise BadConfig(
                        f"there is an expert set of {expert_set.task!r} already",
                        file=self.folder,
                        hint="choose another name, or overwrite it",
                    )
            for expert_set in expert_sets:
                tasks[expert_set.task] = self._write(expert_set)
            changed = index.model_copy(update={"tasks": dict(sorted(tasks.items()))})
            atomic_write(self.folder / INDEX_FILE, changed.model_dump_json(indent=2) + "\n")
            for gone in {e.file for e in index.tasks.values()} - {e.file for e in tasks.values()}:
                check_name(self.folder, gone).unlink(missing_ok=True)
        return [self.folder / tasks[expert_set.task].file for expert_set in expert_sets]

    def _write(self, expert_set: ExpertSet) -> Entry:
        content = safetensors.torch.save(_tensors(expert_set))
        digest = hashlib.sha256(content).hexdigest()
        # A name of its own for each content: until the index names the new file, the old one stays whole.
        name = f"{re.sub(r'[^A-Za-z0-9_-]+', '-', expert_set.task)[:60]}-{digest[:16]}.safetensors"
        atomic_write(self.folder / name, content)
        further = expert_set.further is not None
        return Entry(file=name, sha256=digest, tokens=expert_set.tokens, data=expert_set.data, further=further)

    def load(self, task: str) -> ExpertSet:
        """Read one task.

        Raises:
            BadData: no such task, damaged, or of another model.
            UnsafeInput: a header that lies, or a name that leads out of the folder.
        """
        index = self.index()
        if task not in index.tasks:
            raise BadData(
                f"no expert set of {task!r} here",
                file=self.folder,
                hint=f"there are: {', '.join(index.tasks) or 'none'}",
            )
        return self._read(task, index.tasks[task], index.origin)

    def load_all(self) -> dict[str, ExpertSet]:
        """Read all tasks; see `load`."""
        index = self.index()
        return {task: self._read(task, entry, index.origin) for task, entry in index.tasks.items()}

    def _read(self, task: str, entry: Entry, origin: Origin) -> ExpertSet:
        file = check_name(self.folder, entry.file)
        try:
            header = read_header(file)
        except BadCheckpoint as error:
            raise BadData(f"damaged expert set: {error.message}", file=file, hint=_AGAIN) from error
        found = {name: (info.dtype, info.shape) for name, info in header.tensors.items()}
        expected = _layout(origin, entry.further)
        if found != expected:
            raise BadData(f"damaged expert set: it holds {found}, not {expected}", file=file, hint=_AGAIN)
        content = read_bytes(file)
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise BadData("damaged expert set: it is not the file the index describes", file=file, hint=_AGAIN)
        return _expert_set(task, entry, origin, safetensors.torch.load(content), file)


def _expert_set(task: str, entry: Entry, origin: Origin, tensors: dict[str, Tensor], file: Path) -> ExpertSet:
    """The expert set that a file's tensors make.

    Raises:
        BadData: they contradict each other.
    """
    order_E, permutations = tensors["order"].long(), tensors["permutations"].long()
    rows = torch.cat([order_E[None], permutations])
    straight = torch.arange(origin.experts).expand_as(rows)
    for row in (rows.sort(dim=1).values != straight).any(dim=1).nonzero().flatten().tolist():
        raise BadData(
            "damaged expert set: its experts are no permutation", file=file, layer=origin.layers[row], hint=_AGAIN
        )
    if not all(bool(t.isfinite().all()) for t in tensors.values() if t.is_floating_point()):
        raise BadData("damaged expert set: a score is not finite", file=file, hint=_AGAIN)
    chosen = tuple(tensors["chosen"].tolist())
    if not all(1 <= count <= origin.experts for count in chosen):
        raise BadData(f"damaged expert set: {chosen} experts were chosen", file=file, hint=_AGAIN)
    first_E, further = tensors["first"], tensors.get("further")
    if bool((first_E[order_E[: chosen[0]]].diff() > 0).any()):
        raise BadData("damaged expert set: ranks and scores contradict each other", file=file, hint=_AGAIN)
    return ExpertSet(task, origin, entry.tokens, entry.data, first_E, order_E, permutations, chosen, further)


def _tensors(expert_set: ExpertSet) -> dict[str, Tensor]:
    named = {
        "first": expert_set.first_E,
        "order": expert_set.order_E.to(torch.int16),
        "permutations": expert_set.permutations.to(torch.int16),
        "chosen": torch.tensor(expert_set.chosen, dtype=torch.int16),
    }
    if expert_set.further is not None:
        named["further"] = expert_set.further
    return {name: tensor.contiguous() for name, tensor in named.items()}


def _layout(origin: Origin, further: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of each tensor of an expert set's file."""
    rest = (len(origin.layers) - 1, origin.experts)
    layout: dict[str, tuple[str, tuple[int, ...]]] = {
        "first": ("F64", (origin.experts,)),
        "order": ("I16", (origin.experts,)),
        "permutations": ("I16", rest),
        "chosen": ("I16", (len(origin.layers),)),
    }
    return layout | ({"further": ("F64", rest)} if further else {})
