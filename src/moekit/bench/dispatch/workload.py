"""Weights, tokens and choices, made once and the same for all, and what one process makes of them.

Everything is written to a folder that the ranks read: tensors as safetensors, the experts' class as a config.

Legend: R ranks, T tokens of a rank, H hidden size, E experts, K choices, N = R * T.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, Qwen3MoeConfig

from moekit.anatomy.probe import decoder_index, is_experts
from moekit.bench.dispatch.setting import DispatchBenchSetting
from moekit.errors import BadData

JOB, TENSORS, EXPERTS, REFERENCE, CONFIG = (
    "job.json",
    "tokens.safetensors",
    "experts.safetensors",
    "ref.safetensors",
    "m",
)
# Added to a hot expert's score, whose noise is Gumbel: nearly nine tokens of ten choose each.
HOT_SCORE = 2.5

Choices = tuple[Tensor, Tensor]


@dataclass(eq=False)
class Workload:
    """What is computed.

    Attributes:
        setting: sizes.
        config: of a model whose experts are of the class that is run.
        layers: decoder layers taken.
        experts: layer -> name -> whole stacked tensor, fp32.
        choices: routing -> layer -> indices [N, K] and weights [N, K]; weights of a token sum to one.
        hidden: layer -> hidden states [N, H].
    """

    setting: DispatchBenchSetting
    config: PreTrainedConfig
    layers: tuple[int, ...]
    experts: dict[int, dict[str, Tensor]]
    choices: dict[str, dict[int, Choices]]
    hidden: dict[int, Tensor] = field(default_factory=dict)

    def draw_hidden(self) -> None:
        """Normal hidden states for all layers."""
        generator = torch.Generator().manual_seed(self.setting.seed + 1)
        tokens = self.setting.ranks * self.setting.tokens
        self.hidden = {layer: torch.randn(tokens, self.setting.hidden, generator=generator) for layer in self.layers}

    def gradient(self, layer: int) -> Tensor:
        """What comes back into a layer's output: [N, H]."""
        generator = torch.Generator().manual_seed(self.setting.seed + 1000 + layer)
        return torch.randn(self.hidden[layer].shape, generator=generator)


def make_layer(setting: DispatchBenchSetting) -> Workload:
    """One layer of SwiGLU experts with random weights."""
    config = Qwen3MoeConfig(
        vocab_size=8,
        hidden_size=setting.hidden,
        intermediate_size=setting.width,
        moe_intermediate_size=setting.width,
        num_experts=setting.experts,
        num_experts_per_tok=setting.top_k,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
    )
    generator = torch.Generator().manual_seed(setting.seed)
    (module,) = empty_experts(config).values()
    experts = {
        name: torch.randn(tensor.shape, generator=generator) * tensor.shape[-1] ** -0.5
        for name, tensor in module.named_parameters()
    }
    work = Workload(setting, config, (0,), {0: experts}, {"": {0: draw_choices(setting, 0)}})
    work.draw_hidden()
    return work


def draw_choices(setting: DispatchBenchSetting, layer: int) -> Choices:
    """Distinct experts drawn by noisy scores, and the softmax of other scores as weights."""
    generator = torch.Generator().manual_seed(setting.seed * 1009 + layer + 7)
    tokens = setting.ranks * setting.tokens
    uniform_NE = torch.rand(tokens, setting.experts, generator=generator).clamp(1e-9, 1 - 1e-7)
    score_NE = -(-uniform_NE.log()).log()
    if setting.routing == "skewed":
        score_NE[:, : setting.hot] += HOT_SCORE
    indices_NK = score_NE.topk(setting.top_k, dim=1).indices
    return indices_NK, torch.randn(indices_NK.shape, generator=generator).softmax(1)


