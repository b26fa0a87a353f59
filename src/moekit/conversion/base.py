"""What all conversions share: walk the layers, build the blocks, assemble a stock checkpoint.

Shapes: N tokens of calibration text, H hidden, F dense width, E experts, I expert width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Self

import torch
from pydantic import BaseModel, ConfigDict, Field
from transformers import PreTrainedModel

from moekit._memory import naming_memory, require_memory
from moekit._progress import Progress, track
from moekit.checkpoint.folder import listed
from moekit.checkpoint.provenance import origin_of
from moekit.checkpoint.stored import mark_stored, marked_stored
from moekit.conversion.dense import check_calibration, check_dense, ffn_inputs, ffn_of
from moekit.conversion.maths import DenseFFN, MoEWeights
from moekit.conversion.targets import MoEGeometry, build, target_config
from moekit.errors import BadConfig

# Standard deviation of random router rows, that of transformers' own initialisation.
ROUTER_STD = 0.02
# The grouped matrix product that stock transformers computes experts with wants rows of whole 16-byte units, which are
# 8 numbers in bfloat16.
WIDTH_STEP = 8


class Conversion(BaseModel, ABC):
    """A way to turn a dense Llama-type model into a MoE that stock transformers loads.

    Attributes:
        experts: routed experts E of each converted layer.
        top_k: experts k that each token chooses.
        layers: decoder layers to convert, None for all; the others stay dense (Qwen2-MoE layout only).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    experts: int = Field(default=8, ge=2, description="routed experts of each converted layer")
    top_k: int = Field(default=2, ge=1, description="experts that each token chooses")
    layers: tuple[int, ...] | None = Field(default=None, description="decoder layers to convert; all if left out")

    @classmethod
    def examples(cls) -> Sequence[Self]:
        """Settings that the generic tests try on a dense network of 96 neurons."""
        return [cls(experts=4, top_k=2)]

    @property
    def needs_calibration(self) -> bool:
        """Whether `convert` needs calibration text."""
        return False

    @abstractmethod
    def geometry(self, dense_width: int, dense_layers: tuple[int, ...]) -> MoEGeometry:
        """Sizes of the MoE blocks for a dense width F.

        Raises:
            BadConfig: they do not divide; names the nearest legal values.
        """

    @property
    @abstractmethod
    def layout(self) -> str:
        """Model type of the result: "qwen2_moe" or "mixtral"."""

    @abstractmethod
    def convert_layer(self, ffn: DenseFFN, inputs_NH: torch.Tensor | None, generator: torch.Generator) -> MoEWeights:
        """Weights of one MoE block.

        Args:
            ffn: the dense network of the layer, float32.
            inputs_NH: its inputs on calibration text, float32; None without calibration.
            generator: seeded for this layer.
        """

    def check(self, model: PreTrainedModel, calibration: torch.Tensor | None) -> MoEGeometry:
        """Refuse what cannot work, before anything is computed.

        Raises:
            UnsupportedModel: the dense model cannot be expressed.
            BadConfig: sizes, layers or calibration are impossible.
        """
        check_dense(model)
        if self.top_k > self.experts:
            raise BadConfig(
                f"top_k {self.top_k} exceeds the {self.experts} experts", hint=f"choose at most {self.experts}"
            )
        count = model.config.num_hidden_layers
        chosen = range(count) if self.layers is None else self.layers
        wrong = [layer for layer in chosen if not 0 <= layer < count]
        if wrong or not chosen or len(set(chosen)) != len(chosen):
            raise BadConfig(
                f"the layers {list(chosen)} are not some of the model's {count}",
                hint=f"name each once, from 0 to {count - 1}",
            )
        if calibration is not None:
            check_calibration(calibration, model)
        elif self.needs_calibration:
            raise BadConfig(
                f"{type(self).__name__} looks at activations and needs calibration text",
                hint="give text (--data) that the model is for, about 4,000 tokens; from Python, its token ids",
            )
        dense_layers = tuple(layer for layer in range(count) if layer not in set(chosen))
        geometry = self.geometry(model.config.intermediate_size, dense_layers)
        if geometry.width % WIDTH_STEP:
            low = geometry.width // WIDTH_STEP * WIDTH_STEP
            raise BadConfig(
                f"experts of {geometry.width} neurons: the width must be a multiple of {WIDTH_STEP}",
                hint=f"choose numbers that give {low or WIDTH_STEP} or {low + WIDTH_STEP}",
            )
        self._require_memory(model, geometry, len(set(chosen)))
        return geometry

    @staticmethod
    def _require_memory(model: PreTrainedModel, geometry: MoEGeometry, layers: int) -> None:
        width = geometry.experts * (3 * geometry.width + 1) + 3 * geometry.shared_width
        parameters = layers * model.config.hidden_size * width
        itemsize = next(model.parameters()).element_size()
        require_memory(
            parameters * itemsize,
            f"a model of {geometry.experts:,} experts in each of {layers} layers",
            "make fewer or narrower experts, or convert fewer layers",
        )

    @naming_memory("converting the model", "make fewer or narrower experts, or convert fewer layers")
    def convert(
        self,
        dense_model: PreTrainedModel,
        calibration: torch.Tensor | None = None,
        seed: int = 0,
        progress: Progress | None = None,
        *,
        drop_unknown: bool = False,
    ) -> PreTrainedModel:
        """Convert a model; the dense one is left as it is.

        Args:
            dense_model: a Llama, Mistral or Qwen2 causal LM.
            calibration: token ids [B, S], -1 at padding (`TokenBatches.calibration`); needed where `needs_calibration`.
            seed: of all random choices, for each layer independently.
            progress: told of each layer.
            drop_unknown: convert although the checkpoint holds more than the dense model, which has no place in a MoE.

        Returns:
            A Qwen2MoeForCausalLM or MixtralForCausalLM in evaluation mode, in the dense model's dtype and place;
            it is saved in the type that the dense one was stored in.

        Raises:
            UnsupportedModel: see `check`.
            BadConfig: see `check`.
            OutOfBudget: the result does not fit in memory.
        """
        geometry = self.check(dense_model, calibration)
        if not drop_unknown:
            _refuse_loss(dense_model)
        config = target_config(dense_model.config, self.layout, geometry)  # type: ignore[arg-type]
        layers = [i for i in range(config.num_hidden_layers) if i not in geometry.dense_layers]
        state = {
            name: tensor.detach().clone()
            for name, tensor in dense_model.state_dict().items()
            if not any(f".layers.{layer}.mlp." in name for layer in layers)
        }
        label = f"converting {len(layers)} layers"
        for layer, inputs_NH in track(self._inputs(dense_model, calibration, layers), label, progress, len(layers)):
            generator = torch.Generator().manual_seed(seed * 100_003 + layer)
            ffn = ffn_of(dense_model, layer)
            weights = self.convert_layer(DenseFFN(*(w.float() for w in ffn)), inputs_NH, generator)
            block = _block_state(weights, config.model_type)
            # Copies: a part may be the dense model's own tensor, which training the result must not change.
            for name, tensor in block.items():
                owned = tensor.to(device=ffn.gate_FH.device, dtype=ffn.gate_FH.dtype, copy=True)
                state[f"model.layers.{layer}.mlp.{name}"] = owned.contiguous()
        model = build(config, state)
        model.generation_config = dense_model.generation_config
        mark_stored(model, marked_stored(dense_model))
        return model.eval()

    @staticmethod
    def _inputs(
        model: PreTrainedModel, calibration: torch.Tensor | None, layers: list[int]
    ) -> Iterator[tuple[int, torch.Tensor | None]]:
        if calibration is None:
            yield from ((layer, None) for layer in layers)
        else:
            yield from ffn_inputs(model, calibration, layers)


