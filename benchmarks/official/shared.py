"""What all comparisons share: the table, tiny models in both layouts, and imports out of somebody's checkout.

Legend: N tokens, E experts, I width, H hidden.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import subprocess
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, PreTrainedModel, Qwen3MoeConfig

from moekit.checkpoint.folder import Checkpoint
from moekit.compress.budget.sizes import Budget
from moekit.compress.engine.live import change_model
from moekit.compress.engine.measuring import geometries_of
from moekit.compress.engine.plan import WeightPlan
from moekit.compress.engine.planning import inputs_of, plan_weights
from moekit.compress.engine.request import CalibrationText, PlanRequest
from moekit.compress.engine.rewriting import rewriter
from moekit.compress.weights import LayerWeights
from moekit.trace.streamed import Streamed

VOCAB, HIDDEN, WIDTH, EXPERTS, LAYERS = 96, 32, 24, 8, 3
CLOSE = 1e-5


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        quantity: what was computed.
        official: what their code gave, in words.
        moekit: what moekit gave.
        verdict: "agrees", or how the two differ and who is right.
    """

    quantity: str
    official: str
    moekit: str
    verdict: str


@dataclass
class Table:
    """The rows of one repository."""

    title: str
    rows: list[Row] = field(default_factory=list)

    def close(self, quantity: str, official: Tensor, ours: Tensor, bound: float = CLOSE) -> None:
        """Two tensors that should be the same but for rounding."""
        apart = float((official.double() - ours.double()).abs().max())
        size = float(official.double().abs().max())
        verdict = "agrees" if apart <= bound * max(size, 1.0) else "DIFFERS"
        self.rows.append(Row(quantity, f"max {size:.4g}", f"max difference {apart:.1e}", verdict))

    def same(self, quantity: str, official: Sequence[object], ours: Sequence[object]) -> None:
        """Two lists of decisions that should be equal, item by item."""
        equal = sum(a == b for a, b in zip(official, ours, strict=True))
        verdict = "agrees" if equal == len(official) else "DIFFERS"
        self.rows.append(Row(quantity, f"{len(official)} decisions", f"{equal} of {len(official)} equal", verdict))

    def tell(self, quantity: str, official: object, ours: object, verdict: str) -> None:
        """Figures that differ on purpose."""
        self.rows.append(Row(quantity, str(official), str(ours), verdict))

    def failed(self) -> bool:
        """Whether a row disagrees that should not."""
        return any(row.verdict == "DIFFERS" for row in self.rows)

    def text(self) -> str:
        """As markdown."""
        lines = [f"## {self.title}", "", "| quantity | official | moekit | verdict |", "|---|---|---|---|"]
        lines += [f"| {r.quantity} | {r.official} | {r.moekit} | {r.verdict} |" for r in self.rows]
        return "\n".join(lines)


def commit(checkout: Path) -> str:
    """The commit that a checkout stands at, or "unknown" where it is no repository."""
    done = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


@contextlib.contextmanager
def importing(
    root: Path, bare: Sequence[str] = (), stubs: Sequence[str] = (), missing: Mapping[str, Sequence[str]] | None = None
) -> Iterator[Callable[[str], ModuleType]]:
    """Import modules out of a checkout, which are gone again afterwards.

    Args:
        root: folder that module names start from.
        bare: packages whose `__init__` is left out: it would pull in what has nothing to do with the function.
        stubs: modules that stand empty, any name in them an empty class.
        missing: module -> names that this transformers no longer has, put there as empty classes meanwhile.
    """
    before, own = dict(sys.modules), (*bare, *stubs)
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(sys, "path", [str(root), *sys.path]))
        stack.enter_context(patch.object(sys, "dont_write_bytecode", True))
        for name in bare:
            package = types.ModuleType(name)
            package.__path__ = [str(root / name.replace(".", "/"))]
            sys.modules[name] = package
        for name in stubs:
            sys.modules[name] = _empty(name)
        for name, attributes in (missing or {}).items():
            module = importlib.import_module(name)
            for attribute in attributes:
                if not hasattr(module, attribute):
                    stack.enter_context(patch.object(module, attribute, _nothing(attribute), create=True))
        try:
            yield importlib.import_module
        finally:
            for name in set(sys.modules) - set(before):
                path = getattr(sys.modules[name], "__file__", None) or ""
                if name in own or path.startswith(str(root)):
                    del sys.modules[name]
            sys.modules.update({name: before[name] for name in own if name in before})


