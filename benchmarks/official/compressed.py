"""Compressed experts (arXiv:2503.00634): the forward of the OLMoE block in yifei-he/Compressed-Experts.

Legend: E experts, H hidden, I width, A auxiliary choices.
"""

from __future__ import annotations

import copy
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moekit.experts.methods.compressed_experts import CompressedExperts
from moekit.runtime import attach

from . import shared
from .shared import EXPERTS, HIDDEN, LAYERS, WIDTH, Table

MISSING = {
    "transformers.pytorch_utils": ["ALL_LAYERNORM_LAYERS"],
    "transformers.utils": [
        *("add_start_docstrings", "add_start_docstrings_to_model_forward", "is_flash_attn_2_available"),
        *("is_flash_attn_greater_or_equal_2_10", "replace_return_docstrings"),
    ],
    "transformers.modeling_outputs": ["MoeCausalLMOutputWithPast", "MoeModelOutputWithPast"],
    "transformers.cache_utils": ["StaticCache"],
}


def run(checkout: Path) -> Table:
    """All comparisons on one checkout."""
    table = Table(f"Compressed experts, Compressed-Experts at {shared.commit(checkout)}")
    stubs = ["modeling.configuration_olmoe"]
    try:
        import transformers.modeling_attn_mask_utils  # noqa: F401
    except ImportError:
        stubs.append("transformers.modeling_attn_mask_utils")
    with shared.importing(checkout, bare=("modeling",), stubs=stubs, missing=MISSING) as load, shared.quiet():
        module = load("modeling.modeling_olmoe")
        for top_k, auxiliary in ((4, 2), (4, 1), (4, 3), (2, 1)):
            _forward(table, module, top_k, auxiliary)
        _start(table, module)
        _none(table, module)
        _wide(table, module)
        _vanishing(table, module)
    return table


def _official(module: Any, stock: Any, top_k: int, auxiliary: int, normal: bool, vectors: dict[str, Tensor]) -> Any:
    config = types.SimpleNamespace(
        **{"num_experts": EXPERTS, "num_experts_per_tok": top_k, "n_ce": auxiliary, "norm_topk_prob": normal},
        **{"hidden_size": HIDDEN, "intermediate_size": WIDTH, "hidden_act": "silu"},
    )
    block = module.OlmoeSparseCompressedMoeBlock(config)
    with torch.no_grad():
        block.gate.weight.copy_(stock.gate.weight)
        for e, expert in enumerate(block.experts):
            gate, up = stock.experts.gate_up_proj[e].chunk(2)
            expert.gate_proj.weight.copy_(gate)
            expert.up_proj.weight.copy_(up)
            expert.down_proj.weight.copy_(stock.experts.down_proj[e])
            if vectors:
                block.ces[e, 0], block.ces[e, 2] = 1 + vectors["gate"][e], 1 + vectors["up"][e]
                block.ces[e, 1, :WIDTH] = 1 + vectors["inner"][e]
    return block


def _pair(module: Any, top_k: int, auxiliary: int, normal: bool, *, learned: bool, renormalize: str) -> tuple[Any, Any]:
    model = shared.tiny("olmoe", num_experts_per_tok=top_k, norm_topk_prob=normal)
    generator = torch.Generator().manual_seed(7)
    sizes = {"gate": HIDDEN, "inner": WIDTH, "up": HIDDEN}
    vectors = {k: 0.3 * torch.randn(EXPERTS, n, generator=generator) for k, n in sizes.items()} if learned else {}
    official = [
        _official(module, layer.mlp, top_k, auxiliary, normal, vectors) for layer in copy.deepcopy(model).model.layers
    ]
    attach(model, CompressedExperts(main=top_k - auxiliary, renormalize=renormalize))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for key, value in vectors.items():
                if name.endswith(f".{key}") and parameter.shape == value.shape:
                    parameter.copy_(value)
    return model, official


def _outputs(model: Any, official: Any) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, 24, HIDDEN, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        theirs = torch.stack([block(x)[0] for block in official])
        ours = torch.stack([layer.mlp(x).reshape(x.shape) for layer in model.model.layers])
    return theirs, ours


