"""What rounding is asked for, of which model, and what is told of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from moekit.checkpoint.precision import stored_dtype
from moekit.compress.budget.bits import WIDTHS, BitBudget, check_group, parse_bits, parse_choices
from moekit.compress.engine.bit_sharing import check_share, name_of
from moekit.compress.engine.outcome import PARTS
from moekit.compress.engine.plan import LayerRecord, WeightPlan, budget_as
from moekit.compress.engine.quantizing import QuantizeMethod, columns_of, packed_bits_of, parts_of
from moekit.compress.engine.request import PlanRequest
from moekit.compress.engine.rewriting import PlannedRewrite
from moekit.compress.engine.sharing import read_sharer
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
        BadConfig: none, or such as no weight can have, or a mean that cannot be shared so.
    """
    if options.bits is not None and options.mean_bits is not None:
        raise BadConfig("bits and mean_bits are both given", hint="say --bits for all alike, or --mean-bits to share")
    if options.mean_bits is None:
        if given := options.given("choices", "share", "unit"):
            raise BadConfig(f"{', '.join(given)} given, but no mean to share", hint="say --mean-bits 2.5, for example")
        if options.bits is None:
            hint = "--bits 3, --bits gate=2,up=2,down=3, or --mean-bits 2.5"
            raise BadConfig("nothing says how many bits a weight gets", hint=hint)
        return BitBudget(bits=parse_bits(options.bits))
    sharer = read_sharer(options.share or "pmq")
    budget = BitBudget(
        mean=options.mean_bits,
        choices=WIDTHS if options.choices is None else parse_choices(options.choices),
        unit=options.unit,
        share={"use": name_of(sharer), **sharer.model_dump(mode="json")},
    )
    check_share(sharer, budget)
    return budget


def sharing_needs(budget: BitBudget) -> str:
    """What shares the bits, where it needs a text for it; "" otherwise."""
    return str(budget.share["use"]) if budget.mean is not None and read_sharer(budget.share).needs_text else ""


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


def others_of(plan: WeightPlan) -> dict[str, PlanRequest]:
    """Other shares of a mean, rounded alike, which the proof shows: by lot, and where it is whole the same for all."""
    budget = budget_as(BitBudget, plan.file.budget)
    if budget.mean is None or budget.share["use"] == "uniform":
        return {}
    budgets = {}
    if budget.mean == int(budget.mean):
        budgets["uniform"] = BitBudget(bits=dict.fromkeys(PARTS, int(budget.mean)))
    if budget.share["use"] != "random":
        budgets["random"] = BitBudget(
            mean=budget.mean, choices=budget.choices, unit=budget.unit, share={"use": "random"}
        )
    return {name: PlanRequest(plan.method, other, seed=plan.file.seed) for name, other in budgets.items()}


def summarizer(source: OpenedModel) -> Any:
    """What tells of a plan for this model: (plan, what carried it out) -> plain values."""
    stored = stored_dtype(source.checkpoint.config, source.checkpoint.tensors)
    itemsize = 4 if stored is None else stored.itemsize

    def summary(plan: WeightPlan, made: PlannedRewrite | None) -> dict[str, Any]:
        file, method = plan.file, cast(QuantizeMethod, plan.method)
        budget = budget_as(BitBudget, file.budget)
        packed = weights = 0
        for layer, told in file.layers.items():
            geometry, bits = source.geometries[layer], told.outcome.bits
            packed += packed_bits_of(geometry, bits, method.group, method.symmetric)
            weights += sum(len(widths) for widths in bits.values()) * geometry.width * geometry.hidden
        nbytes = -(-packed // 8)
        return {
            **settings_told(plan),
            "bits": dict(budget.bits),
            "mean_bits": _shared(budget, file.layers),
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
                    "widths": None if budget.widths is None else _counted(budget.widths[layer]),
                    "never_routed": list(told.never_routed),
                    "figures": dict(told.outcome.figures),
                }
                for layer, told in file.layers.items()
            ],
        }

    return summary


def _shared(budget: BitBudget, layers: Mapping[int, LayerRecord]) -> dict[str, Any] | None:
    """What was to be shared, how, and what came of it; None where all experts have the same bits."""
    if budget.mean is None or budget.widths is None:
        return None
    sizes = {layer: told.hidden * told.width for layer, told in layers.items()}
    spent = sum(sizes[n] * sum(own) for n, own in budget.widths.items())
    return {
        "asked": budget.mean,
        "given": spent / sum(sizes[n] * len(own) for n, own in budget.widths.items()),
        "choices": list(budget.choices),
        "unit": budget.unit,
        "share": dict(budget.share),
    }


def _counted(widths: tuple[int, ...]) -> dict[int, int]:
    """Bits -> experts that have them."""
    return {n: widths.count(n) for n in sorted(set(widths))}


def _mean(bits: tuple[int, ...]) -> float:
    return sum(bits) / len(bits)
