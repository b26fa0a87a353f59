"""`moekit.json`: how a checkpoint was made, and what it must hold so that `moekit check` can prove it."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

import moekit
from moekit._validation import parse
from moekit.checkpoint.atomic import atomic_write
from moekit.checkpoint.parts import PartEntry
from moekit.checkpoint.safety import check_name, read_json
from moekit.errors import BadCheckpoint, MoekitError

RECORD_FILE = "moekit.json"
TENSORS_FILE = "moekit.safetensors"
FORMAT = 1
MAX_RECORD_BYTES = 200_000_000

_NOTED_PACKAGES = ("torch", "transformers", "safetensors")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TensorExpectation(_Frozen):
    """What a tensor must be.

    Attributes:
        dtype: as in the header.
        shape: as in the header.
        sha256: of its bytes as they lie on disk.
        experts: of tensors that stack all experts, SHA-256 of each expert's slice; so that a swap can be named.
    """

    dtype: str
    shape: list[int]
    sha256: str
    experts: list[str] | None = None


class Expectations(_Frozen):
    """What the checkpoint must hold.

    Attributes:
        experts: decoder layer -> routed experts; empty where unknown.
        top_k: choices a token.
        tensors: every tensor of the model's shards.
        extra: every tensor of moekit.safetensors.
        config: SHA-256 of config.json, volatile keys left out.
        settings: every value of config.json by its dotted key, long ones by their SHA-256.
        files: SHA-256 of the tokenizer's files, generation_config.json and the like, by name.
    """

    experts: dict[int, int] = {}
    top_k: int | None = None
    tensors: dict[str, TensorExpectation] = {}
    extra: dict[str, TensorExpectation] = {}
    config: str | None = None
    settings: dict[str, str] = {}
    files: dict[str, str] = {}


class Record(_Frozen):
    """How a checkpoint was made.

    Attributes:
        format: version of this file's layout.
        moekit: version that wrote it.
        command: what was run, readable.
        parent: folder or hub id of the checkpoint this one was made from; `moekit undo` goes back to it.
        parent_fingerprint: its fingerprint.
        fingerprint: this checkpoint's own; filled in by `moekit.save`.
        seed: of whatever was random.
        plan_hash: SHA-256 of the plan that was applied.
        config: the method's settings.
        scores: what the plan was decided from.
        versions: packages that took part.
        parts: runtime parts that `moekit.load` attaches, in the order in which they act.
        expectations: what `moekit check` proves; filled in by `moekit.save`.
    """

    format: int = FORMAT
    moekit: str = Field(default_factory=lambda: moekit.__version__)
    command: str
    parent: str | None = None
    parent_fingerprint: str | None = None
    fingerprint: str | None = None
    seed: int | None = None
    plan_hash: str | None = None
    config: dict[str, Any] = {}
    scores: dict[str, Any] = {}
    versions: dict[str, str] = Field(default_factory=lambda: package_versions())
    parts: list[PartEntry] = []
    expectations: Expectations = Expectations()

    @classmethod
    def read(cls, folder: str | Path) -> Record | None:
        """Read a folder's record; None without one.

        Raises:
            BadCheckpoint: the record is damaged, or a newer moekit wrote it.
            UnsafeInput: it is a link out of the folder, too large or too deep.
        """
        path = check_name(folder, RECORD_FILE)
        if not path.exists():
            return None
        value = read_json(path, limit=MAX_RECORD_BYTES)
        if isinstance(value.get("format"), int) and value["format"] > FORMAT:
            raise BadCheckpoint(
                f"moekit {value.get('moekit', '?')} wrote this record in a newer format",
                file=path,
                hint="upgrade moekit, or delete moekit.json to use the folder as a plain model",
            )
        hint = "restore it from a copy, or delete it to use the folder as a plain model"
        return parse(cls, value, what="record", file=path, hint=hint, kind=BadCheckpoint)

    def write(self, folder: str | Path) -> None:
        """Write the record into a folder, whole or not at all."""
        atomic_write(Path(folder) / RECORD_FILE, self.model_dump_json(indent=1) + "\n")


def ancestors(record: Record | None) -> list[str]:
    """Fingerprints of the checkpoints that one was made from, its parent's first, as far back as records reach."""
    found: list[str] = []
    while record is not None and record.parent_fingerprint and record.parent_fingerprint not in found:
        found.append(record.parent_fingerprint)
        try:
            local = record.parent is not None and Path(record.parent).is_dir()
            record = Record.read(record.parent) if local and record.parent else None
        except MoekitError:
            break
        if record is not None and record.fingerprint != found[-1]:
            break  # another checkpoint lies there now
    return found


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide what a checkpoint's numbers are."""
    return {name: importlib.metadata.version(name) for name in _NOTED_PACKAGES}
