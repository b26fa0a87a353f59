"""LoRA on experts, routers and attention, through peft.

The experts of a layer are two stacked parameters rather than linear modules, so they are adapted as parameters: each
expert gets factors of its own. Fine-tune with them, then `merge_lora`, and what is saved is a stock checkpoint.

Legend: E experts, R rank.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field
from torch import nn
from transformers import PreTrainedModel

from moekit.errors import BadConfig
from moekit.training.freeze import PartSpec, chosen_rows, parts_of

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


def _targets(model: nn.Module, specs: Sequence[PartSpec]) -> tuple[list[str], list[str]]:
    """Linear modules, and parameters of other modules, that belong to the given parts."""
    modules: list[str] = []
    parameters: list[str] = []
    for name, part in parts_of(model).items():
        owner, _, leaf = name.rpartition(".")
        layer = re.search(r"\.(\d+)\.", name)
        if chosen_rows(specs, part, int(layer[1]) if layer else None, ()) is False:
            continue
        # A router may be a linear module that returns three tensors: peft must adapt its weight, not its output.
        if type(model.get_submodule(owner)).forward is nn.Linear.forward:
            if leaf == "weight":
                modules.append(owner)
        elif model.get_parameter(name).dim() in (2, 3) and not leaf.endswith("bias"):
            parameters.append(name)
    return modules, parameters


def add_lora(model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """Wrap a model so that only adapters train; its function is unchanged until they do.

    Args:
        model: a MoE model; routing policies stay attached.
        settings: rank, scale and parts.

    Returns:
        The peft model; `save_pretrained` writes the adapter alone, and `PeftModel.from_pretrained` reads it back.

    Raises:
        BadConfig: peft is missing, or the parts have nothing that can be adapted.
        UnsupportedModel: no MoE model.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise BadConfig("LoRA needs peft", hint="pip install 'moekit[train]'") from error
    specs = [PartSpec.parse(text) for text in settings.parts]
    for spec in specs:
        if spec.low is not None:
            raise BadConfig("adapters go on all experts of a layer", hint="name layers without experts in brackets")
        if spec.part in ("norms", "embeddings", "adapters"):
            raise BadConfig(
                f"LoRA does not adapt {spec.part}", hint="adapt experts, router, attention, shared or other"
            )
    modules, parameters = _targets(model, specs)
    if not modules and not parameters:
        raise BadConfig(
            f"{', '.join(settings.parts)}: this model has nothing there that LoRA could adapt",
            hint=f"it has {', '.join(sorted(set(parts_of(model).values())))}",
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


def merge_lora(model: PeftModel) -> PreTrainedModel:
    """Fold the adapters into the weights and take peft's wrappers off.

    Returns:
        The plain model, of the same class as before `add_lora`.
    """
    merged: PreTrainedModel = model.merge_and_unload()
    return merged
