"""Methods that decide by trying: each layer is loaded, its block run on the calibration text with some experts only.

Two chains of states walk the text: the unchanged model's, whose block outputs are the targets, and for sequential
methods the one behind the pruned layers, whose block inputs the outcomes are made on. What a block gets and gives lies
where the states lie, so that memory holds one batch of it.

Legend: T positions of a batch, N of them no padding, H hidden, M experts kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moekit._progress import Progress, track
from moekit.anatomy.probe import MoELayer, flat_output
from moekit.anatomy.swap import replaced
from moekit.checkpoint.folder import Checkpoint
from moekit.compress.budget.sizes import Budget
from moekit.compress.engine.calls import BlockCalls, see_block
from moekit.compress.engine.describing import layer_record, plan_file
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.measuring import empty_statistics, geometries_of, sizes_of
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.plan import LayerRecord, WeightPlan
from moekit.compress.engine.request import PlanRequest
from moekit.compress.engine.resize import read_block, resized_block, resized_config
from moekit.compress.weights import LayerWeights
from moekit.errors import BadConfig
from moekit.streaming.passes import Passes
from moekit.streaming.states import States
from moekit.trace.store import Trace
from moekit.trace.streamed import Streamed


def plan_by_search(
    checkpoint: Checkpoint, trace: Trace, streamed: Streamed, request: PlanRequest, progress: Progress | None = None
) -> WeightPlan:
    """Let a searching method decide layer by layer.

    Args:
        checkpoint: what is to change.
        trace: of the same text, for the plan's account of it; with the load, which tells experts never routed.
        streamed: the calibration text on its way through the checkpoint, not run yet or run already.
        request: method, budget and the rest; the budget must be uniform.
        progress: told layer by layer.

    Raises:
        BadConfig: the budget is impossible, or not uniform.
        UnsupportedModel: a block does not stand alone, so it cannot be run alone.
    """
    if isinstance(request.budget, Budget) and request.budget.scope != "uniform":
        raise BadConfig("a search needs to know how many experts each layer keeps", hint="use a uniform budget")
    geometries = geometries_of(checkpoint)
    sizes = sizes_of(checkpoint, geometries, request.top_k)
    shares = request.method.allocate({}, {}, request.budget, sizes)
    layers = _Search(streamed, request, shares, trace).run(progress)
    return WeightPlan(plan_file(checkpoint, request, layers, trace.meta, trace.digest), empty_statistics(geometries))


class _Search:
    def __init__(self, streamed: Streamed, request: PlanRequest, counts: dict[int, int], trace: Trace) -> None:
        self.streamed = streamed
        self.request = request
        self.counts = counts
        self.loads = trace.require(("load",))
        self.walk = streamed.walk
        self.masks = [current.mask_T for current in streamed.passes]

    @torch.no_grad()
    def run(self, progress: Progress | None) -> dict[int, LayerRecord]:
        loader, found = self.streamed.loader, {}
        plain = self.walk.passes("search-plain")
        pruned = self.walk.passes("search-pruned") if self.request.method.sequential else None
        self.calls, self.targets = (
            BlockCalls(self.walk.new_states("search-inputs")),
            self.walk.new_states("search-targets"),
        )
        for passes in (plain, pruned):
            if passes is not None:
                passes.begin_loaded()
        for index in track(range(loader.layers), "searching", progress):
            with loader.loaded(index):
                moe = self.walk.moe(index)
                if moe is None or index not in self.counts:
                    self._advance(index, plain, pruned, None)
                else:
                    found[index] = self._layer(moe, plain, pruned)
        for done in (plain, pruned, self.calls.states, self.targets):
            if done is not None:
                done.close()
        return found

    def _layer(self, moe: MoELayer, plain: Passes, pruned: Passes | None) -> LayerRecord:
        index, weights = moe.index, read_block(moe, self.streamed.loader.model.config)
        see_block(moe, plain, self.calls, self.targets, go_on=True)
        if pruned is not None:
            see_block(moe, pruned, self.calls)
        config = self.streamed.loader.model.config
        block = _Block(moe, weights, config, self.request, self.calls, self.targets, self.masks)
        protected = frozenset((self.request.protected or {}).get(index, ()))
        inputs = LayerInputs(index, moe.geometry, self.loads[index], lambda: weights, self.request.seed, protected)
        outcome = self.request.method.search(inputs, block, self.counts[index])
        if pruned is not None:
            self._advance(index, None, pruned, block.changed(outcome))
        rise = outcome.figures.get("rise", [])
        scores = torch.tensor(rise if isinstance(rise, list) else [rise], dtype=torch.float64)
        return layer_record(inputs, scores, _readable(outcome))

    def _advance(self, index: int, plain: Passes | None, pruned: Passes | None, block: nn.Module | None) -> None:
        loader = self.streamed.loader
        moe = self.walk.moe(index) if block is not None else None
        with replaced(loader.model, moe.name, block) if moe is not None else contextlib.nullcontext():
            for passes in (plain, pruned):
                for number in range(len(passes) if passes is not None else 0):
                    assert passes is not None
                    passes.run(index, number)
                    passes.go_on(index, number)


def _readable(outcome: LayerOutcome) -> LayerOutcome:
    return outcome.model_copy(update={"figures": {k: v for k, v in outcome.figures.items() if k != "rise"}})


class _Block:
    """A layer's MoE block on the calibration inputs, with some experts only."""

    def __init__(
        self,
        moe: MoELayer,
        weights: LayerWeights,
        config: Any,
        request: PlanRequest,
        calls: BlockCalls,
        targets: States,
        masks: Sequence[Tensor],
    ) -> None:
        self._moe = moe
        self._weights = weights
        self._calls = calls
        self._targets = targets
        self._masks = masks
        self._config: Callable[[int], Any] = lambda count: resized_config(
            config, count, top_k=request.top_k, groups=request.groups
        )

    def changed(self, outcome: LayerOutcome) -> nn.Module:
        """The block with what an outcome keeps."""
        return self._with(outcome.keep)

    def _with(self, kept: Sequence[int]) -> nn.Module:
        outcome = LayerOutcome(keep=tuple(kept))
        return resized_block(self._moe, self._config(len(kept)), self._weights.select(kept), outcome)

    def loss(self, kept: Sequence[int]) -> float:
        """Sum over batches of ||Z - Z'||_F over tokens that are no padding, in fp64."""
        block = self._moe.block if len(kept) == self._weights.experts else self._with(kept)
        device, total = self._weights.up_EIH.device, 0.0
        for number, mask_T in enumerate(self._masks):
            args, kwargs = self._calls.get(number, device)
            made_NH = flat_output(block(*args, **kwargs))[mask_T]
            target_NH = self._targets.get(number).to(device).flatten(0, 1)[mask_T]
            total += float((target_NH.double() - made_NH.double()).norm())
        return total
