"""The GPTQ of Mixture-Compressor-MoE beside moekit's, by what each does to a matrix's output.

Legend: R rows (outputs) and C columns (inputs) of a matrix, N tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from moekit.compress.maths.feedback import round_with_feedback, upper_factor
from moekit.compress.maths.rounding import round_to_nearest

from . import shared
from .shared import Table

ROWS, COLUMNS, TOKENS, GROUP, DAMP = 64, 256, 2048, 128, 0.01


def compare(table: Table, checkout: Path) -> None:
    """One matrix with correlated inputs, rounded to 2, 3 and 4 bits by each."""
    generator = torch.Generator().manual_seed(0)
    weight_RC = torch.randn(ROWS, COLUMNS, generator=generator) / COLUMNS**0.5
    mix_CC = torch.randn(COLUMNS, COLUMNS, generator=generator)
    decay_C = torch.linspace(0, -4, COLUMNS).exp()
    x_NC = (torch.randn(TOKENS, COLUMNS, generator=generator) * decay_C) @ mix_CC / COLUMNS**0.5
    upper_CC = upper_factor((x_NC.double().T @ x_NC.double()), DAMP)
    assert upper_CC is not None
    bare, stubs = ("utils",), ("texttable", "utils.reconstruct", "utils.mixed_quantizer")
    with (
        shared.importing(checkout, bare=bare, stubs=stubs) as load,
        shared.quiet(),
        shared.on_cpu(),
        patch.object(torch.cuda, "synchronize", lambda: None),
    ):
        module = load("gptq")
        for bits in (2, 3, 4):
            plain = _error(round_to_nearest(weight_RC, bits, GROUP), weight_RC, x_NC)
            ours = _error(round_with_feedback(weight_RC, upper_CC, bits, GROUP), weight_RC, x_NC)
            # Whether errors are passed on inside a block hangs on the width that the class is told.
            told = {flag: _error(_theirs(module, weight_RC, x_NC, bits, flag), weight_RC, x_NC) for flag in (bits, 4)}
            table.tell(
                f"relative error of a matrix's output, GPTQ to {bits} bits in groups of {GROUP}",
                f"{told[bits]:.3f}" + (f"; {told[4]:.3f} where it is made to pass errors on" if bits < 4 else ""),
                f"{ours:.3f} (plain rounding {plain:.3f})",
                "official errs: up to 3 bits, columns of one block pass no errors on"
                if bits < 4
                else "alike (their scale is searched for, moekit's grid spans the range)",
            )


def _error(made_RC: Tensor, weight_RC: Tensor, x_NC: Tensor) -> float:
    return float((x_NC @ (made_RC - weight_RC).T).norm() / (x_NC @ weight_RC.T).norm())


def _theirs(module: Any, weight_RC: Tensor, x_NC: Tensor, bits: int, told: int) -> Tensor:
    layer = nn.Linear(COLUMNS, ROWS, bias=False)
    layer.weight = nn.Parameter(weight_RC.clone(), requires_grad=False)
    gptq = module.GPTQ(layer, None, "one", told)
    gptq.quantizer.configure(bits, perchannel=True, sym=False, mse=False, pack=False)
    gptq.print_loss = lambda q_weight, **given: layer.weight.copy_(q_weight)
    with torch.no_grad():
        gptq.add_batch(x_NC[None], None)
        gptq.fasterquant(percdamp=DAMP, groupsize=GROUP)
    return layer.weight.detach()
