"""LoRA on experts, routers and attention, through peft.

The experts of a layer are two stacked parameters rather than linear modules, so they are adapted as parameters: each
expert gets factors of its own. Fine-tune with them, then `merge_lora`, and what is saved is a stock checkpoint.
`save_adapter` keeps them apart before that, in peft's own layout.

Legend: E experts, R rank.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from transformers import PreTrainedModel

from moekit.checkpoint.header import read_header
from moekit.checkpoint.names import is_part_tensor
from moekit.errors import BadCheckpoint, BadConfig
from moekit.training.freeze import parts_of, refuse_untold
from moekit.training.part_specs import PartSpec, chosen_rows

if TYPE_CHECKING:
    from peft import PeftModel


class LoraSettings(BaseModel):
    """How the adapters are made.

    Attributes:
        rank: R, of each expert's and each matrix's factors.
        alpha: the update is scaled by alpha / R.
        parts: what is adapted, as in `train_only`: names of parts, each perhaps with layers ("experts:20-29").
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int = Field(default=8, ge=1, description="rank of each update")
    alpha: float = Field(default=16.0, gt=0, description="the update is scaled by alpha / rank")
    parts: tuple[str, ...] = Field(default=("experts", "attention"), min_length=1, description="what is adapted")


# Parts that have no matrix to which factors could be added.
_NEVER = ("norms", "embeddings", "adapters")


def _adaptable(model: nn.Module, *, by_layer: bool) -> str:
    """The parts that can be adapted, with their decoder layers where those were asked for."""
    layers: dict[str, set[int]] = {}
    for name, part in parts_of(model).items():
        if part not in _NEVER:
            known, layer = layers.setdefault(part, set()), _layer_of(name)
            known |= set() if layer is None else {layer}
    told = {part: f" ({_ranges(known)})" if by_layer and known else "" for part, known in layers.items()}
    return ", ".join(part + told[part] for part in sorted(told))


def _layer_of(name: str) -> int | None:
    layer = re.search(r"\.(\d+)\.", name)
    return int(layer[1]) if layer else None


def _ranges(numbers: set[int]) -> str:
    """Layers in few words: 0, 1, 2, 3 and 5 are "layers 0-3, 5"."""
    firsts = sorted(n for n in numbers if n - 1 not in numbers)
    lasts = sorted(n for n in numbers if n + 1 not in numbers)
    told = [str(first) if first == last else f"{first}-{last}" for first, last in zip(firsts, lasts, strict=True)]
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(told)}"


def _targets(model: nn.Module, specs: Sequence[PartSpec]) -> tuple[list[str], list[str]]:
    """Linear modules, and parameters of other modules, that belong to the given parts."""
    modules: list[str] = []
    parameters: list[str] = []
    for name, part in parts_of(model).items():
        owner, _, leaf = name.rpartition(".")
        if chosen_rows(specs, part, _layer_of(name), None) is False:
            continue
        # A router may be a linear module that returns three tensors: peft must adapt its weight, not its output.
        if type(model.get_submodule(owner)).forward is nn.Linear.forward:
            if leaf == "weight":
                modules.append(owner)
        elif model.get_parameter(name).dim() in (2, 3) and not leaf.endswith("bias"):
            parameters.append(name)
    return modules, parameters


def _refuse_parts(parameters: Sequence[str], settings: LoraSettings) -> None:
    """Parameters of an attached part are computed with, not read by name: peft cannot put factors on them."""
    taken = next((name for name in parameters if is_part_tensor(name)), None)
    if taken is not None:
        raise BadConfig(
            f"lora on {', '.join(settings.parts)}: a part beside the weights computes there, and takes no adapters",
            layer=_layer_of(taken),
            hint="let the part itself learn, without --lora, or adapt others alone: --lora '{parts: [attention]}'",
        )


def add_lora(model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """Wrap a model so that only adapters train; its function is unchanged until they do.

    Args:
        model: a MoE model; routing policies stay attached.
        settings: rank, scale and parts.

    Returns:
        The peft model; `save_pretrained` writes the adapter alone, and `PeftModel.from_pretrained` reads it back.

    Raises:
        BadConfig: peft is missing, or the parts have nothing that can be adapted, or an attached part computes there.
        UnsupportedModel: no MoE model, or a part of it cannot be told from others.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise BadConfig("LoRA needs peft", hint="pip install 'moekit[train]'") from error
    specs = [PartSpec.parse(text) for text in settings.parts]
    for spec in specs:
        if spec.low is not None:
            raise BadConfig("adapters go on all experts of a layer", hint="name layers without experts in brackets")
        if spec.part in _NEVER:
            raise BadConfig(
                f"LoRA does not adapt {spec.part}", hint="adapt experts, router, attention, shared or other"
            )
    refuse_untold(model, specs)
    modules, parameters = _targets(model, specs)
    _refuse_parts(parameters, settings)
    if not modules and not parameters:
        raise BadConfig(
            f"{', '.join(settings.parts)}: this model has nothing there that LoRA could adapt",
            hint=f"it has {_adaptable(model, by_layer=any(spec.first is not None for spec in specs))}",
        )
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,  # peft cannot drop inputs of adapted parameters
        target_modules=modules,
        target_parameters=parameters or None,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft asks by a name that transformers will drop; nothing that a user could do about it.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        return get_peft_model(model, config)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write the adapter alone, as peft reads it: `adapter_model.safetensors` and `adapter_config.json`.

    Args:
        model: what `add_lora` made, not merged.
        folder: made if it is not there.

    Raises:
        BadCheckpoint: the installed peft left something of the adapter out.
    """
    # "auto" asks the hub whether a vocabulary grew; embeddings are never adapted here.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    learnt = sorted(tuple(p.shape) for name, p in model.named_parameters() if "lora_" in name)
    kept = sorted(info.shape for info in read_header(folder / "adapter_model.safetensors").tensors.values())
    if kept != learnt:
        raise BadCheckpoint(
            f"{len(learnt)} factors were learnt, and peft wrote {len(kept)} tensors",
            file=folder,
            hint="pip install -U peft: adapters of stacked experts need 0.18 or later",
        )


def merge_lora(model: PeftModel) -> PreTrainedModel:
    """Fold the adapters into the weights and take peft's wrappers off.

    Returns:
        The plain model, of the same class as before `add_lora`.
    """
    merged: PreTrainedModel = model.merge_and_unload()
    return merged
