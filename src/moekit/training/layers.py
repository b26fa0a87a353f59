"""The MoE layers of a model in training: also under peft's wrappers, with what its losses must know of each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import ReferenceType, WeakValueDictionary, ref

from torch import Tensor, nn

from moekit.anatomy.gate import Gate
from moekit.anatomy.identify import identify_gate
from moekit.anatomy.probe import MoELayer, find_moe_layers, iterate_moe_layers
from moekit.anatomy.refusing import is_dense
from moekit.errors import UnsupportedModel
from moekit.training.losses import Scores


@dataclass(frozen=True, eq=False)
class TrainedLayer:
    """One MoE layer as training sees it.

    Attributes:
        layer: the block; its router may not follow the contract.
        scores: how its logits become gate probabilities.
        bias: its selection bias (a live tensor of E elements), None without.
    """

    layer: MoELayer
    scores: Scores
    bias: Tensor | None

    @property
    def index(self) -> int:
        """Decoder layer index."""
        return self.layer.index

    @property
    def router(self) -> nn.Module:
        """The router."""
        return self.layer.require_router()

    @property
    def experts(self) -> int:
        """E."""
        return self.layer.geometry.experts


@dataclass(frozen=True, eq=False)
class _Remembered:
    """Layers of a model whose routers are not to be asked again.

    Attributes:
        model: the model; another may have its id later.
        layers: its layers.
    """

    model: ReferenceType[nn.Module]
    layers: list[TrainedLayer]


# By the model's id, each for the length of a `remembered_layers`, which alone holds it: where nobody ends that, as
# after a run that failed, no model is kept alive.
_known: WeakValueDictionary[int, _Remembered] = WeakValueDictionary()


def _remembered(model: nn.Module) -> list[TrainedLayer] | None:
    found = _known.get(id(model))
    return None if found is None or found.model() is not model else found.layers


@contextmanager
def remembered_layers(model: nn.Module, found: list[TrainedLayer] | None = None) -> Iterator[None]:
    """Ask the routers once for all that happens inside.

    Args:
        model: the model.
        found: its layers, where they were found before: once parameters are dealt out to ranks (FSDP), a router alone
            does not answer.
    """
    if _remembered(model) is not None:
        yield
        return
    held = _known[id(model)] = _Remembered(ref(model), trained_layers(model) if found is None else found)
    try:
        yield
    finally:
        if _known.get(id(model)) is held:
            del _known[id(model)]


@contextmanager
def without_wrappers(model: nn.Module) -> Iterator[None]:
    """Take peft's wrappers off for a moment, so that blocks look as the family built them.

    peft puts a wrapper in the place of a module whose parameters it adapts (several, nested, for experts); the module
    itself stays what it was, so what is found meanwhile is what runs later.
    """
    taken: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            inner = getattr(child, "get_base_layer", None)
            if child is not None and callable(inner) and not hasattr(parent, "get_base_layer"):
                taken.append((parent, name, child))
                parent._modules[name] = inner()
    try:
        yield
    finally:
        for parent, name, child in taken:
            parent._modules[name] = child


def moe_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE blocks of a model, also of one that peft has wrapped, whatever their routers answer.

    Unlike `find_moe_layers` it takes models with several blocks in one decoder layer, and gives none for a Mixture of
    Experts whose experts lie in a form that moekit does not know: their weights train like all others.

    Raises:
        UnsupportedModel: a dense model.
    """
    if (known := _remembered(model)) is not None:
        return [layer.layer for layer in known]
    with without_wrappers(model):
        try:
            return find_moe_layers(model)
        except UnsupportedModel:
            if is_dense(model):
                raise
            return sorted(iterate_moe_layers(model), key=lambda layer: layer.index)


def trained_layers(model: nn.Module) -> list[TrainedLayer]:
    """All MoE blocks of a model with their scoring and selection bias, found by asking the routers.

    A gate that is none of the known ones counts as a softmax without a bias, and so does a block without a router that
    follows the contract.

    Raises:
        UnsupportedModel: a dense model.
    """
    if (known := _remembered(model)) is not None:
        return known
    found = []
    for layer in moe_layers(model):
        scores: Scores = "softmax"
        bias = None
        try:
            spec = identify_gate(layer)
        except UnsupportedModel:
            pass
        else:
            scores = "sigmoid" if spec.scoring == "sigmoid" else "softmax"
            bias = Gate(spec, layer.gate_home).bias()
        found.append(TrainedLayer(layer, scores, bias))
    return found
