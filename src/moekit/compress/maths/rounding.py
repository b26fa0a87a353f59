"""Round weights to few bits and back: what a quantized model computes with, without its packing.

Legend: R rows (outputs) and C columns (inputs) of a matrix, G groups of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def round_to_nearest(matrix_RC: Tensor, bits: int, group: int) -> Tensor:
    """Each group of consecutive inputs on 2^bits evenly spaced values between its smallest and largest weight.

    W' = s round((W - min) / s) + min, s = (max - min) / (2^bits - 1), worked in fp32. From 16 bits on weights stay.

    Args:
        matrix_RC: finite weights.
        bits: of a weight.
        group: inputs that share scale and offset; the last group of a row may be shorter.
    """
    if bits >= 16:
        return matrix_RC.clone()
    made_RC = torch.empty_like(matrix_RC)
    for start in range(0, matrix_RC.shape[-1], group):
        part = matrix_RC[:, start : start + group].float()
        low, high = part.amin(-1, keepdim=True), part.amax(-1, keepdim=True)
        scale = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(torch.float32).tiny)
        made_RC[:, start : start + group] = (((part - low) / scale).round() * scale + low).to(matrix_RC.dtype)
    return made_RC
