"""Experts that go while the router goes on choosing among all of them: where their tokens are sent instead.

An outcome's `redirect` names, for each old expert, the new one that takes its tokens, or nobody: then its gate is lost,
or multiplies a constant that answers in its place, a *novice*. Weights alone cannot say that, so two small runtime
parts go with them: the routing policy merge-redirect holds all of the router's old rows, and the experts part novices
the constants. Stock transformers opens the same folder with the rows of the experts that are left.

Legend: T tokens, H hidden, E experts before, M experts after, P experts that nobody took over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from moekit import catalogue
from moekit.anatomy.asking import ask_router, passed_names, stirred
from moekit.anatomy.gate import GateSpec
from moekit.anatomy.identify import identify_gate
from moekit.anatomy.probe import MoELayer, find_moe_layers
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.layout import layout_of
from moekit.checkpoint.parts import PartEntry, PartTensor
from moekit.checkpoint.reading import TensorReader
from moekit.checkpoint.skeleton import empty_model
from moekit.compress.engine.outcome import LayerOutcome
from moekit.errors import UnsupportedModel
from moekit.experts.methods.novices import Novices
from moekit.routing.methods.merge_redirect import MergeRedirect, share_rows
from moekit.runtime.attachment import attach

# Decoder layer -> constants by old expert, [E, H]; rows of experts that stay are not read.
NovicesByLayer = Mapping[int, Tensor]

_HINT = (
    "let the router choose among the experts that are left (mone: --set operator=drop; merging: --set "
    "router=representative)"
)


@dataclass(frozen=True, eq=False)
class Redirection:
    """The parts that carry a redirect out.

    Attributes:
        policy: routes by all of the old rows.
        rows: decoder layer -> its tensors.
        novices: decoder layer -> tensors of the part `Novices`; layers without constants are left out.
    """

    policy: MergeRedirect
    rows: Mapping[int, dict[str, Tensor]]
    novices: Mapping[int, dict[str, Tensor]] = field(default_factory=dict)

    def _parts(self) -> list[tuple[Any, Mapping[int, dict[str, Tensor]]]]:
        return [(self.policy, self.rows), *([(Novices(), self.novices)] if self.novices else [])]

    def attach(self, model: nn.Module) -> None:
        """Put the parts into a live model whose experts have gone already."""
        for part, constants in self._parts():
            attach(model, part, constants)

    @property
    def entries(self) -> list[PartEntry]:
        """What the record of a checkpoint says of the parts."""
        found = []
        for part, constants in self._parts():
            known = catalogue.of(type(part))
            config = part.model_dump(mode="json")
            found.append(PartEntry(name=known.name, kind=known.kind, config=config, layers=sorted(constants)))
        return found

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The parts' tensors by the names that a checkpoint gives them."""
        return {
            str(PartTensor("constants", number, layer, name)): tensor
            for number, (_, constants) in enumerate(self._parts())
            for layer, named in sorted(constants.items())
            for name, tensor in named.items()
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def is_redirected(outcomes: Mapping[int, LayerOutcome]) -> bool:
    """Whether tokens of some expert go elsewhere than the expert itself."""
    return any(outcome.redirect not in (None, tuple(range(outcome.experts))) for outcome in outcomes.values())


def check_redirectable(layers: Sequence[MoELayer], file: Path | None = None) -> GateSpec:
    """The gate of all layers' routers, where they can go on by their old rows; no weight is read.

    Args:
        layers: MoE layers, with or without weights.
        file: for the message.

    Raises:
        UnsupportedModel: a router whose logits are no plain product of the hidden state and a matrix, whose gate is not
            known, or that differs from layer to layer.
    """
    specs = [_gate_of(layer, file) for layer in layers]
    for layer, spec in zip(layers, specs, strict=True):
        if spec != specs[0]:
            raise UnsupportedModel(
                "the router chooses otherwise than in other layers", file=file, layer=layer.index, hint=_HINT
            )
    return specs[0]


def _gate_of(layer: MoELayer, file: Path | None) -> GateSpec:
    router = layer.require_router()
    spec = identify_gate(layer)
    twin = stirred(router).float()  # a factor near 1 would pass for rounding in half precision
    rows_TH = torch.randn(16, layer.geometry.hidden, generator=torch.Generator().manual_seed(1))
    passed = [torch.zeros(getattr(layer.block, name).shape) for name in layer.passed]
    answer = ask_router(twin, rows_TH, stock=True, passed=passed)
    below = layer.router_name.removeprefix(layer.name).lstrip(".")
    named = {f"{below}.{name}": t for name, t in (*twin.named_parameters(), *twin.named_buffers())}
    named |= dict(zip(layer.passed, passed, strict=True))
    if answer is not None and layer.seam == "experts":
        rows, bias, _ = _router_rows(layer, spec, named)
        made_TE = linear(rows_TH, rows, bias)
        if made_TE.shape == answer[0].shape and torch.allclose(made_TE, answer[0].float(), rtol=1e-4, atol=1e-4):
            return spec
    raise UnsupportedModel(
        f"{type(router).__name__} scores more than experts, or by more than a matrix: its old rows cannot go on "
        "choosing beside fewer experts",
        file=file,
        layer=layer.index,
        hint=_HINT,
    )


def _router_rows(
    layer: MoELayer, spec: GateSpec, named: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The matrix [E, H], the bias and the selection bias [E] among a router's tensors, by name below the block.

    Raises:
        UnsupportedModel: there is no such matrix, or more than one.
    """
    experts, hidden = layer.geometry.experts, layer.geometry.hidden
    below = "" if layer.passed else layer.router_name.removeprefix(layer.name).lstrip(".") + "."
    choice = f"{below}{spec.bias}" if spec.bias else ""
    rows = [t for name, t in named.items() if tuple(t.shape) == (experts, hidden)]
    bias = [t for name, t in named.items() if tuple(t.shape) == (experts,) and name != choice]
    known = not choice or choice in named
    if len(rows) != 1 or len(bias) > 1 or not known:
        raise UnsupportedModel(
            f"among the router's tensors are {len(rows)} matrices of {experts} x {hidden} and {len(bias)} biases, not "
            "one and at most one",
            layer=layer.index,
            hint=_HINT,
        )
    return rows[0], bias[0] if bias else None, named[choice].reshape(-1) if choice else None


def redirection(
    layers: Sequence[MoELayer],
    routers: Mapping[int, Mapping[str, Tensor]],
    outcomes: Mapping[int, LayerOutcome],
    novices: NovicesByLayer | None = None,
    file: Path | None = None,
) -> Redirection:
    """The parts that carry out what outcomes redirect.

    Args:
        layers: as they are before, with or without weights.
        routers: decoder layer -> its router's tensors before, by name below the block.
        outcomes: of every layer; those without a `redirect` get no parts.
        novices: constants of experts that nobody takes over; a layer that is not named has none.
        file: for messages.

    Raises:
        UnsupportedModel: see `check_redirectable`.
    """
    chosen = [layer for layer in layers if outcomes[layer.index].redirect is not None]
    spec = check_redirectable(chosen, file)
    rows, constants = {}, {}
    for layer in chosen:
        table = outcomes[layer.index].redirect or ()
        nobody = [old for old, new in enumerate(table) if new is None]
        taken = [[old for old, new in enumerate(table) if new == n] for n in range(outcomes[layer.index].experts)]
        tensors = {name: t.detach().cpu() for name, t in routers[layer.index].items()}
        rows[layer.index] = share_rows(taken, *_router_rows(layer, spec, tensors), nobody=nobody)
        if nobody and novices is not None and layer.index in novices:
            constants[layer.index] = {"novices": novices[layer.index][nobody].float().cpu().contiguous()}
    policy = MergeRedirect(groups=spec.groups, top_groups=spec.top_groups, group_score=spec.group_score)
    return Redirection(policy, rows, constants)


def redirection_on_disk(
    checkpoint: Checkpoint, outcomes: Mapping[int, LayerOutcome], novices: NovicesByLayer | None = None
) -> Redirection | None:
    """The same for a checkpoint, of which only the routers are read; None where nothing is redirected.

    Raises:
        UnsupportedModel: see `check_redirectable`; or the router lies on disk in another form than in memory.
    """
    if not is_redirected(outcomes):
        return None
    model = empty_model(checkpoint)
    layers = answering_layers(model)
    return redirection(layers, _routers(checkpoint, model, layers), outcomes, novices, checkpoint.path)


def answering_layers(model: PreTrainedModel) -> list[MoELayer]:
    """The layers of a model without weights, whose routers get random ones: some families' cannot be asked without.

    Args:
        model: nobody else's.
    """
    for layer in find_moe_layers(model):
        for name, child in layer.block.named_children():
            # One that its block gives tensors is not even known as the chooser before these hold numbers.
            passed = passed_names(child, layer.block) or ()
            if layer.router is None and child is not layer.experts and (passed or child is layer.chooser):
                layer.block._modules[name] = stirred(child)
                for given in passed:
                    empty = getattr(layer.block, given)
                    held: Any = layer.block._parameters if given in layer.block._parameters else layer.block._buffers
                    made = torch.zeros_like(empty, device="cpu")
                    held[given] = nn.Parameter(made) if isinstance(empty, nn.Parameter) else made
    return find_moe_layers(model)


def _routers(checkpoint: Checkpoint, model: Any, layers: Sequence[MoELayer]) -> dict[int, dict[str, Tensor]]:
    layout = layout_of(model)
    on_disk = {layout.live_name(name): name for name in checkpoint.tensors}
    found: dict[int, dict[str, Tensor]] = {}
    with TensorReader(checkpoint) as reader:
        for layer in layers:
            router = layer.require_router()
            names = [f"{layer.router_name}.{name}" for name in router.state_dict()]
            names += [f"{layer.name}.{name}" for name in layer.passed]
            found[layer.index] = {}
            for name in names:
                source = on_disk.get(name)
                if source is None or checkpoint.tensors[source].shape != layout.live[name]:
                    raise UnsupportedModel(
                        f"the router's tensor {name} lies on disk in another form",
                        file=checkpoint.path,
                        layer=layer.index,
                        hint="load and save the model with transformers once, then prune what it saved",
                    )
                found[layer.index][name.removeprefix(f"{layer.name}.")] = reader.read(source)
    return found
