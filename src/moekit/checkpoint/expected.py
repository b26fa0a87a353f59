"""What a checkpoint must hold, from its config alone: names, shapes and dtypes, before any weight is read.

The config's model is built on the meta device, where tensors have shapes but no memory.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit.checkpoint.config_file import announced_mtp
from moekit.checkpoint.layout import HARMLESS, Layout, layout_of
from moekit.checkpoint.left_out import refuse_left_out, settle
from moekit.checkpoint.meta import stated_model
from moekit.checkpoint.names import EXPERT_COUNT_KEYS, expert_in, stated_depth, text_config
from moekit.checkpoint.safety import FLOAT_DTYPES, TensorInfo
from moekit.errors import BadCheckpoint

if TYPE_CHECKING:
    from moekit.checkpoint.folder import Checkpoint

_WIDE_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass
class Differences:
    """How the tensors on disk differ from the layout."""

    missing: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.missing or self.surplus or self.shapes or self.dtypes)

    def within(self, other: Differences) -> bool:
        """Whether nothing differs here that does not differ there."""
        pairs = ((self.missing, other.missing), (self.surplus, other.surplus), (self.shapes, other.shapes))
        return all(set(ours) <= set(theirs) for ours, theirs in pairs)


def _is_extra_layer(name: str, layout: Layout, config: Mapping[str, Any]) -> bool:
    """Whether a tensor belongs to a multi-token-prediction layer, which follows the decoder layers on disk."""
    layers, layer = stated_depth(config), layout.layer(name)
    extra = announced_mtp(config)
    return layers is not None and layer is not None and layers <= layer < layers + extra


def _check_dtype(info: TensorInfo, target: str, layout: Layout, differences: Differences) -> None:
    declared = layout.counters.get(target)
    if declared is not None:
        if info.dtype != declared:
            differences.dtypes[info.name] = f"{info.dtype}, its class declares {declared}"
    elif info.dtype not in _WIDE_DTYPES:
        what = "needs scales that the config does not announce" if info.dtype in FLOAT_DTYPES else "is no float"
        differences.dtypes[info.name] = f"{info.dtype} {what}"


@dataclass
class _Reached:
    """What the disk holds of one live tensor."""

    whole: bool = False
    parts: set[str] = field(default_factory=set)
    foreign: list[str] = field(default_factory=list)


def _place(name: str, layout: Layout) -> tuple[str, str, tuple[int, ...] | None]:
    """Live tensor that a name on disk fills, how ("whole", "part", "foreign" part, "unknown"), and its legal shape."""
    if name in layout.live:
        return name, "whole", layout.live[name]
    if name in layout.stock:
        return layout.target[name], "part", layout.stock[name]
    target, gathered = layout.rename(name)
    if target not in layout.live:
        return target, "unknown", None
    return (target, "foreign", None) if gathered else (target, "whole", layout.live[target])


def compare(
    tensors: Mapping[str, TensorInfo], layout: Layout, config: Mapping[str, Any], *, unpacked: bool = False
) -> Differences:
    """Compare the tensors on disk with the layout.

    Of quantized checkpoints (`quantization_config`) only presence is compared: packed weights have other names,
    shapes and dtypes.

    Args:
        tensors: on disk.
        layout: legal ones.
        config: parsed config.json.
        unpacked: whether packed weights are given as what they are where nothing is quantized; all is compared then,
            but that experts share a dtype.
    """
    differences = Differences()
    quantized = "quantization_config" in config
    reached: dict[str, _Reached] = defaultdict(_Reached)
    for name, info in tensors.items():
        target, how, shape = _place(name, layout)
        if how == "unknown":
            harmless = (
                quantized or layout.ignored(name) or layout.ignored(target) or _is_extra_layer(name, layout, config)
            )
            differences.surplus += [] if harmless else [name]
            continue
        reached[target].whole |= how == "whole"
        reached[target].parts |= {name} if how == "part" else set()
        reached[target].foreign += [name] if how == "foreign" else []
        if unpacked or not quantized:
            if shape is not None and info.shape != shape:
                differences.shapes[name] = shape
            _check_dtype(info, target, layout, differences)
    _find_missing(tensors, layout, reached, differences, quantized)
    _check_uniform(tensors, reached, differences, quantized)
    return differences


def _find_missing(
    tensors: Mapping[str, TensorInfo],
    layout: Layout,
    reached: Mapping[str, _Reached],
    differences: Differences,
    quantized: bool,
) -> None:
    stems = {re.sub(r"(_blocks|_scales|\.[^.]*)$", "", name) for name in tensors} if quantized else set()
    for name, target in layout.target.items():
        found = reached.get(target) or _Reached()
        other_layout = bool(found.foreign) and not found.parts
        packed = quantized and (name in stems or name.rpartition(".")[0] in stems or target in stems)
        if not (found.whole or other_layout or packed or name in found.parts):
            differences.missing.append(name)
    for found in reached.values():
        if found.parts:  # beside the parts the config has: more experts than it says
            differences.surplus += found.foreign


def _check_uniform(
    tensors: Mapping[str, TensorInfo], reached: Mapping[str, _Reached], differences: Differences, quantized: bool
) -> None:
    """Experts that are stacked into one tensor must share a dtype: stacking would cast in silence."""
    for found in reached.values():
        by_dtype: dict[str, list[str]] = defaultdict(list)
        for name in found.parts:
            by_dtype[tensors[name].dtype].append(name)
        if len(by_dtype) > 1 and not quantized:
            common = max(by_dtype, key=lambda dtype: len(by_dtype[dtype]))
            for dtype, names in by_dtype.items():
                if dtype != common:
                    differences.dtypes.update({name: f"{dtype} among {common}" for name in names})


def count_hint(differences: Differences, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str | None:
    """Say so if everything fits but the config's number of experts."""
    key = next((k for k in EXPERT_COUNT_KEYS if isinstance(text_config(config).get(k), int)), None)
    found = {number for name in tensors if (number := expert_in(name)) is not None}
    stacked = {i.shape[0] for n, i in tensors.items() if len(i.shape) == 3 and ("experts" in n or "_linear" in n)}
    counts = {max(found) + 1} if found else stacked
    stated = text_config(config).get(key) if key else None
    if len(counts) == 1 and stated not in counts:
        return f"the config says {key}: {stated}, the tensors hold {counts.pop()} experts a layer"
    return None