def _refuse_loss(model: PreTrainedModel) -> None:
    """A MoE of another class cannot carry what the dense checkpoint holds beyond its model."""
    beyond = origin_of(model)
    if beyond is not None:
        what = [f"{len(beyond.tensors)} tensors ({listed(list(beyond.tensors), 3)})"] if beyond.tensors else []
        what += [f"the class {', '.join(beyond.architectures)}"] if beyond.architectures else []
        what += [", ".join(beyond.files)] if beyond.files else []
        raise BadConfig(
            f"the dense checkpoint holds more than its language model: {' and '.join(what)} would be lost",
            file=beyond.folder,
            hint="leave that out on purpose (drop_unknown=True, --drop-unknown)",
        )


def _block_state(weights: MoEWeights, model_type: str) -> dict[str, torch.Tensor]:
    """Names that the tensors of a block have in memory, below `mlp.`."""
    state = {
        "gate.weight": weights.router_EH,
        "experts.gate_up_proj": weights.gate_up_EJH,
        "experts.down_proj": weights.down_EHI,
    }
    if model_type == "qwen2_moe":
        hidden = weights.router_EH.shape[1]
        like = weights.router_EH
        # A shared expert of width 0 is how this layout says "none".
        shared = weights.shared or DenseFFN(
            like.new_zeros(0, hidden), like.new_zeros(0, hidden), like.new_zeros(hidden, 0)
        )
        state |= {
            "shared_expert.gate_proj.weight": shared.gate_FH,
            "shared_expert.up_proj.weight": shared.up_FH,
            "shared_expert.down_proj.weight": shared.down_HF,
            "shared_expert_gate.weight": like.new_zeros(1, hidden),
        }
    return state


def random_router(experts: int, hidden: int, generator: torch.Generator) -> torch.Tensor:
    """Router rows drawn from N(0, 0.02^2), [E, H]."""
    return torch.randn(experts, hidden, generator=generator) * ROUTER_STD
