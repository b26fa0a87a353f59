"""Logits of the models that are tried, and when two of them are alike."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moekit.checkpoint.several import run_as_part
from moekit.jobs.trials.cell import WrongResult
from moekit.runtime.answering import telling_its_own_faults

# Logits of order one, in fp32.
RTOL, ATOL = 1e-4, 1e-4


def logits_of(model: PreTrainedModel, *, finite: bool = True, learning: bool = False) -> Tensor:
    """Logits of a short random text, fp32.

    Args:
        model: any that answers token ids with logits.
        finite: refuse others.
        learning: keep what gradients need.

    Raises:
        WrongResult: logits are not finite.
    """
    ids = torch.randint(4, 100, (2, 12), generator=torch.Generator().manual_seed(0))
    further = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    # Some models draw noise.
    torch.manual_seed(0)
    with torch.set_grad_enabled(learning), telling_its_own_faults(model):
        found: Tensor = run_as_part(model)(input_ids=ids, use_cache=False, **further).logits.float()
    if finite and not bool(found.isfinite().all()):
        raise WrongResult("logits are not finite")
    return found


def same(a: Tensor, b: Tensor, name: str, other: str) -> None:
    """Refuse logits that differ by more than rounding.

    Raises:
        WrongResult: says by how much.
    """
    if a.shape != b.shape or not torch.allclose(a, b, rtol=RTOL, atol=ATOL):
        apart = "shapes differ" if a.shape != b.shape else f"{(a - b).abs().max():.3g} apart"
        raise WrongResult(f"logits of the {name} and the {other} model differ: {apart}")
