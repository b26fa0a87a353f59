"""How long a recipe will take on this machine: operations counted from configs and tokens, over a rate just measured.

The rate is what products of the model's shapes reach within a second in the precision that the device calls for; a
whole model reaches `EFFICIENCY` of it. An estimate: it knows the machine as it is now, not what else will run on it.

Legend: E experts, K choices a token, H hidden, I expert width, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit.checkpoint.estimate import READ_BYTES_PER_SECOND
from moekit.jobs.estimates import ByteSizes

if TYPE_CHECKING:
    import torch

# What attention, norms, routing and small products leave of the rate of large ones (training on a CPU with AVX2).
EFFICIENCY = 0.5
# Bytes of text to a token, as English comes out with vocabularies of 30,000 to 150,000.
BYTES_PER_TOKEN = 4.0
# Interpreter, libraries, opening files: what each step takes whatever its size.
STEP_SECONDS = 1.5
_QUESTIONS, _CHOICES, _CHOICE_TOKENS = 200, 4, 24


@dataclass(frozen=True)
class Shape:
    """What a token passes through, in weights.

    Attributes:
        hidden: H.
        layers: decoder layers.
        blocks: weights of all decoder layers that one token uses.
        head: V x H.
        experts: those of `blocks` that are routed experts.
        first: lowest layer with experts.
        half: whether weights are stored in 16 bits.
    """

    hidden: int
    layers: int
    blocks: float
    head: float
    experts: float = 0.0
    first: int = 0
    half: bool = False

    @property
    def forward(self) -> float:
        """Operations of one token's forward pass."""
        return 2 * (self.blocks + self.head)

    def backward(self, parts: tuple[str, ...]) -> float:
        """Operations of one token's backward pass: gradients of activations from the top down to what trains."""
        if "all" in parts:
            return 2 * self.forward
        above = self.blocks * (self.layers - self.first) / self.layers + self.head
        return 2 * (above + self.experts)


