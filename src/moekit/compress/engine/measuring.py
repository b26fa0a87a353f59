"""What the engine knows of a checkpoint before it decides: sizes of its layers, bytes, and how their weights are read.

Legend: E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moekit.anatomy.probe import Geometry, MoELayer, find_moe_layers
from moekit.checkpoint.experts import mtp_tensors
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.names import config_top_k
from moekit.checkpoint.precision import stored_dtype
from moekit.checkpoint.skeleton import empty_model
from moekit.compress.budget.sizes import ByteSizes
from moekit.compress.engine.disk import expert_names
from moekit.compress.engine.resize import read_block
from moekit.compress.weights import LayerWeights
from moekit.errors import NumericFault
from moekit.streaming.loader import LayerLoader
from moekit.streaming.walk import layer_of
from moekit.trace.statistics import LayerStatistics

# Our headers state a format and are padded; those of the source may not be.
_OWN_HEADER = 64


def geometries_of(checkpoint: Checkpoint) -> dict[int, Geometry]:
    """Decoder layer -> sizes of its MoE block, from the config alone."""
    return {layer.index: layer.geometry for layer in find_moe_layers(empty_model(checkpoint))}


def empty_statistics(geometries: Mapping[int, Geometry]) -> dict[int, LayerStatistics]:
    """Statistics of nothing, of every layer."""
    return {layer: LayerStatistics(g.experts, g.hidden, width=g.width) for layer, g in geometries.items()}


def sizes_of(
    checkpoint: Checkpoint, geometries: Mapping[int, Geometry], top_k: int | None = None, *, redirects: bool = False
) -> ByteSizes:
    """What a budget is counted against; multi-token-prediction layers are left out, as they are when it is written.

    Args:
        checkpoint: what is to change.
        geometries: decoder layer -> sizes.
        top_k: choices a token from now on; None as before.
        redirects: whether routers go on choosing among experts that are gone, whose rows then stay beside the weights.
    """
    left_out = mtp_tensors(checkpoint)
    bytes_of = dict.fromkeys(geometries, 0)
    for layer, names in expert_names(checkpoint).items():
        if layer in bytes_of:
            bytes_of[layer] += sum(checkpoint.tensors[name].nbytes for name in names if name not in left_out)
    experts = {layer: geometry.experts for layer, geometry in geometries.items()}
    choices = top_k or config_top_k(checkpoint.config) or max(g.top_k for g in geometries.values())
    routed = sum(bytes_of.values())
    each = {layer: nbytes // experts[layer] for layer, nbytes in bytes_of.items()}
    others = sum(info.nbytes for name, info in checkpoint.tensors.items() if name not in left_out) - routed
    beside = redirect_bytes(geometries) if redirects else 0
    return ByteSizes(experts, choices, each, others + _header_bytes(checkpoint) + beside)


def redirect_bytes(geometries: Mapping[int, Geometry], counts: Mapping[int, int] | None = None) -> int:
    """Bytes, at most, of what lets routers choose among experts that are gone: their old rows, and a constant for each.

    Args:
        geometries: decoder layer -> sizes.
        counts: decoder layer -> experts that stay; None where that is not known.
    """
    rows = {n: 2 * g.experts - (counts or {}).get(n, 0) for n, g in geometries.items()}
    # In float32, a few numbers beside each row, and a header.
    return sum(4 * rows[n] * (g.hidden + 4) + 1024 for n, g in geometries.items())


def _header_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the shards that are no tensor's: what is written has as many tensors or fewer, and no longer headers."""
    tensors = sum(info.nbytes for info in checkpoint.tensors.values())
    files = sum((checkpoint.path / shard).stat().st_size for shard in checkpoint.shards)
    return files - tensors + _OWN_HEADER * len(checkpoint.shards)


def refuse_damaged(moe: MoELayer, statistics: LayerStatistics) -> None:
    """Refuse a layer whose experts hold NaN or infinity, whether a method looks at weights or not.

    For `Streamed.run`, which gives it each layer with its weights: a damaged expert is neither kept nor dropped in
    silence.

    Raises:
        NumericFault: names layer and expert.
    """
    experts, tensors = moe.geometry.experts, dict(moe.experts.named_parameters())
    for projection in moe.storage.projections:
        one = (projection.one(tensors, expert, experts) for expert in range(experts))
        damaged = next((e for e, own in enumerate(one) if not bool(own.isfinite().all())), None)
        if damaged is not None:
            raise NumericFault(
                "the expert's weights are not finite",
                layer=moe.index,
                expert=damaged,
                hint="the file is damaged (see `moekit check`); fetch it again, or mend it",
            )


def weights_reader(checkpoint: Checkpoint) -> Callable[[int], LayerWeights]:
    """Reads one layer's routed experts and router from disk."""
    # As stored: what is merged when the plan is carried out must be what was measured here.
    loader = LayerLoader(checkpoint, dtype=stored_dtype(checkpoint.config, checkpoint.tensors), device="cpu")

    def read(layer: int) -> LayerWeights:
        with loader.loaded(layer):
            return read_block(layer_of(loader, layer), loader.model.config)

    return read


def as_stored(checkpoint: Checkpoint, loader: LayerLoader, layer: int, weights: LayerWeights) -> LayerWeights:
    """A layer's weights as they lie on disk, whatever it computes in: what is made of them is kept for the result.

    Args:
        checkpoint: where they lie.
        loader: that holds the layer.
        layer: decoder layer.
        weights: as they are computed with.
    """
    stored, device = loader.stored, weights.up_EIH.device
    if stored.itemsize > loader.dtype.itemsize:
        weights = weights_reader(checkpoint)(layer)
    return weights.map(lambda t: t.to(device, stored), router=False)
