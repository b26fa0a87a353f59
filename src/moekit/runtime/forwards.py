"""A module's class changes while parts hang on it: what a forward set on the module itself makes of that.

accelerate sets one on every module of a model that lies on several devices: it moves inputs and weights, then calls the
class's forward, which it keeps as `_old_forward`, bound when it came. Such a bound forward is bound anew.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import MethodType
from typing import Any

from torch import nn

from moekit.errors import UnsupportedModel

_KEPT = ("_old_forward", "forward")


class ForwardAbove(ABC):
    """A forward set on a module that asks the module's class, as it is then, for everything it does not do itself."""

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's answer."""


def change_class(module: nn.Module, to: type[nn.Module]) -> None:
    """Change a module's class; forwards of the old one that are bound to the module become those of the new one."""
    before = type(module)
    module.__class__ = to
    for name in _KEPT:
        if _is_of_class(module.__dict__.get(name), module, before):
            setattr(module, name, MethodType(to.forward, module))


def has_foreign_forward(module: nn.Module) -> bool:
    """Whether something runs in the place of the class's forward, of which nobody knows if it ever calls that."""
    own = module.__dict__.get("forward")
    if own is None or isinstance(own, ForwardAbove):
        return False
    return not _is_of_class(module.__dict__.get("_old_forward", own), module, type(module))


def refuse_foreign_forward(module: nn.Module, layer: int) -> None:
    """Refuse a module whose parts would not be heard.

    Raises:
        UnsupportedModel: something runs in the place of its class's forward.
    """
    if has_foreign_forward(module):
        raise UnsupportedModel(
            f"another library has set a forward of its own on {type(module).__name__}, so parts would not be heard",
            layer=layer,
            hint="attach the parts before that library changes the model, or undo its change first",
        )


def _is_of_class(bound: object, module: nn.Module, cls: type[nn.Module]) -> bool:
    return isinstance(bound, MethodType) and bound.__self__ is module and bound.__func__ is cls.forward