def _forward(table: Table, module: Any, top_k: int, auxiliary: int) -> None:
    for normal in (False, True):
        made = _pair(module, top_k, auxiliary, normal, learned=True, renormalize="topk")
        theirs, ours = _outputs(*made)
        told = "normalised" if normal else "plain"
        table.close(
            f"output of {LAYERS} blocks, {auxiliary} of {top_k} choices auxiliary, {told} weights", theirs, ours
        )


def _start(table: Table, module: Any) -> None:
    """Before training, where weights are normalised: their layer is not the one with fewer choices."""
    theirs, ours = _outputs(*_pair(module, 4, 2, True, learned=False, renormalize="main"))
    plain = shared.tiny("olmoe", num_experts_per_tok=2, norm_topk_prob=True)
    x = torch.randn(2, 24, HIDDEN, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        stock = torch.stack([layer.mlp(x).reshape(x.shape) for layer in plain.model.layers])
    far = [float((one - stock).norm() / stock.norm()) for one in (theirs, ours)]
    table.tell(
        "distance at the start from the stock block with 2 choices, normalised weights",
        f"{far[0]:.2f}",
        f"{far[1]:.1e} (`renormalize=main`, the default)",
        "moekit differs on purpose: main choices get the weight of all; `topk` is theirs",
    )


def _none(table: Table, module: Any) -> None:
    model = shared.tiny("olmoe")
    stock = copy.deepcopy(model)
    attach(model, CompressedExperts(main=2))
    x = torch.randn(2, 24, HIDDEN, generator=torch.Generator().manual_seed(3))
    layer = stock.model.layers[0].mlp
    with torch.no_grad():
        apart = float((model.model.layers[0].mlp(x).reshape(x.shape) - layer(x).reshape(x.shape)).abs().max())
    block = _official(module, layer, 2, 0, False, {})
    table.tell(
        "no auxiliary choice (n_ce = 0)",
        _tried(block, x),
        f"{apart:.1g} from the stock block",
        "moekit takes it; theirs needs one at least (a slice from -0 takes all)",
    )


def _tried(block: Any, x: Tensor) -> str:
    try:
        with torch.no_grad():
            block(x)
    except (RuntimeError, IndexError) as error:
        return type(error).__name__
    return "runs"


def _wide(table: Table, module: Any) -> None:
    width = HIDDEN + 8
    model = shared.tiny("olmoe", intermediate_size=width)
    config = types.SimpleNamespace(
        **{"num_experts": EXPERTS, "num_experts_per_tok": 2, "n_ce": 1, "norm_topk_prob": False},
        **{"hidden_size": HIDDEN, "intermediate_size": width, "hidden_act": "silu"},
    )
    attach(model, CompressedExperts(main=1))
    x = torch.randn(1, 3, HIDDEN, generator=torch.Generator().manual_seed(3))
    table.tell(
        "experts wider than the hidden size (I > H)",
        _tried(module.OlmoeSparseCompressedMoeBlock(config), x),
        _tried(model.model.layers[0].mlp, x),
        "moekit takes it; theirs cuts the middle vector out of H numbers",
    )


def _vanishing(table: Table, module: Any) -> None:
    """Auxiliary weights below what the type holds: 0 / 0."""
    model, official = _pair(module, 2, 1, False, learned=True, renormalize="topk")
    x = torch.zeros(1, 1, HIDDEN)
    x[..., 0] = 1
    with torch.no_grad():
        block, ours = official[0], model.model.layers[0].mlp
        for gate in (block.gate.weight, ours.gate.weight):
            gate.zero_()
            gate[0, 0] = 200.0
        told = (bool(block(x)[0].isfinite().all()), bool(ours(x).isfinite().all()))
    one, two = ("finite" if good else "NaN" for good in told)
    verdict = "official errs: divides 0 by 0; moekit bounds it"
    table.tell("auxiliary weights that underflow (router margin 200)", one, two, verdict)
