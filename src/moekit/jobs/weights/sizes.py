"""How large a result will be, before any work: budgets that a model can have, and bytes on disk.

Legend: E experts.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError

from moekit._device import DtypeName, named_dtype
from moekit._validation import faults
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.precision import reading_dtype, stored_dtype
from moekit.checkpoint.quantized.weights import quantized_weights
from moekit.checkpoint.safety import TensorInfo
from moekit.checkpoint.skeleton import empty_model
from moekit.compress.budget.sizes import Budget, bounds, check_total, total_count, uniform_count
from moekit.compress.engine.apply import refuse_rewriting
from moekit.compress.engine.grouped import check_grouping, routing_groups
from moekit.compress.engine.layout import prepare
from moekit.compress.engine.limits import check_stock
from moekit.compress.engine.measuring import redirect_bytes, sizes_of
from moekit.compress.engine.mtp import Mtp
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.redirecting import answering_layers, check_redirectable
from moekit.compress.engine.request import PlanRequest
from moekit.errors import BadConfig, OutOfBudget, UnsupportedModel
from moekit.jobs.estimates import disk_bytes
from moekit.jobs.shared.opened import OpenedModel
from moekit.jobs.weights.mtp import some_kept

logger = logging.getLogger(__name__)


def budget_of(keep: Any, scope: str, least: int | None, most: int | None) -> Budget:
    """A budget from options.

    Raises:
        BadConfig: an impossible value.
    """
    if scope == "uniform" and (least is not None or most is not None):
        raise BadConfig(
            "least and most bound what a layer keeps where layers may differ",
            hint="say --scope global, or leave them out",
        )
    try:
        return Budget(keep=keep, scope=scope, least=least, most=most)
    except ValidationError as error:
        raise BadConfig(
            f"the budget is impossible: {faults(error).replace('Value error, ', '')}",
            hint="keep a number of experts from 1 up, a fraction such as 0.5 or 1/2 (1.0 for all), or bytes such as "
            "12GiB",
        ) from error


def refuse_uneven(budget: Budget, stock_only: bool) -> None:
    """Refuse layers of different sizes where only what stock transformers loads is wanted.

    Raises:
        BadConfig: both are asked for.
    """
    if budget.scope == "global" and stock_only:
        raise BadConfig(
            "layers that keep different numbers of experts do not load in stock transformers",
            hint="say --scope uniform, or leave --stock-only out: moekit.load opens the result",
        )


def warn_uneven(budget: Budget) -> None:
    """Say before the work who can load what comes of it."""
    if budget.scope == "global":
        logger.warning("layers may keep different numbers of experts: the result loads through moekit.load only")


@dataclass(frozen=True)
class ResultSize:
    """What is known of the result before any work.

    Attributes:
        counts: decoder layer -> experts that stay; with a global budget an even share of them.
        nbytes: bytes of the result's files.
        tensors: bytes of its tensors alone.
    """

    counts: dict[int, int]
    nbytes: int
    tensors: int


def size_of_result(source: OpenedModel, request: PlanRequest, name: str, *, stock_only: bool, mtp: Mtp) -> ResultSize:
    """Refuse a request that this model cannot fulfil, whatever is decided; no weight is read.

    Raises:
        BadConfig: the budget against the choices a token makes, routing groups, protected experts, a routing policy.
        BadCheckpoint, UnsupportedModel: experts that cannot be told apart on disk; a method that changes weights, where
            these are quantized.
    """
    if request.method.rewrites or request.repair is not None:
        refuse_rewriting(source.checkpoint)
    counts = _counts(source, request)
    groups = routing_groups(source.checkpoint.config) if request.groups == "equal" else 1
    if groups > 1:
        if request.keep_budget.scope == "global":
            raise BadConfig(
                "layers that keep different numbers of experts cannot all keep equal routing groups",
                hint="say --scope uniform, or --groups free",
            )
        check_grouping(request.method, name, counts, groups)
    for layer, experts in (request.protected or {}).items():
        if len(experts) > counts[layer] and request.keep_budget.scope == "uniform":
            raise BadConfig(
                f"{len(experts)} experts are protected, but {counts[layer]} may stay",
                layer=layer,
                hint=f"keep at least {len(experts)}, or protect fewer",
            )
    beside = _redirect_bytes(source, counts, stock_only) if request.method.redirects else 0
    outcomes = {layer: _any_decision(source.geometries[layer].experts, n, groups) for layer, n in counts.items()}
    work = prepare(
        source.checkpoint,
        outcomes,
        top_k=request.top_k,
        groups=request.groups,
        mtp=mtp,
        mtp_kept=some_kept(source.checkpoint, mtp, counts),
        stock_only=stock_only,
    )
    tensors, limit = sum(tensor.spec.nbytes for tensor in work.kept), request.keep_budget.max_bytes
    if mtp != "drop" and limit is not None and tensors > limit:
        raise BadConfig(
            f"{tensors:,} bytes would be written, more than {limit:,}, as multi-token-prediction layers stay, too",
            hint="say --mtp drop, or allow more",
        )
    return ResultSize(counts, work.nbytes + beside, tensors + beside)


def _redirect_bytes(source: OpenedModel, counts: Mapping[int, int], stock_only: bool) -> int:
    """Bytes, at most, of what lets routers choose among experts that are gone; 0 where none goes.

    Raises:
        BadConfig: the result must load in stock transformers.
        UnsupportedModel: a router of this family cannot go on by its old rows.
    """
    if all(counts[layer] == geometry.experts for layer, geometry in source.geometries.items()):
        return 0
    check_stock(stock_only, source.checkpoint.path)
    check_redirectable(answering_layers(empty_model(source.checkpoint)), source.checkpoint.path)
    return redirect_bytes(source.geometries, counts)


def _any_decision(experts: int, keep: int, groups: int) -> LayerOutcome:
    """An outcome of the right size: how large the result is does not depend on who stays."""
    size, share = experts // groups, keep // groups
    return LayerOutcome(keep=tuple(group * size + e for group in range(groups) for e in range(share)))


def _counts(source: OpenedModel, request: PlanRequest) -> dict[int, int]:
    sizes = sizes_of(source.checkpoint, source.geometries, request.top_k, redirects=request.method.redirects)
    if request.keep_budget.scope == "uniform":
        return uniform_count(request.keep_budget, sizes)
    least, most = bounds(request.keep_budget, sizes)
    total = total_count(request.keep_budget, sizes)
    check_total(total, least, most, sizes)
    counts = {layer: min(least, experts) for layer, experts in sizes.experts.items()}
    room = {layer: min(most, experts) for layer, experts in sizes.experts.items()}
    while total > sum(counts.values()):
        layer = min((layer for layer in counts if counts[layer] < room[layer]), key=lambda n: (counts[n], n))
        counts[layer] += 1
    return counts


def check_disk(out: Path, scratch: Path, output: int, between: int) -> None:
    """Refuse what will not fit on the disk.

    Args:
        out: the folder to be written.
        scratch: where work in between lies; what is there already from an interrupted run need not fit again.
        output: bytes of the result.
        between: bytes of work in between.

    Raises:
        OutOfBudget: naming needed and free bytes.
    """
    folder = out.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free + (disk_bytes(scratch) or 0)
    need = output + between
    if need > free:
        raise OutOfBudget(
            f"the disk is too small: {need:,} bytes are needed ({output:,} for the result, {between:,} while it is "
            f"made), {free:,} bytes are free",
            file=folder,
            hint="free some space or write to another disk; nothing was done yet",
        )


class Running(Protocol):
    """Options of jobs that run layers."""

    @property
    def device(self) -> str:
        """Where layers run."""

    @property
    def dtype(self) -> DtypeName:
        """Of weights in memory."""


@dataclass(frozen=True)
class Precision:
    """Bytes of a number.

    Attributes:
        stored: as the checkpoint holds it.
        running: of weights in memory, and so of hidden states.
    """

    stored: int
    running: int


def precision_of(source: OpenedModel, running: Running) -> Precision:
    """How wide numbers are on disk and in memory: half precision runs as float32 where a device would emulate it."""
    stored = stored_dtype(source.checkpoint.config, source.checkpoint.tensors) or torch.float32
    read = reading_dtype(source.checkpoint, named_dtype(running.dtype), running.device) or stored
    return Precision(stored.itemsize, read.itemsize)


def bytes_between(
    source: OpenedModel,
    running: Running,
    *,
    tokens: int = 0,
    proof_tokens: int = 0,
    variants: int = 0,
    rewritten: int = 0,
    made: int = 0,
) -> int:
    """Bytes on disk while a run works: hidden states of calibration and proof, and rewritten layers.

    Args:
        source: the model.
        running: where layers run, and how wide.
        tokens: that are decided on.
        proof_tokens: held-out ones.
        variants: that are measured beside the unchanged model.
        rewritten: bytes of layers that are rewritten by a plan, as they are stored.
        made: bytes of layers that are made as the text stands at them, as they are stored.
    """
    hidden = next(iter(source.geometries.values())).hidden
    wide = precision_of(source, running)
    # Calibration goes from one set of states to another; windows of the proof overlap by half.
    states = hidden * wide.running * (2 * tokens + 2 * proof_tokens * (variants + 1))
    # The proof rewrites layers as they run, the writing as they are stored: both are kept. What was made serves both.
    proved = rewritten * wide.running // wide.stored if proof_tokens and wide.running != wide.stored else 0
    return states + rewritten + proved + made


def rewritten_bytes(source: OpenedModel, size: ResultSize, request: PlanRequest) -> int:
    """Bytes of the layers that are made anew, as they are stored; 0 where experts are only dropped."""
    if not request.method.rewrites and request.repair is None:
        return 0
    each = layer_bytes(source)
    return sum(each[n] * count // source.geometries[n].experts for n, count in size.counts.items())


def layer_bytes(source: OpenedModel) -> dict[int, int]:
    """Bytes of all routed experts of each layer."""
    sizes = sizes_of(source.checkpoint, source.geometries)
    return {layer: each * sizes.experts[layer] for layer, each in sizes.expert_bytes.items()}


def memory_of(source: OpenedModel, running: Running) -> int:
    """Bytes of memory where layers run one at a time: two of the largest, experts and all, and what they work on."""
    wide, layers = precision_of(source, running), dict[int, int]()
    for name, info in _unpacked(source.checkpoint).items():
        layer, _ = source.checkpoint.where(name)
        if layer is not None:
            layers[layer] = layers.get(layer, 0) + info.numel * wide.running
    return 2 * max(layers.values()) + (1 << 30)


def _unpacked(checkpoint: Checkpoint) -> Mapping[str, TensorInfo]:
    """Tensors as they are in memory, where quantized weights are floats."""
    try:
        packed = quantized_weights(checkpoint)
    except UnsupportedModel:  # nothing runs its layers
        packed = None
    return checkpoint.tensors if packed is None else packed.tensors
