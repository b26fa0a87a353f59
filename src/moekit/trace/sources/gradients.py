"""Gradients of a loss at one layer: of the streams, and of each expert's activations and weights.

The whole model is differentiated once, down to the outputs of blocks. What an expert's own values have to do with the
loss follows from the gradient at the block's output, expert by expert, whatever kernel the model runs: dL/df_e(x) is
the gate weight times it, and one expert is differentiated by the plain formula.

Legend: T positions of a forward pass, N of them no padding, n tokens of one expert, H hidden, I expert width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moekit.errors import UnsupportedModel
from moekit.trace.each_expert import plain_expert
from moekit.trace.expert_batch import ExpertBatch, ExpertGradients
from moekit.trace.sources.base import ForwardPass, Place, Probe, Watch
from moekit.trace.sources.streams import feed_forward


class GradientProbe(Probe):
    """Gradients at the outputs of the routed experts, of the block and of the decoder layer.

    Args:
        place: the layer.
        names: which sources are asked for.
    """

    def __init__(self, place: Place, names: frozenset[str]) -> None:
        super().__init__(place)
        self._watches: dict[str, Watch] = {}
        if names & {"gradients", "weight_gradients"}:
            experts = place.require_moe().experts
            if plain_expert(experts, {} if "weight_gradients" in names else None) is None:
                raise UnsupportedModel(
                    f"{type(experts).__name__} does not compute its experts by the plain formula",
                    layer=place.index,
                    hint="load the model unquantized, in one process, or leave out statistics of gradients",
                )
            self._watches["routed"] = Watch(experts, "the experts", self)
        if "stream_gradients" in names:
            self._watches["stream_gradient"] = Watch(place.decoder, "the decoder layer", self)
            self._watches["block_gradient"] = Watch(feed_forward(place), "the feed-forward block", self)
        self.with_weights = "weight_gradients" in names
        self._gradients: dict[str, Tensor] = {}

    def hooks(self) -> Iterator[RemovableHandle]:
        """On experts, block and layer."""
        for watch in self._watches.values():
            yield watch.hook()

    def clear(self) -> None:
        """Forget the pass before."""
        self._gradients.clear()
        for watch in self._watches.values():
            watch.clear()

    def tensors(self) -> dict[str, Tensor]:
        """What the loss must be differentiated by, by name.

        Raises:
            UnsupportedModel: the pass ran without gradients.
        """
        found = {name: watch.output for name, watch in self._watches.items()}
        for name, tensor in found.items():
            if tensor is None or not tensor.requires_grad:
                raise UnsupportedModel(
                    f"the forward pass left no way back from the loss to {name!r}",
                    layer=self.place.index,
                    hint="run it with gradients (torch.enable_grad), or use moekit.trace.record",
                )
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def give(self, gradients: Mapping[str, Tensor]) -> None:
        """Take in the gradients of `tensors`."""
        self._gradients = {name: g.detach().reshape(-1, g.shape[-1]) for name, g in gradients.items()}

    def parts(self, current: ForwardPass) -> Mapping[str, Any]:
        """Gradients after block and layer, [N, H] each, where asked for."""
        named = {name: current.keep(g) for name, g in self._gradients.items() if name != "routed"}
        return named

    def routed_NH(self, current: ForwardPass) -> Tensor:
        """Gradient at the summed output of the routed experts, [N, H]."""
        return current.keep(self._gradients["routed"])


def differentiate(loss: Tensor, probes: Sequence[GradientProbe]) -> None:
    """Give every probe the gradients of one loss, all of one way back.

    Raises:
        UnsupportedModel: the pass ran without gradients, or the loss does not depend on it.
    """
    wanted = [(probe, name, tensor) for probe in probes for name, tensor in probe.tensors().items()]
    try:
        found = torch.autograd.grad(loss, [tensor for _, _, tensor in wanted], allow_unused=True)
    except RuntimeError as error:
        raise UnsupportedModel(
            f"the loss cannot be differentiated: {error}", hint="make it from the output of the recorded pass"
        ) from error
    given: dict[int, dict[str, Tensor]] = {}
    for (probe, name, tensor), gradient in zip(wanted, found, strict=True):
        given.setdefault(id(probe), {})[name] = torch.zeros_like(tensor) if gradient is None else gradient
    for probe in probes:
        probe.give(given[id(probe)])


@torch.enable_grad()
def expert_gradients(
    experts: nn.Module, expert: int, hidden_nH: Tensor, gradient_nH: Tensor, *, weights: bool
) -> tuple[Tensor, Tensor, ExpertGradients]:
    """Run one expert and differentiate it.

    Args:
        experts: the module that holds it.
        expert: which one.
        hidden_nH: its inputs.
        gradient_nH: of the loss with respect to its outputs before gating.
        weights: differentiate by its weights too.

    Returns:
        (inputs of the down projection [n, I], outputs [n, H], gradients).
    """
    leaves: dict[str, Tensor] = {}
    # Only stacks can be differentiated by one expert's weights; activations are there wherever the formula is.
    one = plain_expert(experts, leaves if weights else None)
    assert one is not None  # the probe has asked
    inner_nI, output_nH = one(expert, hidden_nH.detach())
    if inner_nI is None or not inner_nI.requires_grad:
        raise UnsupportedModel(
            f"{type(experts).__name__} does not show how its outputs depend on the inputs of its down projections",
            expert=expert,
            hint="load the model unquantized, in one process, or leave out statistics of gradients",
        )
    wanted = [inner_nI, *(leaves.values() if weights else ())]
    inner_gradient, *rest = torch.autograd.grad(output_nH, wanted, gradient_nH, allow_unused=True)
    made = {name: g for name, g in zip(leaves, rest, strict=False) if g is not None}
    found = ExpertGradients(gradient_nH, inner_gradient.detach(), made)
    return inner_nI.detach(), output_nH.detach(), found


def gradient_batches(
    probe: GradientProbe, current: ForwardPass, hidden_NH: Tensor, index_NK: Tensor, weights_NK: Tensor
) -> Iterator[ExpertBatch]:
    """What each expert saw, gave and how the loss depends on it, expert by expert.

    Args:
        probe: has been given the gradients.
        current: the pass.
        hidden_NH: what the experts were given.
        index_NK: chosen experts; E means none.
        weights_NK: gate weights.
    """
    experts, routed_NH = probe.place.require_moe().experts, probe.routed_NH(current)
    weighs_inputs = probe.place.geometry.weighs_inputs
    for expert in range(probe.place.geometry.experts):
        token_n, slot_n = (index_NK == expert).nonzero(as_tuple=True)
        if not len(token_n):
            continue
        weight_n = weights_NK[token_n, slot_n]
        gate_n1 = weight_n[:, None].to(routed_NH.dtype)
        hidden_nH, gradient_nH = hidden_NH[token_n], routed_NH[token_n]
        if weighs_inputs:
            hidden_nH = hidden_nH * gate_n1.to(hidden_nH.dtype)
        else:
            gradient_nH = gradient_nH * gate_n1
        inner_nI, output_nH, found = expert_gradients(
            experts, expert, hidden_nH, gradient_nH, weights=probe.with_weights
        )
        if weighs_inputs:
            # As everywhere: what an expert gives is taken before gating, so that gate times output is what it adds.
            output_nH = torch.where(gate_n1 != 0, output_nH / gate_n1.to(output_nH.dtype), 0)
            found = replace(found, outputs=found.outputs * gate_n1)
        yield ExpertBatch(expert, weight_n, hidden_nH, inner_nI, output_nH, found)
