"""Classes that only hold other models, run as the one of them that writes text (Qwen3-Omni: its thinker).

Such a class has no forward pass of its own: it generates by asking one model after the other. A text goes through the
part whose config is the language model's. The whole stays what it is, and is loaded and saved as that; where it is
called, it answers as this part does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, cast

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# What is asked of the whole and answered by the part; `generate` stays the whole's, which may speak as well.
_ANSWERED_BY_PART = ("get_input_embeddings", "get_output_embeddings", "get_decoder")


class RunAsPart:
    """Laid over the class of a whole, so that a call of it is one of its part that writes text.

    Attributes:
        writing_part: name of the part.
    """

    writing_part: ClassVar[str]


def has_own_forward(kind: type[PreTrainedModel]) -> bool:
    """Whether models of a class run by themselves."""
    from torch import nn

    return kind.forward is not nn.Module.forward


def writing_part(config: PreTrainedConfig) -> str | None:
    """Field of a config whose part is the language model: "thinker_config"; None where none is, or not one alone."""
    text = config.get_text_config()
    parts = ((key, getattr(config, key, None)) for key in config.sub_configs)
    found = [key for key, part in parts if part is not None and part.get_text_config() is text]
    return found[0] if len(found) == 1 else None


def run_as_part(model: PreTrainedModel) -> PreTrainedModel:
    """A model that runs: itself, or, where it has no forward pass, itself with its class laid over.

    Its class keeps its name, its tensors and what it saves.

    Args:
        model: made or loaded; changed in place.
    """
    key = None if has_own_forward(type(model)) else writing_part(model.config)
    if key is None:
        return model
    kind, whole = type(getattr(model.config, key)), cast("Any", type(model))
    for name, child in model.named_children():
        if type(getattr(child, "config", None)) is kind:
            model.__class__ = _laid_over(whole, cast("Any", type(child)), name)
            break
    return model


def writer_of(model: PreTrainedModel) -> PreTrainedModel:
    """The model whose `generate` continues a text with text: itself, or its part that writes."""
    part: PreTrainedModel = getattr(model, model.writing_part) if isinstance(model, RunAsPart) else model
    return part


@functools.lru_cache(maxsize=16)
def _laid_over(whole: Any, part: Any, name: str) -> type[PreTrainedModel]:
    own: dict[str, Any] = {method: _asking(part, name, method) for method in _ANSWERED_BY_PART}

    # The signature is the part's: what a model can be given is read from it.
    @functools.wraps(part.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, name)(*args, **kwargs)

    # transformers reads the class's name and the file of its module.
    place = {"__module__": whole.__module__, "__qualname__": whole.__qualname__}
    made = type(whole.__name__, (RunAsPart, whole), {**place, **own, "forward": forward, "writing_part": name})
    return cast("type[PreTrainedModel]", made)


def _asking(part: type[Any], name: str, method: str) -> Callable[..., Any]:
    @functools.wraps(getattr(part, method))
    def ask(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(getattr(self, name), method)(*args, **kwargs)

    return ask
