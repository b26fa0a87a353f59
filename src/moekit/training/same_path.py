"""Whether a teacher, put through the path that its student takes, is told to have nothing to learn.

A template, a shift or a store of another text would make it differ from itself, long before a student shows it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekit.data.batches import TokenBatches
from moekit.errors import BadData
from moekit.training.batch import MicroBatch
from moekit.training.head import OutputTap
from moekit.training.objectives.kd import Distillation
from moekit.training.own_loss import readable_head
from moekit.training.teacher import Teacher

# Nats a token. What is stored is rounded to 16 bits (up to 6e-6), and rows that stand in other batches are computed in
# another order, which may turn a choice between experts around; more so in 16 bits.
EXACT, ROUNDED = 1e-4, 1e-2


def self_divergence(
    model: PreTrainedModel, teacher: Teacher, rows: TokenBatches, objective: Distillation, *, count: int = 3
) -> float:
    """What a teacher itself would be told to learn of a few rows: nats a token.

    Args:
        model: the teacher's model.
        teacher: what it says, asked now or stored before.
        rows: of the run; the first, the middle and the last are taken.
        objective: by which the student is told.
        count: rows, at most.
    """
    numbers = sorted({round(step * (len(rows) - 1) / max(count - 1, 1)) for step in range(count)})
    tap = OutputTap(model, readable_head(model), objective.loss)
    total, tokens = 0.0, 0
    try:
        with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
            for number in numbers:
                row = {name: tensor[None].to(model.device) for name, tensor in rows[number].items()}
                counted = int(row["attention_mask"].sum()) - 1
                if counted > 0:
                    total += counted * float(_of_row(model, teacher, tap, row, number))
                    tokens += counted
    finally:
        tap.close()
    return total / max(tokens, 1)


def _of_row(model: PreTrainedModel, teacher: Teacher, tap: OutputTap, row: dict[str, Tensor], number: int) -> Tensor:
    asked = MicroBatch(row["input_ids"], row["attention_mask"])
    batch = MicroBatch(row["input_ids"], row["attention_mask"], teacher=teacher.output(asked, torch.tensor([number])))
    with tap.reading(batch):
        loss: Tensor = model(**row, use_cache=False).loss
    return loss


def check_same_path(model: PreTrainedModel, teacher: Teacher, rows: TokenBatches, objective: Distillation) -> float:
    """`self_divergence`, refused if it is more than rounding.

    Raises:
        BadData: the teacher, through the path of its student, is not itself.
    """
    found = self_divergence(model, teacher, rows, objective)
    most = EXACT if model.dtype.itemsize >= 4 else ROUNDED
    if not abs(found) < most:
        raise BadData(
            f"the teacher differs from what is stored of it by {found:.3g} nats a token (rounding makes less than "
            f"{most:g})",
            hint="remove the store of its output (--teacher-cache) and ask it anew; then report this",
        )
    return found
