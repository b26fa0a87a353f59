"""What is to fit into how many bytes, of which model, and what is refused before any work.

Legend: H hidden, I expert width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch

from moekit._device import resolve_device
from moekit._memory import machine_bytes
from moekit._progress import Progress
from moekit.compress.budget.sizes import bytes_in
from moekit.compress.engine.apply import refuse_rewriting
from moekit.compress.engine.grouped import routing_groups
from moekit.compress.joint.composing import Composer, composer
from moekit.compress.joint.gradients import STORED
from moekit.compress.joint.menu import Menu, MenuKnobs, bits_of, make_menu, widths_of
from moekit.compress.joint.profiles import Profile, profile_of
from moekit.compress.joint.sizes import ModelSizes
from moekit.errors import BadConfig
from moekit.jobs.options.fit import FitOptions
from moekit.jobs.shared.inputs import record_bytes
from moekit.jobs.shared.opened import OpenedModel, check_runnable, open_source
from moekit.jobs.weights.sizes import bytes_between, memory_of, precision_of

# Where a method's defaults are its paper's, and others are better.
_BETTER: dict[str, dict[str, Any]] = {"hc-smoe": {"feature": "rms", "align": "weights"}}
_GROUPS = (128, 64, 32, 16, 8)
# Beside the weights: activations of a row, kept for the way back.
_ROOM = 1.25


@dataclass(frozen=True)
class Asked:
    """A request that this model can fulfil.

    Attributes:
        source: the model.
        budget: bytes.
        profile: of the engine.
        even: whether all layers keep equally many experts.
        composer: the methods.
        sizes: of the model under recipes.
        menu: recipes to measure.
        floor: fewest bytes that the menu can meet.
        between: bytes on disk while the work runs.
        memory: bytes of memory while layers run.
    """

    source: OpenedModel
    budget: int
    profile: Profile
    even: bool
    composer: Composer
    sizes: ModelSizes
    menu: Menu
    floor: int
    between: int
    memory: int

    @property
    def written(self) -> int:
        """Bytes of the folder at most, with its records: rounded weights are stored as wide as before."""
        most = min(self.budget, self.sizes.full()) if self.profile.name == "stock" else self.sizes.full()
        return most + record_bytes(self.source.checkpoint.tensors.values())


def parse_bytes(asked: int | str) -> int:
    """A number of bytes: 12GiB, 800MB, or a plain number.

    Raises:
        BadConfig: no such number.
    """
    plain = isinstance(asked, int) or asked.strip().isdigit()
    found = int(asked) if plain else bytes_in(str(asked)) or 0
    if found < 1:
        raise BadConfig(f"{asked!r} is no number of bytes", hint="such as 12GiB, 800MB, or 1000000")
    return found


def methods_of(options: FitOptions, group: int, *, gradients: bool) -> Composer:
    """The methods that carry recipes out.

    Args:
        options: of the job.
        group: weights that share a scale where rounded.
        gradients: whether it is known what the loss makes of the blocks' outputs.

    Raises:
        BadConfig: unknown ones, or such as cannot be tried layer by layer.
    """
    settings = {way: dict(knobs) for way, knobs in options.settings.items()}
    if "group" in settings.get("bits", {}):
        raise BadConfig(
            "the group is that of all that is planned, not a knob of the rounding alone", hint="say --group"
        )
    if settings.get("bits", {}).get("symmetric") is False:
        raise BadConfig(
            "bytes are counted as engines pack weights, which holds no zero points",
            hint="leave symmetric out, or round afterwards (moekit quantize)",
        )
    if options.narrow == "slimmoe":
        # Gradients are there for the costs already; without them neurons are judged by what they give.
        settings["narrow"] = {"score": "taylor" if gradients else "output-norm"} | settings.get("narrow", {})
    settings["merge"] = _BETTER.get(options.merge, {}) | settings.get("merge", {})
    # What the engines' packed forms hold: no zero points.
    settings["bits"] = {"group": group, "symmetric": True} | settings.get("bits", {})
    return composer(options.drop, options.merge, options.narrow, options.rounding, settings)


def ask(options: FitOptions, progress: Progress | None = None) -> Asked:
    """Open the model, and refuse what it cannot fulfil; no weight is read.

    Raises:
        BadCheckpoint: damaged, or not what its config says.
        BadConfig: bytes that hold no plan; names the fewest that do. Or bits that the engine does not hold.
        UnsupportedModel: no Mixture of Experts, weights that are quantized, layers that cannot be run.
    """
    budget, profile = parse_bytes(options.bytes), profile_of(options.engine)
    source = open_source(options.model, progress)
    refuse_rewriting(source.checkpoint)
    check_runnable(source, "give the unquantized model, in a family whose layers can be run")
    group = _group(options, source)
    sizes = ModelSizes(source.checkpoint, source.geometries, group)
    knobs = MenuKnobs(
        experts=_below_one(options.experts),
        widths=_below_one(options.widths),
        bits=tuple(n for n in options.bits if n < 16) if options.bits else None,
        ways=options.ways,
        most=options.choices,
    )
    if knobs.bits and not profile.bits:
        raise BadConfig(
            f"rounding saves no bytes for {profile.name}, which loads weights as they are stored",
            hint="leave --bits out, or say what loads packed weights: --for vllm, llama.cpp or moekit",
        )
    _check_packing(sizes, profile, knobs)
    menu = make_menu(sizes, profile, budget, knobs)
    floor = min(sizes.total(recipe, profile) for recipe in menu.recipes)
    if budget < floor:
        raise BadConfig(
            f"{budget:,} bytes do not hold the model however its experts are compressed ({sizes.constant:,} of them "
            "are no routed experts)",
            hint=f"allow at least {floor:,} bytes, or smaller choices (--experts, --widths, --bits)",
        )
    # Where any layer loses experts, all give up the router's limits to groups: then layers go together.
    even = profile.even or routing_groups(source.checkpoint.config) > 1
    between = _between(options, source)
    return Asked(
        source,
        budget,
        profile,
        even,
        methods_of(options, group, gradients=fits_whole(options, source)),
        sizes,
        menu,
        floor,
        between,
        memory_of(source, options),
    )


def _check_packing(sizes: ModelSizes, profile: Profile, knobs: MenuKnobs) -> None:
    """Refuse bits and groups that the engine's files do not hold; what was not asked for is left out instead.

    Raises:
        BadConfig: names what they hold.
    """
    held = bits_of(sizes, profile, replace(knobs, bits=None))
    wrong = sorted(set(knobs.bits or ()) - set(held))
    if wrong:
        told = ", ".join(map(str, held)) or "none"
        raise BadConfig(
            f"files of {profile.name} do not hold experts of these sizes in {wrong[0]} bits (held are: {told})",
            hint="say other --bits, other --widths (llama.cpp: multiples of 32 neurons), or leave them out",
        )
    if held and knobs.bits != () and not profile.holds_group(sizes.group):
        raise BadConfig(
            f"{profile.name} holds weights in blocks of 32, not in groups of {sizes.group}",
            hint="say --group 32, 64 or 128, 0 for one scale a row, or leave it out",
        )


def _below_one(fractions: Sequence[float]) -> tuple[float, ...]:
    return tuple(fraction for fraction in fractions if fraction < 1)


def _group(options: FitOptions, source: OpenedModel) -> int:
    """Weights that share a scale: what was asked for, else the most that divides all inputs on the menu.

    Raises:
        BadConfig: the group asked for does not divide them.
    """
    inputs = {g.hidden for g in source.geometries.values()} | {g.width for g in source.geometries.values()}
    inputs |= {w for g in source.geometries.values() for w in widths_of(g.width, _below_one(options.widths))}
    common = gcd(*inputs)
    if options.group is None:
        return next((group for group in _GROUPS if common % group == 0), 0)
    if options.group and common % options.group:
        raise BadConfig(
            f"groups of {options.group} do not divide all inputs of the experts' matrices, {sorted(inputs)}",
            hint="leave --group out, say --group 0 for one scale a row, or choose other --widths",
        )
    return options.group


def whole_bytes(options: FitOptions, source: OpenedModel) -> int:
    """Bytes of the whole model in memory, and of what a way back through it keeps; its logits come on top."""
    wide = precision_of(source, options)
    return int(_ROOM * source.nbytes * wide.running / wide.stored)


def room(options: FitOptions) -> int | None:
    """Bytes of memory where layers run; None where the system does not say."""
    device = resolve_device(options.device)
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else machine_bytes()


def fits_whole(options: FitOptions, source: OpenedModel) -> bool:
    """Whether gradients are asked for, and the whole model is not too large for them from the start."""
    if options.price != "auto":
        return options.price == "fisher"
    has = room(options)
    return has is None or whole_bytes(options, source) <= has


def _between(options: FitOptions, source: OpenedModel) -> int:
    tokens = options.max_tokens or (1 << 20)
    hidden = next(iter(source.geometries.values())).hidden
    # Statistics, then costs: what blocks are given and give of one layer, and gradients of all.
    gradients = tokens * hidden * STORED.itemsize * len(source.geometries) if fits_whole(options, source) else 0
    # Moments of all neurons, in float32.
    moments = 4 * sum(g.experts * g.width**2 for g in source.geometries.values()) if _below_one(options.widths) else 0
    variants = options.tries + options.random_plans + len(options.ways) + 2
    proof = (options.proof_tokens or (1 << 20)) if options.proof else 0
    return (
        gradients + moments + bytes_between(source, options, tokens=2 * tokens, proof_tokens=proof, variants=variants)
    )
