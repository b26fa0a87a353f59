"""DeepSpeed's MoE layer, where it is installed (`pip install deepspeed`): even all-to-alls of zero-padded rows.

With a capacity (`cf=1`) choices beyond it are dropped; `no-drop` pads every expert to the largest count anywhere.
Its gate is given the choices instead of making them, as logits whose softmax is the router weights.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import os
from typing import Any

import torch
from torch import Tensor, nn

from moekit.bench.dispatch.competitors.base import Material, Peer
from moekit.bench.dispatch.setting import DispatchBenchSetting, Entry
from moekit.bench.dispatch.workload import fill


class _OneExpert(nn.Module):
    """One expert in the form that DeepSpeed calls: rows in, rows out, for chunks of any shape."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, chunk: Tensor) -> Tensor:
        rows_PH = chunk.reshape(-1, chunk.shape[-1])
        ids_P1 = torch.zeros(len(rows_PH), 1, dtype=torch.int64, device=chunk.device)
        out: Tensor = self.module(rows_PH, ids_P1, torch.ones_like(ids_P1, dtype=chunk.dtype))
        return out.view(chunk.shape)


class DeepSpeed(Peer):
    """`deepspeed.moe.layer.MoE` with one module for each expert."""

    gives_weight_gradient = False

    @classmethod
    def variants(cls) -> tuple[str, ...]:
        """Ways it knows."""
        return ("cf=1", "no-drop")

    @classmethod
    def why_not(cls, setting: DispatchBenchSetting, entry: Entry) -> str | None:
        """See the base class."""
        if importlib.util.find_spec("deepspeed") is None:
            return "not installed (pip install deepspeed)"
        if setting.experts % setting.ranks:
            return f"{setting.experts} experts cannot be dealt evenly to {setting.ranks} ranks"
        return "it knows contiguous blocks only" if entry.placement else None

    def __init__(self, material: Material) -> None:
        """See the base class."""
        setting = material.setting
        owned = material.layout.owned(material.ranks.rank).tolist()
        # It announces itself on stdout, group by group.
        with contextlib.redirect_stdout(io.StringIO()):
            modules = _start()
            layer = modules["layer"].MoE(
                setting.hidden,
                nn.Identity(),
                num_experts=setting.experts,
                ep_size=setting.ranks,
                k=setting.top_k,
                capacity_factor=1.0,
                drop_tokens=material.entry.variant != "no-drop",
                use_rts=False,
                top2_2nd_expert_sampling=False,
            )
            layer.set_deepspeed_parallelism()
        layer.deepspeed_moe.experts.deepspeed_experts = nn.ModuleList(
            [_OneExpert(fill(material.module, material.tensors, torch.tensor([e]), setting.experts)) for e in owned]
        )
        self._names = list(material.tensors)
        self._gate = layer.deepspeed_moe.gate
        self._gating = modules["gating"]
        self._layer = layer.train()
        self._experts, self._top_k = setting.experts, setting.top_k
        self._logits_NE: Tensor | None = None
        # Ask for gating with our logits: its own come from a linear layer.
        self._gate.forward = self._given_gate

    def _given_gate(self, x_NH: Tensor, used: Tensor | None = None, sparse: bool = False, tutel: bool = False) -> Any:
        gate, logits_NE = self._gate, self._logits_NE
        common = (gate.capacity_factor, gate.min_capacity)
        if self._top_k == 1:
            return self._gating.top1gating(
                logits_NE, *common, used, None, gate.drop_tokens, gate.use_rts, gate.ep_group, sparse, tutel
            )
        if self._top_k == 2:
            return self._gating.top2gating(logits_NE, *common, gate.drop_tokens, gate.ep_group, False, sparse)
        return self._gating.topkgating(
            logits_NE, self._top_k, *common, gate.drop_tokens, gate.ep_group, sparse_routes=sparse
        )

    def __call__(self, x_NH: Tensor, indices_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """See the base class."""
        logits_NE = x_NH.new_full((len(x_NH), self._experts + 1), float("-inf"))
        self._logits_NE = logits_NE.scatter(1, indices_NK, weights_NK.log())[:, :-1]
        y_NH: Tensor = self._layer(x_NH)[0]
        return y_NH

    def gradients(self) -> dict[str, Tensor]:
        """See the base class."""
        found: dict[str, Tensor] = {}
        for name in self._names:
            parts = [getattr(expert.module, name) for expert in self._layer.deepspeed_moe.experts.deepspeed_experts]
            if isinstance(parts[0], nn.Parameter):
                found[name] = torch.cat([p.grad if p.grad is not None else torch.zeros_like(p) for p in parts])
        return found

    def clear(self) -> None:
        """See the base class."""
        self._layer.zero_grad(set_to_none=True)


def _start() -> dict[str, Any]:
    """Import it for the CPU and join it to the process group that is there already."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed = importlib.import_module("deepspeed")
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("gloo", verbose=False, auto_mpi_discovery=False)
    return {
        "layer": importlib.import_module("deepspeed.moe.layer"),
        "gating": importlib.import_module("deepspeed.moe.sharded_moe"),
    }


PEER = DeepSpeed