def shape_of(config: Mapping[str, Any]) -> Shape | None:
    """The shape of a model, from its parsed config; None where that does not say."""
    from moekit.checkpoint.names import config_top_k, stated_experts, text_config

    inner = text_config(config)
    try:
        hidden, layers, heads = (int(inner[n]) for n in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
        vocabulary = int(inner["vocab_size"])
    except (KeyError, TypeError, ValueError):
        return None
    kv = inner.get("num_key_value_heads") or heads
    size = inner.get("head_dim") or hidden // heads
    attention = hidden * size * 2 * (heads + kv)
    wide = inner.get("intermediate_size") or 4 * hidden
    width = inner.get("moe_intermediate_size") or wide
    experts, top_k = stated_experts(config), config_top_k(config)
    dense = int(inner.get("first_k_dense_replace") or 0)
    only = inner.get("mlp_only_layers") or ()
    moe = [i for i in range(dense, layers) if i not in only] if experts and top_k else []
    shared = inner.get("shared_expert_intermediate_size") or (inner.get("n_shared_experts") or 0) * width
    routed = len(moe) * (top_k or 0) * 3 * hidden * width
    blocks = layers * attention + (layers - len(moe)) * 3 * hidden * wide + len(moe) * 3 * hidden * shared + routed
    half = str(config.get("dtype") or config.get("torch_dtype")) in ("bfloat16", "float16")
    return Shape(hidden, layers, float(blocks), float(vocabulary * hidden), float(routed), min(moe, default=0), half)


class MachineSpeed:
    """Rates of this machine, each measured when it is first asked for."""

    def __init__(self, device: str = "auto", seconds: float = 0.5) -> None:
        from moekit._device import resolve_device

        self.device, self._seconds = resolve_device(device), seconds
        self._known: dict[tuple[int, torch.dtype], float] = {}

    def rate(self, hidden: int, dtype: torch.dtype) -> float:
        """Operations a second of products [256, H] x [H, 4H], after a warm-up."""
        import torch

        key = (hidden, dtype)
        if key not in self._known:
            left, right = (torch.randn(*s, device=self.device).to(dtype) for s in ((256, hidden), (hidden, 4 * hidden)))
            left @ right
            self._wait()
            count, start = 0, time.perf_counter()
            while time.perf_counter() - start < self._seconds:
                left @ right
                self._wait()
                count += 1
            self._known[key] = count * 2 * left.numel() * right.shape[1] / (time.perf_counter() - start)
        return self._known[key]

    def _wait(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, shape: Shape, flops: float, dtype: torch.dtype) -> float:
        """Time of so many operations of a model."""
        return flops / (EFFICIENCY * self.rate(shape.hidden, dtype))


def durations(
    steps: Mapping[str, Any], sizes: ByteSizes, machine: MachineSpeed | None = None
) -> dict[str, float | None]:
    """Seconds of each step; None where nothing says how large its model is, or how much of it the step uses.

    Args:
        steps: output folder -> step, in order, with folders in the place of references.
        sizes: bytes of what is there or will be.
        machine: whose rates count; this one by default.
    """
    import torch

    from moekit._device import multiplies

    machine = machine or MachineSpeed()
    fast = torch.bfloat16 if multiplies(torch.bfloat16, machine.device) else torch.float32
    shapes: dict[str, Shape | None] = {}
    found: dict[str, float | None] = {}
    for folder, step in steps.items():
        source = _source(step)
        shape = _known_shape(str(source), shapes) if source else None
        shapes[folder] = _made(step, shape)
        if step.use == "data":
            parts = {"train": step.train_bytes, "profile": step.profile_bytes, "heldout": step.heldout_bytes}
            sizes.expected.update({f"{folder}/{part}.jsonl": n for part, n in parts.items() if n is not None})
        count = _OPERATIONS.get(step.use)
        if step.use in _QUICK:
            found[folder] = STEP_SECONDS
        elif count is None or shape is None:
            found[folder] = None
        else:
            dtype = fast if step.use == "train" or shape.half else torch.float32
            moved = 2 * (sizes.of(Path(str(source)).expanduser()) or 0) / READ_BYTES_PER_SECOND
            found[folder] = STEP_SECONDS + moved + machine.seconds(shape, count(step, shape, sizes), dtype)
    return found


def _source(step: Any) -> str | None:
    """What tells a step's model: the model itself, or the plan that was made of it."""
    names = (getattr(step, name, None) for name in ("model", "source", "plan", "from_plan"))
    return next((name for name in names if name), None)


def _known_shape(reference: str, shapes: Mapping[str, Shape | None]) -> Shape | None:
    from moekit.checkpoint.safety import read_json
    from moekit.data.sources import all_sources
    from moekit.errors import MoekitError

    if reference in shapes:
        return shapes[reference]
    source = all_sources().get(reference)
    config = getattr(source, "config", None)
    if config is not None:
        return shape_of(config)
    file = Path(reference).expanduser() / "config.json"
    try:
        return shape_of(read_json(file)) if file.is_file() else None
    except MoekitError:
        return None  # the step itself will say what is wrong with it


def _made(step: Any, shape: Shape | None) -> Shape | None:
    """The shape of the model that a step writes."""
    if shape is None or step.use not in ("convert", "train"):
        return shape
    if step.use == "train":
        return replace(shape, half=False)
    settings: Mapping[str, Any] = step.settings
    chosen = settings.get("layers") or range(shape.layers)
    routed = float(len(chosen) * int(settings.get("top_k") or 1) * 3 * shape.hidden * int(settings.get("width") or 0))
    # Experts beside the dense layer add to it; those cut out of it are part of it.
    return replace(shape, blocks=shape.blocks + routed, experts=routed, first=min(chosen, default=0))


def _tokens(reference: str | None, limit: int | None, sizes: ByteSizes) -> float:
    """Tokens of a text, at most `limit`."""
    nbytes = None if reference is None else sizes.of(Path(reference).expanduser())
    known = None if nbytes is None else nbytes / BYTES_PER_TOKEN
    return float(min((n for n in (known, limit) if n is not None), default=65536))


def _convert(step: Any, shape: Shape, sizes: ByteSizes) -> float:
    return shape.forward * (0 if step.data is None else _tokens(step.data, step.max_tokens, sizes))


def _profile(step: Any, shape: Shape, sizes: ByteSizes) -> float:
    return shape.forward * _tokens(step.data, step.max_tokens, sizes)


def _train(step: Any, shape: Shape, sizes: ByteSizes) -> float:
    from moekit.training import TrainConfig

    config = TrainConfig(**step.settings)
    rows = round(_tokens(step.data, None, sizes) / config.seq_len)
    tokens: int = config.planned_steps(max(rows, 1)) * config.batch * config.accumulation * config.seq_len
    return float(tokens) * (shape.forward + shape.backward(("all",) if config.lora is not None else config.parts))


def _heal(step: Any, shape: Shape, sizes: ByteSizes) -> float:
    from moekit.training.healing import HealConfig

    settings = HealConfig(**step.settings)
    rows = max(round(_tokens(step.data, None, sizes) / settings.seq_len), 1)
    config = settings.train_config(step.what, seed=0, rows=rows)
    tokens = config.planned_steps(rows) * config.batch * config.accumulation * config.seq_len
    # The teacher is counted as a second model of the student's shape, though it is larger.
    learnt = float(tokens) * (2 * shape.forward + shape.backward(("all",) if config.lora is not None else config.parts))
    return learnt + (shape.forward * 4 * (step.proof_tokens or 0) if step.proof else 0.0)


def _evaluate(step: Any, shape: Shape, sizes: ByteSizes) -> float:
    text = 0.0 if step.data is None else _tokens(step.data, step.max_tokens, sizes)
    asked = len((*step.questions, *step.tasks)) * (step.limit or _QUESTIONS) * _CHOICES * _CHOICE_TOKENS
    return shape.forward * (text + asked)


def _compress(step: Any, shape: Shape, sizes: ByteSizes) -> float:
    data = getattr(step, "data", None)
    decided = 0.0 if data is None else _tokens(data, getattr(step, "max_tokens", None), sizes)
    variants = 3 + getattr(step, "random_seeds", 0)  # as it was, as it becomes, and what it is compared with
    proves = step.proof and getattr(step, "write", "model") == "model"
    proof = (step.proof_tokens or 0) * variants if proves else 0
    return shape.forward * (decided + proof)


def _fit(step: Any, shape: Shape, sizes: ByteSizes) -> float:
    text = _tokens(step.data, step.max_tokens, sizes)
    # Statistics, a way there and back, and every layer under every recipe.
    decided: float = text * (2 + 3 + step.choices)
    plans: int = 1 + step.tries + step.random_plans + len(step.ways) + 2
    proof: float = (step.proof_tokens or 0) * plans if step.proof else 0
    return shape.forward * (decided + proof)


# What takes about a second, whatever the model.
_QUICK = frozenset({"data", "place", "report", "route"})
_OPERATIONS: dict[str, Callable[[Any, Shape, ByteSizes], float]] = {
    "apply": _compress,
    "convert": _convert,
    "evaluate": _evaluate,
    "heal": _heal,
    "fit": _fit,
    "profile": _profile,
    "merge": _compress,
    "prune": _compress,
    "quantize": _compress,
    "slim": _compress,
    "sparsify": _compress,
    "super-experts": _compress,
    "train": _train,
}


def in_words(seconds: float) -> str:
    """A duration as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
