"""Knowledge distillation from a teacher's output.

Legend: n tokens of a slice, V vocabulary, K entries kept of the teacher's distribution.
"""

from __future__ import annotations

from typing import Literal

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


def likeliest(logits_nV: Tensor, top_k: int) -> TopLogProbs:
    """The `top_k` likeliest tokens of a distribution, with log-probabilities over the whole vocabulary."""
    top = logits_nV.float().log_softmax(dim=-1).topk(top_k, dim=-1)
    return TopLogProbs(top.indices, top.values)


def bucket_divergences(student_nV: Tensor, teacher: TopLogProbs) -> Tensor:
    """KL divergence of each token in which all tokens that the teacher does not list are one: [n] fp32.

    sum_K p ln(p / q) + p_rest ln(p_rest / q_rest), q over the whole vocabulary. It is 0 with a gradient of 0 where the
    student equals the teacher, and never exceeds the full divergence; dropping the rest has neither property.
    """
    if teacher.ids_NK.shape[1] == student_nV.shape[1]:
        return listed_divergences(student_nV, teacher)  # what was rounded in a store adds up to one again
    listed_nK = teacher.values_NK.exp()
    every_n1 = student_nV.logsumexp(dim=-1, keepdim=True)
    got_nK = student_nV.gather(1, teacher.ids_NK) - every_n1
    each_n = (listed_nK * (teacher.values_NK - got_nK)).sum(dim=-1)
    rest_n = 1 - listed_nK.sum(dim=-1)
    left_n = student_nV.scatter(1, teacher.ids_NK, float("-inf")).logsumexp(dim=-1) - every_n1.squeeze(1)
    floored_n = rest_n.clamp(min=SMALLEST_REST)
    return each_n + torch.where(rest_n > SMALLEST_REST, floored_n * (floored_n.log() - left_n), 0.0)


def bucket_divergence(student_nV: Tensor, teacher: TopLogProbs) -> Tensor:
    """Sum over tokens of `bucket_divergences`: scalar fp32."""
    return bucket_divergences(student_nV, teacher).sum()


def listed_divergences(student_nV: Tensor, teacher: TopLogProbs) -> Tensor:
    """KL divergence of each token between both distributions renormalised over the listed tokens: [n] fp32.

    It is 0 with a gradient of 0 where the student equals the teacher, too, but says nothing of how much either leaves
    to all other tokens.
    """
    wanted_nK = teacher.values_NK.log_softmax(dim=-1)
    got_nK = student_nV.gather(1, teacher.ids_NK).log_softmax(dim=-1)
    return (wanted_nK.exp() * (wanted_nK - got_nK)).sum(dim=-1)


def listed_divergence(student_nV: Tensor, teacher: TopLogProbs) -> Tensor:
    """Sum over tokens of `listed_divergences`: scalar fp32."""
    return listed_divergences(student_nV, teacher).sum()


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
    counts; divided by as many tokens as the cross-entropy. Of a teacher's likeliest tokens alone (`top_k`, or what a
    store has kept) the others count as one, or not at all.
    """

    temperature: float = Field(default=1.0, gt=0, description="softens both distributions; no unit")
    top_k: int | None = Field(
        default=None, ge=1, description="likeliest tokens of the teacher that are told apart; by default all it gives"
    )
    rest: Literal["bucket", "ignored"] = Field(
        default="bucket", description="all other tokens count as one, or both distributions leave them out"
    )

    needs_teacher = True

    def check_partial(self, name: str) -> None:
        """Refuse a bucket at any temperature but 1: the mass of what was not kept is unknown there."""
        if self.temperature != 1 and self.rest == "bucket":
            raise BadConfig(
                f"{name}: temperature {self.temperature:g} needs the teacher's whole distribution",
                hint="set temperature: 1, or let the teacher itself be asked",
            )

    def loss(self, inputs: OutputInputs) -> Tensor:
        """Nats a token."""
        teacher = inputs.batch.teacher
        if teacher is None:
            raise BadConfig("kd needs a teacher", hint="give train() a teacher")

        def term(student_nV: Tensor, positions_n: Tensor) -> Tensor:
            said = teacher.at(positions_n)
            if isinstance(said, TopLogProbs):
                return self._partial(student_nV, said)
            if said.shape[-1] != student_nV.shape[-1]:
                raise BadConfig(
                    f"the teacher has {said.shape[-1]} tokens, the student {student_nV.shape[-1]}",
                    hint="both must know the same token ids",
                )
            if self.top_k is None or self.top_k >= said.shape[-1]:
                return full_divergence(student_nV, said, self.temperature)
            return self._of_listed(student_nV, likeliest(said / self.temperature, self.top_k))

        return inputs.sum_over_tokens(term) / inputs.count

    def _partial(self, student_nV: Tensor, stored: TopLogProbs) -> Tensor:
        """Against what a store has kept: log-probabilities at temperature 1, likeliest first."""
        kept = TopLogProbs(stored.ids_NK[:, : self.top_k], stored.values_NK[:, : self.top_k] / self.temperature)
        return self._of_listed(student_nV, kept)

    def _of_listed(self, student_nV: Tensor, teacher: TopLogProbs) -> Tensor:
        """T^2 times the divergence from tokens listed at this temperature."""
        divergence = bucket_divergence if self.rest == "bucket" else listed_divergence
        return self.temperature**2 * divergence(student_nV / self.temperature, teacher)