def by_path(path: Path) -> ModuleType:
    """A script whose name is no module's."""
    spec = importlib.util.spec_from_file_location(path.stem.replace("-", "_"), path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with patch.object(sys, "dont_write_bytecode", True):
        spec.loader.exec_module(module)
    return module


def _nothing(name: str) -> Any:
    if name[0].isupper():
        return type(name, (), {})
    if name.startswith("is_"):
        return lambda *args: False

    def decorator(*args: Any, **given: Any) -> Any:
        """What it is put on, with or without arguments."""
        return args[0] if len(args) == 1 and callable(args[0]) else lambda function: function

    return decorator


def _empty(name: str) -> ModuleType:
    class Empty(types.ModuleType):
        __path__: list[str] = []  # noqa: RUF012

        def __getattr__(self, attribute: str) -> Any:
            if attribute.startswith("__"):
                raise AttributeError(attribute)
            return _nothing(attribute)

    return Empty(name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing that somebody's code prints."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Code that calls .cuda() stays on the CPU."""
    with (
        patch.object(Tensor, "cuda", lambda self, *a, **k: self),
        patch.object(nn.Module, "cuda", lambda self, *a, **k: self),
        patch.object(torch.cuda, "current_device", lambda: "cpu"),
        patch.object(torch.cuda, "empty_cache", lambda: None),
        patch.object(torch.cuda, "max_memory_reserved", lambda *a: 0),
    ):
        yield


def tiny(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny random fp32 model: "mixtral", "olmoe" or "qwen3_moe"."""
    common = {
        **{"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": 4},
        **{"num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 128, "use_cache": False},
        **{"pad_token_id": 0, "intermediate_size": WIDTH},
    }
    config: Any = {
        "mixtral": lambda: MixtralConfig(
            **common | {"intermediate_size": WIDTH, "num_local_experts": EXPERTS} | overrides
        ),
        "olmoe": lambda: OlmoeConfig(**common | {"num_experts": EXPERTS, "eos_token_id": 1} | overrides),
        "qwen3_moe": lambda: Qwen3MoeConfig(
            **common | {"moe_intermediate_size": WIDTH, "num_experts": EXPERTS, "head_dim": 8} | overrides
        ),
    }[family]()
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise / tensor.shape[-1] ** 0.5 if tensor.dim() > 1 else 1 + 0.1 * noise)
    return model.eval()


def tokens(rows: int = 4, length: int = 32, seed: int = 0) -> Tensor:
    """Random token ids."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


class LegacyExpert(nn.Module):
    """One expert as a module of three linear layers, as transformers had them before version 5."""

    def __init__(self, gate_IH: Tensor, up_IH: Tensor, down_HI: Tensor, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        for name, matrix in zip(names, (gate_IH, up_IH, down_HI), strict=True):
            linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
            linear.weight = nn.Parameter(matrix.detach().clone())
            setattr(self, name, linear)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """Of tokens, one a row."""
        gate, up, down = (getattr(self, name) for name in self.names)
        out: Tensor = down(self.act_fn(gate(x)) * up(x))
        return out


class LegacyBlock(nn.Module):
    """A block as transformers had it before version 5: a linear gate, and a list of experts."""

    def __init__(self, block: Any, names: Sequence[str], renormalise: bool) -> None:
        super().__init__()
        both, down = block.experts.gate_up_proj, block.experts.down_proj
        width = both.shape[1] // 2
        self.gate = nn.Linear(both.shape[2], len(both), bias=False)
        self.gate.weight = nn.Parameter(block.gate.weight.detach().clone())
        made = [LegacyExpert(both[e, :width], both[e, width:], down[e], names) for e in range(len(both))]
        self.experts = nn.ModuleList(made)
        self.top_k, self.num_experts, self.renormalise = block.gate.top_k, len(both), renormalise
        self.logits: list[Tensor] = []

    def forward(self, hidden: Tensor) -> Tensor:
        """As decoder layers of transformers 5 call it; the router's logits stay in `logits`."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        logits = self.gate(flat)
        self.logits.append(logits.detach())
        weights, chosen = logits.softmax(-1).topk(self.top_k, -1)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            rows, place = (chosen == e).nonzero(as_tuple=True)
            if len(rows):
                out = out.index_add(0, rows, expert(flat[rows]) * weights[rows, place, None])
        return out.reshape(hidden.shape)


class Legacy(nn.Module):
    """A model whose blocks are of the old kind, which their code walks through, on the same weights.

    Args:
        model: in the layout of transformers 5; stays as it is otherwise, its blocks are replaced.
        names: of an expert's gate, up and down projection.
        attribute: further name of the block in its layer.
    """

    def __init__(self, model: PreTrainedModel, names: Sequence[str], attribute: str = "") -> None:
        super().__init__()
        self.inner, self.config = model, model.config
        renormalise = bool(getattr(model.config, "norm_topk_prob", True))
        for layer in self.layers():
            layer.mlp = LegacyBlock(layer.mlp, names, renormalise)
            if attribute:
                setattr(layer, attribute, layer.mlp)

    @property
    def model(self) -> Any:
        """What their code takes layers from."""
        return self.inner.model

    def layers(self) -> list[Any]:
        """Decoder layers."""
        return list(self.inner.model.layers)

    def forward(self, output_router_logits: bool = False, **batch: Any) -> Any:
        """Logits, and those of every router, one after the other."""
        for layer in self.layers():
            layer.mlp.logits.clear()
        out = self.inner(**batch, use_cache=False)
        told = tuple(torch.cat(layer.mlp.logits) for layer in self.layers())
        return types.SimpleNamespace(logits=out.logits, router_logits=told)


def fill(block: Any, weights: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    """Write experts (gate, up, down) into a block of transformers 5."""
    with torch.no_grad():
        for e, (gate_IH, up_IH, down_HI) in enumerate(weights):
            block.experts.gate_up_proj[e].copy_(torch.cat([gate_IH, up_IH]))
            block.experts.down_proj[e].copy_(down_HI)


def save(model: PreTrainedModel, folder: Path) -> Checkpoint:
    """Written by stock transformers, and opened."""
    model.save_pretrained(folder)
    return Checkpoint.open(folder)


def plan(checkpoint: Checkpoint, batches: Iterable[Any], method: Any, keep: float, **budget: Any) -> WeightPlan:
    """What a method of moekit decides on these tokens."""
    return plan_weights(checkpoint, CalibrationText(list(batches)), PlanRequest(method, Budget(keep=keep, **budget)))


def changed(model: PreTrainedModel, made: WeightPlan, checkpoint: Checkpoint) -> PreTrainedModel:
    """The model as a plan makes it, in memory."""
    return change_model(model, made.outcomes, rewriter(made, checkpoint))


def seen(checkpoint: Checkpoint, batches: Iterable[Any], method: Any) -> Any:
    """Decoder layer -> what the method looks at, of the model as it is."""
    with Streamed(checkpoint, list(batches), statistics=method.required) as streamed:
        streamed.run()
        trace = streamed.trace()
    request = PlanRequest(method, Budget(keep=1.0))
    return inputs_of(checkpoint, request, geometries_of(checkpoint), trace.require(method.required))


def layer_weights(experts: int, width: int, hidden: int, seed: int, dtype: torch.dtype = torch.float32) -> LayerWeights:
    """Random experts with a router, as moekit holds them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return LayerWeights(
        up_EIH=draw(experts, width, hidden),
        down_EHI=draw(experts, hidden, width),
        gate_EIH=draw(experts, width, hidden),
        router={"weight": draw(experts, hidden)},
    )


def partition(labels: Sequence[int]) -> frozenset[frozenset[int]]:
    """Groups of equal labels, without their numbers."""
    return frozenset(frozenset(i for i, other in enumerate(labels) if other == one) for one in set(labels))


def groups_of(outcome: Any) -> frozenset[frozenset[int]]:
    """Groups of a plan's layer."""
    return frozenset(frozenset(members) for members in outcome.sources)
