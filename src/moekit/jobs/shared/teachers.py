"""Models that others are held against."""

from __future__ import annotations

from typing import Any

from moekit.errors import BadConfig


def refuse_other_tokenizer(own: Any, teachers: Any, reference: str) -> None:
    """Refuse a teacher whose tokens are not the student's.

    Args:
        own: the student's tokenizer.
        teachers: the teacher's.
        reference: how the teacher was named.

    Raises:
        BadConfig: naming the teacher.
    """
    if teachers.get_vocab() != own.get_vocab():
        raise BadConfig(
            "the teacher's tokenizer has other tokens than the student's",
            file=reference,
            hint="teacher and student must know the same token ids",
        )
