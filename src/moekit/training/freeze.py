"""Train some parts of a model and freeze the others.

The parts are "router", "experts", "shared" (shared experts and their gate), "attention", "norms", "embeddings" (input
and output), "other" (feed-forward layers that are no MoE, and whatever else a decoder layer has) and "adapters" (LoRA);
"all" is every part. A part may be limited to decoder layers: "experts:20-29", "router:3", and the experts of a layer to
some of them: "experts:4[5]", "experts:4[0-3]". A minus takes a part out again: "all", "-router".

Legend: E experts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from moekit.anatomy.probe import MoELayer, decoder_index
from moekit.checkpoint.decoder import besides_text
from moekit.checkpoint.names import PARTS as PARTS_NAME
from moekit.errors import BadConfig
from moekit.training.layers import moe_layers, trained_layers

PARTS = ("router", "experts", "shared", "attention", "norms", "embeddings", "other", "adapters")
_SPEC = re.compile(
    r"^(?P<minus>-?)(?P<part>[a-z]+)(?::(?P<first>\d+)(?:-(?P<last>\d+))?)?"
    r"(?:\[(?P<low>\d+)(?:-(?P<high>\d+))?\])?$"
)
_WRAPPER = re.compile(r"\.base_layer(?=\.|$)")


@dataclass(frozen=True)
class PartSpec:
    """A part, perhaps of some layers only.

    Attributes:
        part: one of `PARTS`, or "all".
        first: first decoder layer, None for all.
        last: last decoder layer, inclusive.
        without: whether it is taken out of what the other parts name.
        low: first expert, None for all.
        high: last expert, inclusive.
    """

    part: str
    first: int | None = None
    last: int | None = None
    without: bool = False
    low: int | None = None
    high: int | None = None

    @classmethod
    def parse(cls, text: str) -> PartSpec:
        """Read "part", "part:layer" or "part:first-last", with a minus before it or experts in brackets behind it.

        Raises:
            BadConfig: no such part, a range that runs backwards, or single rows of what is no stack of experts.
        """
        match = _SPEC.match(text)
        if match is None or (match["part"] not in PARTS and match["part"] != "all"):
            raise BadConfig(
                f"{text!r} names no part of a model", hint=f"there are: all, {', '.join(PARTS)}; experts:4-7"
            )
        first = None if match["first"] is None else int(match["first"])
        last = first if match["last"] is None else int(match["last"])
        low = None if match["low"] is None else int(match["low"])
        high = low if match["high"] is None else int(match["high"])
        for begin, end in ((first, last), (low, high)):
            if begin is not None and end is not None and end < begin:
                raise BadConfig(f"{text!r} ends before it begins", hint="write experts:FIRST-LAST")
        if low is not None and (match["part"] != "experts" or match["minus"]):
            raise BadConfig(
                f"{text!r}: only experts can be named one by one", hint="write experts:4[5] or experts:4[0-3]"
            )
        return cls(match["part"], first, last, bool(match["minus"]), low, high)

    def holds(self, part: str, layer: int | None) -> bool:
        """Whether a parameter of this part and layer is meant."""
        if self.part not in ("all", part):
            return False
        return self.first is None or (layer is not None and self.last is not None and self.first <= layer <= self.last)


def chosen_rows(specs: Sequence[PartSpec], part: str, layer: int | None, shape: Sequence[int]) -> Tensor | bool:
    """What trains of a parameter: all, nothing, or some experts of a stack [E] (bool).

    Raises:
        BadConfig: an expert beyond the stack.
    """
    holding = [spec for spec in specs if spec.holds(part, layer)]
    if not holding or any(spec.without for spec in holding):
        return False
    if any(spec.low is None for spec in holding):
        return True
    rows_E = torch.zeros(shape[0], dtype=torch.bool)
    for spec in holding:
        assert spec.low is not None
        assert spec.high is not None
        if spec.high >= shape[0]:
            raise BadConfig(f"there is no expert {spec.high}", layer=layer, hint=f"the last one is {shape[0] - 1}")
        rows_E[spec.low : spec.high + 1] = True
    return True if bool(rows_E.all()) else rows_E


class FreezeReport(BaseModel):
    """What trains and what does not.

    Attributes:
        trained: part -> number of parameters that train.
        frozen: part -> number that do not.
        rows: parameter -> experts that train, for stacks of which not all do.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    trained: dict[str, int]
    frozen: dict[str, int]
    rows: dict[str, tuple[int, ...]] = {}

    def row_masks(self, model: nn.Module) -> dict[str, Tensor]:
        """Parameter -> [E] bool, True for experts that train, for stacks of which not all do."""
        masks = {}
        for name, experts in self.rows.items():
            masks[name] = torch.zeros(model.get_parameter(name).shape[0], dtype=torch.bool)
            masks[name][list(experts)] = True
        return masks

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
        parts: names of parts, each perhaps with layers and experts: ("router", "experts:20-29"), ("experts:4[5]",),
            ("all", "-router"). Where only some experts of a stack train, `ExpertRows` must keep the others still.

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
    rows: dict[str, tuple[int, ...]] = {}
    aside = besides_text(model)  # text does not reach a tower
    for name, parameter in model.named_parameters():
        part = named[name]
        layer = decoder_index(name) if re.search(r"\.\d+\.", name) else None
        chosen = (
            not name.startswith(aside)
            and parameter.data_ptr() not in biases
            and chosen_rows(wanted, part, layer, parameter.shape)
        )
        some = isinstance(chosen, Tensor)
        parameter.requires_grad_(some or bool(chosen))
        count = parameter.numel() if chosen is True else 0
        if isinstance(chosen, Tensor):
            rows[name] = tuple(chosen.nonzero().flatten().tolist())
            count = parameter.numel() // parameter.shape[0] * len(rows[name])
        for into, size in ((trained, count), (frozen, parameter.numel() - count)):
            if size:
                into[part] = into.get(part, 0) + size
    if not trained:
        present = ", ".join(sorted(set(named.values())))
        raise BadConfig(f"nothing trains: {', '.join(parts) or '(no part)'}", hint=f"this model has {present}")
    return FreezeReport(trained=trained, frozen=frozen, rows=rows)
