"""Legal tensors of a model on disk, by name, shape and dtype, and which decoder layer and expert each belongs to.

A model's own names (experts fused, transformers v5) and the names that transformers' conversion mapping turns them into
(experts split, as on the hub) are both legal on disk. Where a tensor belongs is asked of the model: towers number their
layers too, and families write the same decoder under different names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moekit.checkpoint.decoder import Stack, layer_number, stacks_of
from moekit.checkpoint.fingerprint import TORCH_NAMES, disk_state_dict
from moekit.checkpoint.names import expert_in, in_mtp_stack
from moekit.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

# Buffers that old versions of transformers saved and newer ones compute.
HARMLESS = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|\.position_ids$")


@dataclass(frozen=True)
class Layout:
    """Legal tensors of a config.

    Attributes:
        stock: name -> shape as `save_pretrained` writes them.
        live: name -> shape in the live model.
        target: stock name -> live name it becomes (part of).
        rename: any name on disk -> (live name, whether a converter gathers it).
        optional: patterns of names that transformers ignores.
        counters: live name -> dtype, as safetensors calls it, of tensors that hold no floats.
        stacks: of layers, by which live names say their numbers; empty without such layers.
        experts: how live names of routed experts' weights go on behind a layer's number: "mlp.experts.".
    """

    stock: dict[str, tuple[int, ...]]
    live: dict[str, tuple[int, ...]]
    target: dict[str, str]
    rename: Callable[[str], tuple[str, bool]]
    optional: tuple[re.Pattern[str], ...]
    counters: dict[str, str] = field(default_factory=dict)
    stacks: tuple[Stack, ...] = ()
    experts: tuple[str, ...] = ()

    def ignored(self, name: str) -> bool:
        """Whether transformers ignores a surplus tensor of this name."""
        return any(pattern.search(name) for pattern in self.optional)

    def live_name(self, name: str) -> str:
        """The live tensor that one on disk becomes, or becomes part of; unknown ones as a layer further on would be."""
        if name in self.live:
            return name
        return self.target[name] if name in self.target else self.rename(name)[0]

    def layer(self, name: str) -> int | None:
        """Decoder layer that a tensor on disk belongs to; None for all others, such as those of towers.

        Layers of multi-token prediction that follow the decoder's last one have the numbers that follow.
        """
        return None if in_mtp_stack(name) else layer_number(self.stacks, self.live_name(name))

    def where(self, name: str) -> tuple[int | None, int | None]:
        """Decoder layer and expert that a tensor on disk belongs to."""
        return self.layer(name), expert_in(name)

    def is_expert(self, name: str) -> bool:
        """Whether a tensor on disk belongs to routed experts, of a decoder layer or of one that follows the last."""
        if self.layer(name) is None:
            return False
        return _inside(self.stacks, self.live_name(name)).startswith(self.experts)


def renamer(model: PreTrainedModel, live: Mapping[str, Any]) -> Callable[[str], tuple[str, bool]]:
    """How transformers names a tensor on disk in the live model, and whether a converter gathers it from parts."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def rename(name: str) -> tuple[str, bool]:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, live)
        return target, pattern is not None

    return rename


def layout_of(model: PreTrainedModel) -> Layout:
    """Legal tensors of a model, which may lie on the meta device."""
    state: dict[str, Tensor] = model.state_dict()
    live = {name: tuple(tensor.shape) for name, tensor in state.items()}
    stock = {name: tuple(tensor.shape) for name, tensor in disk_state_dict(model).items()}
    rename = renamer(model, live)
    patterns = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []]
    stacks = _stacks(model)
    return Layout(
        stock=stock,
        live=live,
        target={name: rename(name)[0] if name not in live else name for name in stock},
        rename=rename,
        optional=(*patterns, HARMLESS),
        counters={n: TORCH_NAMES[str(t.dtype)] for n, t in state.items() if not t.is_floating_point()},
        stacks=stacks,
        experts=_expert_parts(model, stacks),
    )


def _stacks(model: nn.Module) -> tuple[Stack, ...]:
    try:
        return stacks_of(model)
    except UnsupportedModel:
        return ()


def _inside(stacks: Iterable[Stack], name: str) -> str:
    """What a live name says behind the number of its layer; "" where it names none."""
    prefix = next((stack.prefix for stack in stacks if name.startswith(stack.prefix)), None)
    return "" if prefix is None else name[len(prefix) :].partition(".")[2]


def _expert_parts(model: nn.Module, stacks: tuple[Stack, ...]) -> tuple[str, ...]:
    found = (_inside(stacks, name) for name, module in model.named_modules() if _holds_experts(module))
    return tuple(sorted({f"{part}." for part in found if part}))


def _holds_experts(module: nn.Module) -> bool:
    """Whether a module states a number of experts, and stacks so many weights or names so many children by number."""
    count = getattr(module, "num_experts", None)
    own = [p for p in module._parameters.values() if p is not None]
    if not isinstance(count, int):
        return False
    listed = {expert_in(f".experts.{name}.") for name, _ in module.named_children()} - {None}
    return any(p.dim() == 3 and p.shape[0] == count for p in own) or listed == set(range(count)) != set()
