"""Train some parts of a model and freeze the others.

The parts are "router", "experts", "shared" (shared experts and their gate), "attention", "norms", "embeddings" (input
and output), "other" (feed-forward layers that are no MoE, and whatever else a decoder layer has) and "adapters" (LoRA);
"attached" is what runtime parts learn (a routing policy's networks, say), each of which belongs to the router, experts
or block that it hangs on, too; "all" is every part. A part may be limited to decoder layers: "experts:20-29",
"router:3", and the experts of a layer to some of them: "experts:4[5]", "experts:4[0-3]". A minus takes a part out
again: "all", "-router".

Legend: E experts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from moekit.anatomy.probe import MoELayer, decoder_index
from moekit.checkpoint.decoder import besides_text
from moekit.checkpoint.names import PARTS as PARTS_NAME
from moekit.errors import BadConfig, UnsupportedModel
from moekit.experts.factored_model import replaced_weights
from moekit.training.chooser import find_chooser, require_chooser
from moekit.training.layers import moe_layers, trained_layers
from moekit.training.part_specs import PartSpec, chosen_rows

# Parts that can be told apart only where the experts are known.
_OF_BLOCKS = ("router", "experts", "shared", "other")
_WRAPPER = re.compile(r"\.base_layer(?=\.|$)")


def refuse_untold(model: nn.Module, specs: Sequence[PartSpec]) -> None:
    """Refuse parts that this model does not tell apart, before anything is frozen.

    Raises:
        UnsupportedModel: the router of a layer is named and nothing tells which module it is; single experts, where
            they do not lie in a stack; or any part of a MoE block, where experts lie in a form that moekit does not
            know.
    """
    blocks = moe_layers(model)
    named = next((spec for spec in specs if spec.part in _OF_BLOCKS), None)
    if not blocks and named is not None:
        raise UnsupportedModel(
            f"{named.part!r} cannot be told from other weights: the experts of this model lie in a form that moekit "
            "does not know",
            hint="train all, or parts of attention, norms and embeddings",
        )
    for layer in blocks:
        for spec in specs:
            if spec.holds("router", layer.index) and spec.part == "router":
                require_chooser(layer)
            if spec.low is not None and spec.holds("experts", layer.index) and not _stacks(layer):
                raise UnsupportedModel(
                    f"experts of {layer.experts_name!r} cannot train one by one: they do not lie in stacks [E, ...]",
                    layer=layer.index,
                    hint=f"train all of the layer: experts:{layer.index}",
                )


def _stacks(layer: MoELayer) -> dict[str, int]:
    """Parameters of a layer that are stacks of all its experts -> E."""
    if layer.storage.kind not in ("stacked", "paired"):
        return {}
    count, beyond = layer.storage.experts, layer.storage.beyond  # of this rank, where ranks share them
    own = layer.experts.named_parameters() if layer.experts is not layer.block else _named(layer)
    return {f"{layer.experts_name}.{n}": count for n, p in own if p.dim() > 0 and p.shape[0] in (count, count + beyond)}


def _named(layer: MoELayer) -> list[tuple[str, nn.Parameter]]:
    return [(name, layer.experts.get_parameter(name)) for name in layer.storage.names]


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


def _block_part(name: str, layer: MoELayer, router: str | None) -> str | None:
    """The part of a parameter below a MoE block, by its path."""
    own = name.removeprefix(f"{layer.name}.")
    if router is not None and own.startswith(f"{router}."):
        return "router"
    if layer.experts is layer.block:  # two stacks that hang in the block itself
        return "experts" if own in layer.storage.names else "shared" if "shared" in own else None
    if name.startswith(f"{layer.experts_name}."):
        return "experts"
    return "shared" if "shared" in own else None


def parts_of(model: nn.Module) -> dict[str, str]:
    """The part that each parameter belongs to: name -> part.

    Where experts lie in a form that moekit does not know, they and their router are "other".

    Raises:
        UnsupportedModel: no MoE model, or a part of it cannot be told from others.
    """
    blocks = {f"{layer.name}.": layer for layer in moe_layers(model)}
    choosers = {prefix: found[0] for prefix, layer in blocks.items() if (found := find_chooser(layer)) is not None}
    shared = {id(p) for layer in blocks.values() for module in layer.shared for p in module.parameters()}
    norms, embeddings = _norm_names(model), _embedding_ids(model)
    parts: dict[str, str] = {}
    for full, parameter in model.named_parameters():
        name = _WRAPPER.sub("", full)
        prefix, block = next(((p, layer) for p, layer in blocks.items() if name.startswith(p)), ("", None))
        inside = (
            _SHARED_PARTS.get(_slot_of_shared(name))
            if block is None
            else _block_part(name, block, choosers.get(prefix))
        )
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
        UnsupportedModel: no MoE model, or a part of it cannot be told from others.
    """
    wanted = [PartSpec.parse(text) for text in parts]
    refuse_untold(model, wanted)
    named = parts_of(model)
    stacks = {name: count for layer in moe_layers(model) for name, count in _stacks(layer).items()}
    biases = {layer.bias.data_ptr() for layer in trained_layers(model) if layer.bias is not None}
    trained: dict[str, int] = {}
    frozen: dict[str, int] = {}
    rows: dict[str, tuple[int, ...]] = {}
    aside = besides_text(model)  # text does not reach a tower
    replaced = replaced_weights(model)
    for name, parameter in model.named_parameters():
        part = named[name]
        layer = decoder_index(name) if re.search(r"\.\d+\.", name) else None
        chosen = (
            not name.startswith(aside)
            and parameter.data_ptr() not in biases
            and name not in replaced
            and chosen_rows(wanted, part, layer, stacks.get(name), attached=f"{PARTS_NAME}." in name)
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
