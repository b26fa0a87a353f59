"""What rounding is asked for, of which model, and what is told of it."""

from __future__ import annotations

from typing import Any, cast

from moekit.checkpoint.precision import stored_dtype
from moekit.compress.budget.bits import BitBudget, check_group, parse_bits
from moekit.compress.engine.outcome import PARTS
from moekit.compress.engine.plan import WeightPlan, budget_as
from moekit.compress.engine.quantizing import QuantizeMethod, columns_of, packed_bits_of, parts_of
from moekit.compress.engine.request import PlanRequest
from moekit.compress.engine.rewriting import PlannedRewrite
from moekit.errors import BadConfig
from moekit.jobs.options.quantize import QuantizeOptions
from moekit.jobs.shared.opened import OpenedModel
from moekit.jobs.weights import inplace_request
from moekit.jobs.weights.inplace_job import settings_told


def method_of(options: QuantizeOptions) -> QuantizeMethod:
    """The method that was asked for, with its settings."""
    return cast(QuantizeMethod, inplace_request.method_of(options))


def budget_of(options: QuantizeOptions) -> BitBudget:
    """The bits that were asked for.

    Raises:
        BadConfig: none, or such as no weight can have.
    """
    if options.bits is None:
        raise BadConfig("nothing says how many bits a weight gets", hint="--bits 3, or --bits gate=2,up=2,down=3")
    return BitBudget(bits=parse_bits(options.bits))


def request_of(options: QuantizeOptions, source: OpenedModel, seed: int) -> PlanRequest:
    """What is asked for, of this model's layers.

    Raises:
        BadConfig: groups that do not divide a matrix, or a part that the experts do not have.
    """
    method, budget = method_of(options), budget_of(options)
    for layer, geometry in source.geometries.items():
        parts = parts_of(geometry, budget, layer)
        check_group(method.group, {part: columns_of(part, geometry) for part in parts}, layer)
    return PlanRequest(method, budget, seed=seed)


def summarizer(source: OpenedModel) -> Any:
    """What tells of a plan for this model: (plan, what carried it out) -> plain values."""
    stored = stored_dtype(source.checkpoint.config, source.checkpoint.tensors)
    itemsize = 4 if stored is None else stored.itemsize

    def summary(plan: WeightPlan, made: PlannedRewrite | None) -> dict[str, Any]:
        file, method = plan.file, cast(QuantizeMethod, plan.method)
        packed = weights = 0
        for layer, told in file.layers.items():
            geometry, bits = source.geometries[layer], told.outcome.bits
            packed += packed_bits_of(geometry, bits, method.group)
            weights += sum(len(widths) for widths in bits.values()) * geometry.width * geometry.hidden
        nbytes = -(-packed // 8)
        return {
            **settings_told(plan),
            "bits": dict(budget_as(BitBudget, file.budget).bits),
            "weights": {
                "rounded": weights,
                "bits": packed / weights,
                "stored_bytes": weights * itemsize,
                "packed_bytes": nbytes,
            },
            "bytes": {
                "folder": source.nbytes,
                "packed": source.nbytes - weights * itemsize + nbytes,
            },
            "layers": [
                {
                    "layer": layer,
                    "experts": told.experts,
                    "bits": {part: _mean(told.outcome.bits[part]) for part in PARTS if part in told.outcome.bits},
                    "never_routed": list(told.never_routed),
                    "figures": dict(told.outcome.figures),
                }
                for layer, told in file.layers.items()
            ],
        }

    return summary


def _mean(bits: tuple[int, ...]) -> float:
    return sum(bits) / len(bits)