def normalise(indices_NK: Tensor, weights_NK: Tensor | None, experts: int) -> Choices:
    """Choices as int64 with weights that sum to one; equal weights where none are known; 0 for no expert."""
    valid_NK = indices_NK < experts
    weights = torch.ones(indices_NK.shape) if weights_NK is None else weights_NK.float()
    weights = weights * valid_NK
    return indices_NK.long(), weights / weights.sum(1, keepdim=True).clamp(min=1e-12)


def empty_experts(config: PreTrainedConfig, *, eager: bool = False) -> dict[int, Any]:
    """The experts modules of a model of this config, layer by layer, without weights."""
    config = copy.deepcopy(config)
    options = {"experts_implementation": "eager"} if eager else {}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
    return {decoder_index(name): module for name, module in model.named_modules() if is_experts(module)}


def read_config(folder: Path) -> PreTrainedConfig:
    """The config that `write` wrote."""
    config = AutoConfig.from_pretrained(folder / CONFIG)
    assert isinstance(config, PreTrainedConfig)
    return config


def fill(module: nn.Module, tensors: Mapping[str, Tensor], owned: Tensor, total: int) -> Any:
    """A copy of an experts module that holds some of the experts.

    Args:
        module: from `empty_experts`.
        tensors: whole tensors by name.
        owned: expert ids to hold, in order.
        total: E.
    """
    filled: Any = copy.deepcopy(module)
    for name, whole in tensors.items():
        stacked = whole.dim() > 0 and whole.shape[0] == total
        part = whole.index_select(0, owned) if stacked else whole.clone()
        if name in filled._parameters:
            filled._parameters[name] = nn.Parameter(part)
        else:
            filled._buffers[name] = part
    filled.num_experts = len(owned)
    filled._is_expert_parallel = len(owned) < total
    return filled


def write(work: Workload, folder: Path) -> None:
    """Write what the ranks read, and the reference."""
    work.config.save_pretrained(folder / CONFIG)
    flat = {f"{layer}.{name}": t.contiguous() for layer, named in work.experts.items() for name, t in named.items()}
    save_file(flat, folder / EXPERTS)
    tokens = {f"x.{layer}": values for layer, values in work.hidden.items()}
    tokens |= {f"grad.{layer}": work.gradient(layer) for layer in work.layers}
    for routing, by_layer in work.choices.items():
        for layer, (indices_NK, weights_NK) in by_layer.items():
            tokens[f"indices.{routing}.{layer}"] = indices_NK.contiguous()
            tokens[f"weights.{routing}.{layer}"] = weights_NK.contiguous()
    save_file(tokens, folder / TENSORS)
    save_file(reference(work), folder / REFERENCE)


def reference(work: Workload) -> dict[str, Tensor]:
    """Outputs and gradients of one process in fp32, all tokens at once, expert by expert.

    Returns:
        `routing.layer.y`, `.x` and `.weights` (gradients), and the gradient of each stacked tensor by its name.
    """
    modules = empty_experts(work.config, eager=True)
    answers: dict[str, Tensor] = {}
    every = torch.arange(work.setting.experts)
    for routing, by_layer in work.choices.items():
        for layer, (indices_NK, weights_NK) in by_layer.items():
            module = fill(modules[layer], work.experts[layer], every, work.setting.experts)
            module._is_expert_parallel = True
            x_NH = work.hidden[layer].clone().requires_grad_()
            gates_NK = weights_NK.clone().requires_grad_()
            y_NH = module(x_NH, indices_NK, gates_NK)
            y_NH.backward(work.gradient(layer))
            if not torch.isfinite(y_NH).all():
                raise BadData("the reference is not finite", layer=layer)
            found = {"y": y_NH.detach(), "x": x_NH.grad, "weights": gates_NK.grad}
            found |= {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
            answers |= {f"{routing}.{layer}.{name}": t.contiguous() for name, t in found.items() if t is not None}
    return answers


def spread(layers: Sequence[int], count: int) -> tuple[int, ...]:
    """So many layers, evenly spaced."""
    count = min(count, len(layers))
    return tuple(layers[(2 * number + 1) * len(layers) // (2 * count)] for number in range(count))
