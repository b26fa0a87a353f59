"""Train some parts of a model and freeze the others.

The parts are "router", "experts", "shared" (shared experts and their gate), "attention", "norms", "embeddings" (input
and output), "other" (feed-forward layers that are no MoE, and whatever else a decoder layer has) and "adapters" (LoRA);
"all" is every part. A part may be limited to decoder layers: "experts:20-29", "router:3".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict
from torch import nn

from moekit.anatomy.probe import MoELayer, decoder_index
from moekit.checkpoint.names import PARTS as PARTS_NAME
from moekit.errors import BadConfig
from moekit.training.layers import moe_layers, trained_layers

PARTS = ("router", "experts", "shared", "attention", "norms", "embeddings", "other", "adapters")
_SPEC = re.compile(r"^(?P<part>[a-z]+)(?::(?P<first>\d+)(?:-(?P<last>\d+))?)?$")
_WRAPPER = re.compile(r"\.base_layer(?=\.|$)")


@dataclass(frozen=True)
class PartSpec:
    """A part, perhaps of some layers only.

    Attributes:
        part: one of `PARTS`, or "all".
        first: first decoder layer, None for all.
        last: last decoder layer, inclusive.
    """

    part: str
    first: int | None = None
    last: int | None = None

    @classmethod
    def parse(cls, text: str) -> PartSpec:
        """Read "part", "part:layer" or "part:first-last".

        Raises:
            BadConfig: no such part, or a range that runs backwards.
        """
        match = _SPEC.match(text)
        if match is None or (match["part"] not in PARTS and match["part"] != "all"):
            raise BadConfig(
                f"{text!r} names no part of a model", hint=f"there are: all, {', '.join(PARTS)}; experts:4-7"
            )
        first = None if match["first"] is None else int(match["first"])
        last = first if match["last"] is None else int(match["last"])
        if first is not None and last is not None and last < first:
            raise BadConfig(f"{text!r} ends before it begins", hint="write experts:FIRST-LAST")
        return cls(match["part"], first, last)

    def holds(self, part: str, layer: int | None) -> bool:
        """Whether a parameter of this part and layer is meant."""
        if self.part not in ("all", part):
            return False
        return self.first is None or (layer is not None and self.last is not None and self.first <= layer <= self.last)


class FreezeReport(BaseModel):
    """What trains and what does not.

    Attributes:
        trained: part -> number of parameters that train.
        frozen: part -> number that do not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    trained: dict[str, int]
    frozen: dict[str, int]

    @property
    def trained_parameters(self) -> int:
        """Parameters that train."""
        return sum(self.trained.values())

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.trained_parameters + sum(self.frozen.values())


def _norm_names(model: nn.Module) -> set[str]:
    """Parameters of normalisation modules, by their class: all such classes of transformers and torch end so."""
    return {
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Norm")
        for parameter in module._parameters
    }


def _embedding_ids(model: nn.Module) -> set[int]:
    found = set()
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, getter)() if hasattr(model, getter) else None
        if isinstance(module, nn.Module):
            found |= {id(p) for p in module.parameters()}
    return found


# Parameters of runtime parts that all layers share hang below the base model, by slot.
_SHARED_PARTS = {"router": "router", "experts": "experts"}


def _slot_of_shared(name: str) -> str:
    return name.partition(f"{PARTS_NAME}.")[2].partition(".")[0]


def _block_part(name: str, layer: MoELayer) -> str | None:
    """The part of a parameter below a MoE block, by its path."""
    if name.startswith(f"{layer.router_name}."):
        return "router"
    if name.startswith(f"{layer.experts_name}."):
        return "experts"
    return "shared" if "shared" in name.removeprefix(f"{layer.name}.") else None


def parts_of(model: nn.Module) -> dict[str, str]:
    """The part that each parameter belongs to: name -> part.

    Raises:
        UnsupportedModel: no MoE model.
    """
    blocks = {f"{layer.name}.": layer for layer in moe_layers(model)}
    shared = {id(p) for layer in blocks.values() for module in layer.shared for p in module.parameters()}
    norms, embeddings = _norm_names(model), _embedding_ids(model)
    parts: dict[str, str] = {}
    for full, parameter in model.named_parameters():
        name = _WRAPPER.sub("", full)
        block = next((layer for prefix, layer in blocks.items() if name.startswith(prefix)), None)
        inside = _block_part(name, block) if block is not None else _SHARED_PARTS.get(_slot_of_shared(name))
        if "lora_" in name:
            part = "adapters"
        elif id(parameter) in embeddings:
            part = "embeddings"
        elif id(parameter) in shared:
            part = "shared"
        elif inside is not None:
            part = inside
        elif full in norms:
            part = "norms"
        elif re.search(r"\.(self_)?att(entio)?n\w*\.", name):
            part = "attention"
        else:
            part = "other"
        parts[full] = part
    return parts


def train_only(model: nn.Module, parts: Sequence[str]) -> FreezeReport:
    """Let the given parts train and freeze all others.

    Selection biases never train by gradient (see `MoECallback(balancer=...)`).

    Args:
        model: a MoE model, wrapped by peft or not.
        parts: names of parts, each perhaps with layers: ("router", "experts:20-29").

    Returns:
        Counts of parameters by part.

    Raises:
        BadConfig: an unknown part, or nothing is left to train.
        UnsupportedModel: no MoE model.
    """
    wanted = [PartSpec.parse(text) for text in parts]
    named = parts_of(model)
    biases = {layer.bias.data_ptr() for layer in trained_layers(model) if layer.bias is not None}
    trained: dict[str, int] = {}
    frozen: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = named[name]
        layer = decoder_index(name) if re.search(r"\.\d+\.", name) else None
        trains = any(spec.holds(part, layer) for spec in wanted) and parameter.data_ptr() not in biases
        parameter.requires_grad_(trains)
        count = trained if trains else frozen
        count[part] = count.get(part, 0) + parameter.numel()
    if not trained:
        present = ", ".join(sorted(set(named.values())))
        raise BadConfig(f"nothing trains: {', '.join(parts) or '(no part)'}", hint=f"this model has {present}")
    return FreezeReport(trained=trained, frozen=frozen)