def describe(differences: Differences, tensors: Mapping[str, TensorInfo]) -> str:
    """All differences in one sentence each."""
    shapes = [f"{n} {list(tensors[n].shape)} instead of {list(shape)}" for n, shape in differences.shapes.items()]
    parts = {
        "missing": sorted(differences.missing),
        "that the config does not know": sorted(differences.surplus),
        "of a wrong shape": sorted(shapes),
        "of a wrong dtype": sorted(f"{name} ({why})" for name, why in differences.dtypes.items()),
    }
    return "; ".join(f"{len(names)} tensors {what}: {', '.join(names)}" for what, names in parts.items() if names)


def verify(checkpoint: Checkpoint, *, whole: bool = True) -> Layout:
    """Compare names, shapes and dtypes with what the config says, before any weight is read.

    Of quantized weights the scales are looked at, too: all there, of shapes that fit, and positive numbers.

    Args:
        checkpoint: opened.
        whole: refuse shards that leave matrices of experts to a part beside them.

    Returns:
        The legal tensors of the config.

    Raises:
        BadCheckpoint: tensors are missing, surplus or of a wrong shape or dtype: the full list, naming layer and
            expert of the first. Or scales are, or hold what scales nothing.
    """
    if whole:
        refuse_left_out(checkpoint.record, checkpoint.path)
    layout = checkpoint.layout
    tensors, unpacked = _unpacked(checkpoint)
    differences = settle(compare(tensors, layout, checkpoint.config, unpacked=unpacked), checkpoint, layout)
    if not differences:
        return layout
    names = [*differences.missing, *differences.surplus, *differences.shapes, *differences.dtypes]
    layer, expert = layout.where(sorted(names, key=_natural)[0])
    hint = count_hint(differences, checkpoint.config, tensors)
    raise BadCheckpoint(
        describe(differences, tensors),
        file=Path(checkpoint.path),
        layer=layer,
        expert=expert,
        hint=hint or "the folder is incomplete or its config belongs to another model: fetch it again",
    )


def _unpacked(checkpoint: Checkpoint) -> tuple[Mapping[str, TensorInfo], bool]:
    """The tensors as they are where nothing is quantized, and whether that could be told of quantized ones."""
    if "quantization_config" not in checkpoint.config:
        return checkpoint.tensors, False
    from moekit.checkpoint.quantized.weights import unquantized_tensors

    found = unquantized_tensors(checkpoint)
    return (checkpoint.tensors, False) if found is None else (found, True)


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def stated_differences(checkpoint: Checkpoint) -> Differences | None:
    """How the tensors differ from what the class that the config names demands, such as a vision tower.

    Returns:
        None where the config names the class that the checkpoint is opened as, or one that cannot be built here.
    """
    model = stated_model(checkpoint)
    return None if model is None else compare(checkpoint.tensors, layout_of(model), checkpoint.config)


def unknown_tensors(checkpoint: Checkpoint, layout: Layout) -> list[str]:
    """Tensors that the class of the checkpoint has no place for: what loading leaves behind.

    Multi-token-prediction layers; towers where a language model is made of a folder that holds more. Packed weights and
    scales of a quantized module belong to that module; buffers that are computed today are nothing by themselves.

    Args:
        checkpoint: opened and verified.
        layout: of its config.
    """
    unknown = [name for name in checkpoint.tensors if _place(name, layout)[1] == "unknown"]
    if all(HARMLESS.search(name) for name in unknown):
        return []
    if "quantization_config" not in checkpoint.config:
        return unknown
    known = {re.sub(r"\.(?:weight|bias)$", "", name) for name in (*layout.stock, *layout.live)}
    owners = {name: layout.rename(name)[0] for name in unknown}
    return [n for n in unknown if not known & {*_owners(n), *_owners(owners[n])}]


def _owners(name: str) -> tuple[str, str]:
    """Module or stacked parameter that a packed tensor or a scale may belong to."""
    return name.rpartition(".")[0], re.sub(r"(?:_blocks|_scales|_scale_inv|_scale|_packed)$", "", name)


def disk_names(tensors: Mapping[str, TensorInfo], layout: Layout) -> dict[str, str]:
    """Live name -> name on disk, of the tensors that are taken over one to one."""
    shared = Counter(layout.target.values())
    found: dict[str, str] = {}
    for name in tensors:
        target, how, _ = _place(name, layout)
        if how == "whole" or (how == "part" and shared[target] == 1):
            found[target] = name
    return found
