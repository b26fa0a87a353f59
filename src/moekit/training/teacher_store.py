"""A teacher's likeliest tokens, stored on disk before a run, so that the teacher need not be there while it is on.

A store is written shard by shard, each under its final name only when it is whole, so a killed pass goes on where it
was. It is bound to the text (hash of its rows) and to the teacher (fingerprint of its weights), and checked before use.

Legend: R rows, B rows of a micro-batch, S positions, N tokens, V vocabulary, K entries kept of each token.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from moekit._files import open_regular, read_text
from moekit._progress import Progress
from moekit.checkpoint.atomic import atomic_write
from moekit.data.batches import TokenBatches
from moekit.errors import BadConfig, BadData, NumericFault
from moekit.training.batch import MicroBatch, TeacherOutput, TopLogProbs
from moekit.training.teacher import LiveTeacher

STORE_FILE = "teacher.json"
# Rows of a shard: what a kill loses.
SHARD_ROWS = 64


@dataclass(frozen=True, eq=False)
class _StoredOutput:
    """A store's entries for one micro-batch."""

    ids_NK: Tensor
    values_NK: Tensor
    complete: bool = False

    def at(self, positions_N: Tensor) -> TopLogProbs:
        """The likeliest tokens."""
        return TopLogProbs(self.ids_NK[positions_N].long(), self.values_NK[positions_N].float())


