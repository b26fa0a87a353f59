"""What a recording costs beyond the forward pass, told before it begins.

Legend: E experts, K choices a token, H hidden, I expert width, D domains, B bins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moekit.checkpoint.names import config_top_k, stated_experts, text_config
from moekit.trace.recording import Recording
from moekit.trace.sources.table import Cost, SourceSizes, bill
from moekit.trace.statistics import LayerStatistics
from moekit.trace.vocabulary import sources_of

# Names of an expert's width in configs, the routed experts' own first.
_WIDTHS = ("moe_intermediate_size", "intermediate_size")


def sizes_of(config: Mapping[str, Any], *, rows: int, positions: int, itemsize: int = 4) -> SourceSizes | None:
    """Sizes of a model from its config.

    Args:
        config: `config.json`.
        rows: of a forward pass.
        positions: tokens a row.
        itemsize: bytes of one value of the model.

    Returns:
        None where the config does not state them.
    """
    text = text_config(config)
    layers, hidden = text.get("num_hidden_layers"), text.get("hidden_size")
    width = next((text[name] for name in _WIDTHS if isinstance(text.get(name), int)), None)
    if not isinstance(layers, int) or not isinstance(hidden, int) or width is None:
        return None
    heads = text.get("num_attention_heads") or 1
    return SourceSizes(
        layers=layers,
        experts=stated_experts(config) or 0,
        top_k=config_top_k(config) or 0,
        hidden=hidden,
        width=width,
        heads=heads,
        head_dim=text.get("head_dim") or hidden // heads,
        tokens=rows * positions,
        positions=positions,
        itemsize=itemsize,
    )


def cost_of(recording: Recording, sizes: SourceSizes) -> tuple[Cost, int]:
    """What a recording costs beyond the forward pass.

    Args:
        recording: what is kept.
        sizes: of model and passes.

    Returns:
        (cost of looking, bytes of the statistics themselves; those by domain counted for one).
    """
    blank = LayerStatistics(sizes.experts, sizes.hidden, ("",), width=sizes.width)
    numbers = 0
    for entry in recording.entries:
        size = 1
        for axis in blank.shape(entry):
            size *= axis
        numbers += size
    return bill(sources_of(recording.entries), sizes), 8 * numbers * sizes.layers


def notes_on(recording: Recording, sizes: SourceSizes) -> tuple[str, ...]:
    """The same in words; nothing where looking costs nothing worth telling."""
    cost, nbytes = cost_of(recording, sizes)
    told = []
    if cost.flops:
        told.append(f"{cost.flops / 1e9:.3g} GFLOP a token")
    if cost.passes:
        told.append("a backward pass after each forward pass, with the whole model in memory")
    if cost.memory >= 1 << 20:
        told.append(f"{cost.memory / 2**20:,.0f} MiB of memory")
    notes = []
    if told:
        which = ", ".join(sorted(sources_of(recording.entries)))
        notes.append(f"the statistics look at {which}: {', '.join(told)} more than the forward pass alone")
    if nbytes >= 1 << 20:
        notes.append(f"the statistics themselves take {nbytes / 2**20:,.0f} MiB in memory and on disk")
    return tuple(notes)
