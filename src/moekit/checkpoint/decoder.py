"""Find the language model's stack of decoder layers in a model, whatever else the model is made of.

The list of layers is called `layers` in nearly all families; elsewhere (DBRX: `blocks`) it is the one list of as many
modules as the config states layers. A model that reads a text before it writes one has two stacks, an encoder's and a
decoder's: their layers are numbered through, the encoder's first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moekit.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Stack:
    """A list of layers of the language model.

    Attributes:
        prefix: with what the names of its layers begin, up to their number in the list: "encoder.block.".
        first: number of its first layer among those of the whole model.
        layers: how many it has.
        owner: the module that has the list.
    """

    prefix: str
    first: int
    layers: int
    owner: nn.Module = field(repr=False, compare=False)


def stacks_of(model: nn.Module) -> tuple[Stack, ...]:
    """The stacks of layers of a language model, in the order of their numbers; one, or an encoder's and a decoder's.

    Raises:
        UnsupportedModel: the model keeps its layers in no lists of their own.
    """
    paths = {id(module): str(name) for name, module in reversed(list(model.named_modules()))}
    found: list[Stack] = []
    for owner in (*filter(None, [_encoder(model)]), decoder_of(model)):
        prefix = f"{paths[id(owner)]}.{stack_name(owner)}.".lstrip(".")
        first = found[-1].first + found[-1].layers if found else 0
        found.append(Stack(prefix, first, len(stack_of(owner)), owner))
    return tuple(found)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """All layers of a language model, by number.

    Raises:
        UnsupportedModel: see `stacks_of`.
    """
    return [layer for stack in stacks_of(model) for layer in stack_of(stack.owner)]


def layer_number(stacks: Iterable[Stack], name: str) -> int | None:
    """Number of the layer that a module or tensor of a live model belongs to; None for all others.

    What stands behind the last layer of the last stack has the numbers that follow.
    """
    for stack in stacks:
        number = name[len(stack.prefix) :].partition(".")[0] if name.startswith(stack.prefix) else ""
        if number.isdecimal():
            return stack.first + int(number)
    return None


def _encoder(model: Any) -> nn.Module | None:
    """The stack that reads a text before the decoder writes; None in a model that only writes."""
    while not hasattr(model, "config") and hasattr(model, "module"):
        model = model.module
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    encoder: nn.Module = model.get_encoder()
    return encoder


def decoder_of(model: nn.Module) -> nn.Module:
    """The stack of decoder layers of a language model: what has `layers`, an embedding and a final norm.

    In a model with towers it is the language model's, not a tower's.

    Raises:
        UnsupportedModel: no such module.
    """
    found = _asked(model) or _with_text_config(model)
    if found is None:
        raise UnsupportedModel(
            f"{type(model).__name__} keeps its decoder layers in no list of their own",
            hint="run it whole: it cannot be streamed layer by layer",
        )
    return found


def has_stack(model: nn.Module) -> bool:
    """Whether `decoder_of` finds one."""
    return (_asked(model) or _with_text_config(model)) is not None


def decoder_path(model: nn.Module) -> str:
    """Module path of `decoder_of`; "" where it is the model itself.

    Raises:
        UnsupportedModel: the model has none.
    """
    decoder = decoder_of(model)
    return next(str(name) for name, module in model.named_modules() if module is decoder)


def stack_name(decoder: nn.Module) -> str:
    """What a decoder calls its list of layers.

    Raises:
        UnsupportedModel: it has none.
    """
    name = _stack_name(decoder)
    if name is None:
        raise UnsupportedModel(f"{type(decoder).__name__} has no list of layers")
    return name


def stack_of(decoder: nn.Module) -> nn.ModuleList:
    """The list of layers of a decoder.

    Raises:
        UnsupportedModel: it has none.
    """
    found: nn.ModuleList = getattr(decoder, stack_name(decoder))
    return found


def besides_text(model: nn.Module) -> tuple[str, ...]:
    """With what the names of modules begin that stand beside the language model: towers, projectors, other decoders.

    Everything is text in a model that is nothing but a language model; in one of several parts, what its decoder and
    its head hold, and what its language model holds beside them.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    if text is None or text is config or not has_stack(model):
        return ()
    path, modules = decoder_path(model), dict(model.named_modules())
    heads = _embeddings(model)
    aside = []
    for parent in _above(path):
        if getattr(modules[parent], "config", None) is text:
            break  # within the language model all is text
        for child, module in modules[parent].named_children():
            name = f"{parent}.{child}".lstrip(".")
            inside = f"{path}.".startswith(f"{name}.") or any(head is own for head in heads for own in module.modules())
            aside += [] if inside else [f"{name}."]
    return tuple(aside)


def _embeddings(model: Any) -> list[nn.Module]:
    """The modules that turn ids into states and states into logits."""
    found = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            found.append(getattr(model, name)())
        except (AttributeError, NotImplementedError):  # a model of several models, none of which is the first
            continue
    return [module for module in found if module is not None]


def _above(path: str) -> list[str]:
    """The modules that hold the one at a path, from the outermost."""
    parts = path.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts))]


def _asked(model: Any) -> nn.Module | None:
    """What the model itself calls its decoder, which may be a model in its turn (Llama 4)."""
    seen: list[Any] = []
    while model is not None and not any(model is other for other in seen):
        if _is_stack(model):
            found: nn.Module = model
            return found
        seen.append(model)
        model = model.get_decoder() if hasattr(model, "get_decoder") else getattr(model, "module", None)
    return None


def _with_text_config(model: Any) -> nn.Module | None:
    """The one stack that was built from the config of the text (Qwen3-Omni, whose thinker has it)."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    found = [module for module in model.modules() if _is_stack(module) and getattr(module, "config", None) is text]
    return found[0] if len(found) == 1 and text is not None else None


def _is_stack(module: Any) -> bool:
    return _stack_name(module) is not None


def _stack_name(module: Any) -> str | None:
    from torch import nn

    if isinstance(getattr(module, "layers", None), nn.ModuleList):
        return "layers"
    count = getattr(getattr(module, "config", None), "num_hidden_layers", None)
    if not isinstance(module, nn.Module) or not isinstance(count, int) or count < 1:
        return None
    lists = [name for name, child in module.named_children() if isinstance(child, nn.ModuleList)]
    fitting = [name for name in lists if len(getattr(module, name)) == count]
    return fitting[0] if len(fitting) == 1 and lists == fitting else None