class StoreHeader(BaseModel):
    """What a store holds.

    Attributes:
        text: hash of the rows.
        teacher: fingerprint of the teacher's weights.
        rows: R.
        length: S.
        top_k: K.
        vocabulary: V.
        shard_rows: rows of each file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    teacher: str
    rows: int = Field(ge=1)
    length: int = Field(ge=1)
    top_k: int = Field(ge=1)
    vocabulary: int = Field(ge=1)
    shard_rows: int = Field(ge=1)

    def shard(self, number: int) -> str:
        """File name of a shard."""
        return f"top-{number:05d}.safetensors"

    @property
    def shards(self) -> int:
        """How many files."""
        return -(-self.rows // self.shard_rows)


def text_hash(rows: TokenBatches) -> str:
    """What makes rows these rows: their ids and documents."""
    return hashlib.sha256(rows.input_ids.numpy().tobytes() + rows.document_RS.numpy().tobytes()).hexdigest()


def store_teacher(
    model: PreTrainedModel,
    rows: TokenBatches,
    folder: str | Path,
    *,
    top_k: int = 64,
    batch: int = 4,
    shard_rows: int = SHARD_ROWS,
    progress: Progress | None = None,
) -> StoredTeacher:
    """Write a teacher's likeliest tokens for every position of a text; called again after a kill, go on.

    Six bytes an entry: token id in 32 bits, log-probability (over the whole vocabulary) in 16.

    Args:
        model: the teacher.
        rows: the text.
        folder: where to; made if it is not there.
        top_k: K, entries kept of each position.
        batch: rows of a forward pass.
        shard_rows: rows of a file.
        progress: told of each file.

    Returns:
        The store, checked.

    Raises:
        BadConfig: K exceeds the vocabulary, or the folder holds another store.
        NumericFault: the teacher's logits are not finite.
    """
    teacher = LiveTeacher(model)
    if not 1 <= top_k <= teacher.vocabulary:
        raise BadConfig(f"top_k is {top_k}", hint=f"choose between 1 and {teacher.vocabulary}")
    target = Path(folder)
    header = StoreHeader(
        text=text_hash(rows),
        teacher=teacher.identity,
        rows=len(rows),
        length=rows.input_ids.shape[1],
        top_k=top_k,
        vocabulary=teacher.vocabulary,
        shard_rows=shard_rows,
    )
    target.mkdir(parents=True, exist_ok=True)
    if (target / STORE_FILE).exists() and _header(target) != header:
        raise BadConfig("holds another store", file=target, hint="choose another folder, or remove it")
    atomic_write(target / STORE_FILE, header.model_dump_json(indent=1))
    with _told(progress, header.shards):
        for number in range(header.shards):
            if not (target / header.shard(number)).exists():
                _write_shard(teacher, rows, header, number, target, batch)
            if progress is not None:
                progress.advance(1)
    return StoredTeacher(target)


@contextmanager
def _told(progress: Progress | None, count: int) -> Iterator[None]:
    if progress is not None:
        progress.start("asking the teacher", count)
    try:
        yield
    finally:
        if progress is not None:
            progress.finish()


def _write_shard(
    teacher: LiveTeacher, rows: TokenBatches, header: StoreHeader, number: int, folder: Path, batch: int
) -> None:
    first = number * header.shard_rows
    ids: list[Tensor] = []
    values: list[Tensor] = []
    last = min(first + header.shard_rows, header.rows)
    for start in range(first, last, batch):
        picked = [rows[row] for row in range(start, min(start + batch, last))]
        ids_BS = torch.stack([row["input_ids"] for row in picked])
        mask_BS = torch.stack([row["attention_mask"] for row in picked])
        said = teacher.output(MicroBatch(ids_BS, mask_BS), torch.arange(start, start + len(picked)))
        for part_N in torch.split(torch.arange(ids_BS.numel()), 1024):
            logits_NV = said.at(part_N)
            assert isinstance(logits_NV, Tensor)
            top = logits_NV.log_softmax(dim=-1).topk(header.top_k, dim=-1)
            if not bool(top.values.isfinite().all()):
                raise NumericFault(f"the teacher's logits are not finite in rows {start} to {start + len(picked) - 1}")
            ids.append(top.indices.int().cpu())
            values.append(top.values.half().cpu())
    shape = (last - first, header.length, header.top_k)
    tensors = {"ids": torch.cat(ids).view(shape), "log_probs": torch.cat(values).view(shape)}
    # Two runs may fill one store at once.
    scratch = folder / f".{header.shard(number)}.{os.getpid()}.part"
    save_file(tensors, scratch)
    with open_regular(scratch) as stream:
        os.fsync(stream.fileno())
    os.replace(scratch, folder / header.shard(number))


def _header(folder: Path) -> StoreHeader:
    try:
        return StoreHeader.model_validate(json.loads(read_text(folder / STORE_FILE)))
    except (OSError, ValueError, ValidationError) as error:
        raise BadData("is no store of a teacher's output", file=folder / STORE_FILE) from error


class StoredTeacher:
    """A teacher's likeliest tokens, read from disk.

    Args:
        folder: from `store_teacher`.

    Raises:
        BadData: a file is missing, or does not hold what the header says.
    """

    complete = False

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.header = _header(self.folder)
        for number in range(self.header.shards):
            self._check_shard(number)

    def _check_shard(self, number: int) -> None:
        file = self.folder / self.header.shard(number)
        rows = min(self.header.shard_rows, self.header.rows - number * self.header.shard_rows)
        expected = [rows, self.header.length, self.header.top_k]
        try:
            with safe_open(file, framework="pt") as opened:
                parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                found = {name: (part.get_shape(), part.get_dtype()) for name, part in parts.items()}
        except (OSError, SafetensorError) as error:
            raise BadData(
                "is missing or damaged", file=file, hint="write the store once more (store_teacher goes on)"
            ) from error
        if found != {"ids": (expected, "I32"), "log_probs": (expected, "F16")}:
            raise BadData(f"does not hold ids and log_probs of shape {expected}", file=file, hint="remove it")

    @property
    def identity(self) -> str:
        """Fingerprint of the teacher's weights, and how much of its output was kept."""
        return f"{self.header.teacher} top {self.header.top_k}"

    def check(self, rows: TokenBatches, vocabulary: int) -> None:
        """Refuse another text, or a student with other token ids."""
        if self.header.text != text_hash(rows):
            raise BadConfig(
                "was written for another text, or for other rows of it",
                file=self.folder,
                hint="store the teacher's output of the rows that the run trains on",
            )
        if self.header.vocabulary != vocabulary:
            raise BadConfig(
                f"the teacher has {self.header.vocabulary} tokens, the student {vocabulary}",
                file=self.folder,
                hint="teacher and student must know the same token ids",
            )

    def output(self, batch: MicroBatch, rows_B: Tensor) -> TeacherOutput:
        """The entries of these rows, cut to the length of the batch."""
        assert batch.ids_BS is not None
        length = batch.ids_BS.shape[1]
        parts = [self._row(int(row), length) for row in rows_B]
        device = batch.ids_BS.device
        ids_NK = torch.cat([ids for ids, _ in parts]).to(device)
        values_NK = torch.cat([values for _, values in parts]).to(device)
        if int(ids_NK.min()) < 0 or int(ids_NK.max()) >= self.header.vocabulary or not bool(values_NK.isfinite().all()):
            raise BadData("holds ids outside the vocabulary, or values that are not finite", file=self.folder)
        return _StoredOutput(ids_NK, values_NK)

    def _row(self, row: int, length: int) -> tuple[Tensor, Tensor]:
        number, place = divmod(row, self.header.shard_rows)
        with safe_open(self.folder / self.header.shard(number), framework="pt") as opened:
            ids_1SK = opened.get_slice("ids")[place : place + 1]
            values_1SK = opened.get_slice("log_probs")[place : place + 1]
        return ids_1SK[0, :length], values_1SK[0, :length]
