"""Knowledge distillation from a teacher's output.

Legend: n tokens of a slice, V vocabulary, K entries kept of the teacher's distribution.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from moekit.catalogue import register
from moekit.errors import BadConfig
from moekit.training.batch import TopLogProbs
from moekit.training.head import OutputInputs
from moekit.training.objectives.base import KIND, OutputObjective

# A rest of the teacher's mass below this is rounding.
SMALLEST_REST = 1e-8


def full_divergence(student_nV: Tensor, teacher_nV: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 times the sum over tokens of KL(softmax(teacher / T) || softmax(student / T)): scalar fp32.

    T^2 keeps the size of the gradient at any temperature (Hinton et al., arXiv:1503.02531, section 2).
    """
    wanted_nV = (teacher_nV.float() / temperature).log_softmax(dim=-1)
    got_nV = (student_nV.float() / temperature).log_softmax(dim=-1)
    return temperature**2 * (wanted_nV.exp() * (wanted_nV - got_nV)).sum()


def bucket_divergence(student_nV: Tensor, teacher: TopLogProbs) -> Tensor:
    """Sum over tokens of the KL divergence in which all tokens that the teacher does not list are one: scalar fp32.

    sum_K p ln(p / q) + p_rest ln(p_rest / q_rest), q over the whole vocabulary. It is 0 with a gradient of 0 where the
    student equals the teacher, and never exceeds the full divergence; dropping the rest has neither property.
    """
    listed_nK = teacher.values_NK.exp()
    every_n1 = student_nV.logsumexp(dim=-1, keepdim=True)
    got_nK = student_nV.gather(1, teacher.ids_NK) - every_n1
    total = (listed_nK * (teacher.values_NK - got_nK)).sum()
    if teacher.ids_NK.shape[1] == student_nV.shape[1]:
        return total
    rest_n = 1 - listed_nK.sum(dim=-1)
    left_n = student_nV.scatter(1, teacher.ids_NK, float("-inf")).logsumexp(dim=-1) - every_n1.squeeze(1)
    floored_n = rest_n.clamp(min=SMALLEST_REST)
    return total + torch.where(rest_n > SMALLEST_REST, floored_n * (floored_n.log() - left_n), 0.0).sum()


@register(
    name="kd",
    kind=KIND,
    paper="arXiv:1503.02531",
    changes="weights",
    limits=(
        "The teacher must know the same token ids.",
        "Logits kept on disk fit temperature 1 only: the mass of what was not kept is unknown at any other.",
    ),
)
class Distillation(OutputObjective):
    """Forward KL divergence from a teacher's next-token distribution, scaled by the squared temperature.

    Per token T^2 KL(softmax(z_teacher / T) || softmax(z_student / T)), in fp32, over the positions whose next token
    counts; divided by as many tokens as the cross-entropy. From a teacher's stored top-k logits the tokens that were
    not kept count as one.
    """

    temperature: float = Field(default=1.0, gt=0, description="softens both distributions; no unit")

    needs_teacher = True

    def loss(self, inputs: OutputInputs) -> Tensor:
        """Nats a token."""
        teacher = inputs.batch.teacher
        if teacher is None:
            raise BadConfig("kd needs a teacher", hint="give train() a teacher")

        def term(student_nV: Tensor, positions_n: Tensor) -> Tensor:
            said = teacher.at(positions_n)
            if isinstance(said, TopLogProbs):
                return bucket_divergence(student_nV, said)
            if said.shape[-1] != student_nV.shape[-1]:
                raise BadConfig(
                    f"the teacher has {said.shape[-1]} tokens, the student {student_nV.shape[-1]}",
                    hint="both must know the same token ids",
                )
            return full_divergence(student_nV, said, self.temperature)

        return inputs.sum_over_tokens(term) / inputs.count
