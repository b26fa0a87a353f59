"""The compressed model and the one that it was made from: found, and refused where they do not belong together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekit.checkpoint import Checkpoint, Record
from moekit.checkpoint.names import text_config
from moekit.checkpoint.quantized.registry import kind
from moekit.data import Document
from moekit.data.encoding import Bos, encode_document
from moekit.errors import BadConfig, MoekitError, UnsupportedModel
from moekit.jobs.shared.inputs import load_tokenizer, model_location
from moekit.jobs.shared.teachers import refuse_other_tokenizer
from moekit.jobs.undo import find_parent

# Keys in the record of a healed model, under which the next healing finds its teacher.
TEACHER, FINGERPRINT = "teacher", "teacher_fingerprint"
_GIVE = "say --teacher PARENT, the model that this one was made from"
# Characters of each of a few documents that both tokenizers are tried on.
_TRIED, _FEW = 2000, 8


@dataclass(frozen=True)
class Sources:
    """Two models, opened; no weight has been read.

    Attributes:
        student: the compressed one.
        teacher: the one that it was made from.
        reference: how the teacher was named.
    """

    student: Checkpoint
    teacher: Checkpoint
    reference: str

    @staticmethod
    def longest(checkpoint: Checkpoint) -> int:
        """Positions that a model knows; a large number where it does not say."""
        known = text_config(checkpoint.config).get("max_position_embeddings")
        return known if isinstance(known, int) and known > 1 else 1 << 20

    def tokenizer(self, documents: list[Document], bos: Bos) -> Any:
        """The tokenizer that both have.

        Raises:
            BadConfig: there are two.
        """
        own, other = (load_tokenizer(str(checkpoint.path)) for checkpoint in (self.student, self.teacher))
        refuse_other_tokenizer(own, other, self.reference)
        for document in documents[:_FEW]:
            ids = [encode_document(document, one, bos=bos, characters=_TRIED) for one in (own, other)]
            if ids[0] != ids[1]:
                raise BadConfig(
                    f"the teacher's tokenizer reads {document.source or 'the text'} as other tokens than the student's",
                    file=self.reference,
                    hint="teacher and student must know the same token ids, and begin a text alike",
                )
        return own


def open_sources(student: str, teacher: str | None, progress: Any = None) -> Sources:
    """Open both models, and refuse what cannot heal.

    Args:
        student: reference of the compressed model.
        teacher: reference of the one that it was made from; None finds it by records.
        progress: told of downloads.

    Raises:
        BadConfig: no teacher is known, or it is no parent of such a student.
        BadCheckpoint: a model is damaged.
        UnsupportedModel: the student's weights are packed.
    """
    own = Checkpoint.open(model_location(student, progress))
    _refuse_untrainable(own)
    reference = find_teacher(own) if teacher is None else teacher
    other = Checkpoint.open(model_location(reference, progress))
    _refuse_pair(own, other, reference)
    return Sources(own, other, reference)


def find_teacher(student: Checkpoint) -> str:
    """The model that a compressed one was made from, by records that lie here; nothing is fetched.

    It is the nearest ancestor with more parameters. Where none has more (weights were rounded, zeroed or routed), it is
    the teacher of a student that was healed before, else the model that the student was made from.

    Raises:
        BadConfig: no record names one that is still there as it was.
    """
    own, nearest, healed_by = parameters(student), "", ""
    for parent, record in _ancestors(student):
        nearest = nearest or str(parent.path)
        healed_by = healed_by or _teacher_of(record)
        more = parameters(parent)
        if own is not None and more is not None and more > own:
            return str(parent.path)
    return healed_by or nearest


def _ancestors(student: Checkpoint) -> Iterator[tuple[Checkpoint, Record]]:
    """A model's parent, with the record that names it; then that one's, as far back as records reach."""
    here, seen = student, {student.path}
    while True:
        try:
            found = find_parent(here.path)
            parent = Checkpoint.open(found.parent, local_files_only=True)
        except MoekitError as error:
            if here is student:
                raise BadConfig(f"no teacher is given, and none is found: {error.message}", hint=_GIVE) from error
            return
        if parent.path in seen or here.record is None:
            return
        yield parent, here.record
        seen.add(parent.path)
        here = parent


def _teacher_of(record: Record) -> str:
    """The folder of the model that a healed one was held against; "" where there is none, or not any more."""
    told, proof = record.config.get(TEACHER), record.config.get(FINGERPRINT)
    try:
        # A record is a stranger's: nothing is fetched for it.
        here = told if isinstance(told, str) and Path(told).is_absolute() else ""
        return here if here and Checkpoint.open(here, local_files_only=True).fingerprint == proof else ""
    except MoekitError:
        return ""


def parameters(checkpoint: Checkpoint) -> int | None:
    """Numbers in a checkpoint; None where they are packed, so that headers do not tell."""
    if "quantization_config" in checkpoint.config:
        return None
    return sum(math.prod(info.shape) for info in checkpoint.tensors.values())


def _refuse_untrainable(student: Checkpoint) -> None:
    if student.config.get("is_encoder_decoder"):
        raise UnsupportedModel(
            "it reads one text and writes another: a text alone does not heal it",
            file=student.path,
            hint="train it with transformers' Seq2SeqTrainer, and give moekit the folder",
        )
    packed = student.config.get("quantization_config")
    if packed is not None:
        method = kind(packed) if isinstance(packed, dict) else "?"
        raise UnsupportedModel(
            f"its weights are packed ({method}), and nothing can be learnt through packed weights",
            file=student.path,
            hint="heal the model before it is packed: rounded weights in a plain dtype will do (moekit quantize)",
        )


def _refuse_pair(student: Checkpoint, teacher: Checkpoint, reference: str) -> None:
    routed = student.record is not None and bool(student.record.parts)
    if teacher.fingerprint == student.fingerprint and not routed:
        raise BadConfig("the teacher is the student itself, so there is nothing to learn", file=reference, hint=_GIVE)
    sizes = [text_config(checkpoint.config).get("vocab_size") for checkpoint in (teacher, student)]
    if None not in sizes and sizes[0] != sizes[1]:
        raise BadConfig(
            f"the teacher has {sizes[0]} tokens, the student {sizes[1]}",
            file=reference,
            hint="teacher and student must know the same token ids",
        )
    more, own = parameters(teacher), parameters(student)
    if more is not None and own is not None and more < own:
        raise BadConfig(
            f"the teacher has {more:,} parameters, fewer than the student's {own:,}",
            file=reference,
            hint=f"are the two in each other's place? {_GIVE}",
        )


def local(reference: str) -> str:
    """A reference as records name it: folders by their whole path."""
    path = Path(reference).expanduser()
    return str(path.resolve()) if path.is_dir() else reference
