"""Parts of matrices outside of routed experts that may go: groups of attention heads, neurons of shared experts.

Both are inputs of one matrix, in equal parts: of the output projection of attention, whose parts are the query heads
that share a head of keys and values, and of a shared expert's down projection, whose parts are neurons. Where a part
goes, the rows go that made it. So the smaller model is, to the number, the model in which these inputs are zero; and
that is how it is measured before it is written.

Legend: P parts, J parts that stay.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from moekit.anatomy.probe import find_moe_layers
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.skeleton import empty_model
from moekit.checkpoint.spec import MoESpec, stated
from moekit.compress.engine.kept import Cut, KeptTensor
from moekit.errors import BadConfig, UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Kind = Literal["groups", "shared"]
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_NORMS = ("q_norm.weight", "k_norm.weight")


class InputCut(BaseModel):
    """Which of a matrix's inputs stay.

    Attributes:
        kind: what they are: groups of attention heads, or neurons of a shared expert.
        layer: decoder layer.
        parts: P.
        keep: J, ascending.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    layer: int
    parts: int
    keep: tuple[int, ...]


@dataclass(frozen=True)
class Cuttable:
    """Inputs of a matrix that may go, part by part.

    Attributes:
        kind: see `InputCut`.
        layer: decoder layer.
        parts: P.
        axes: name of a live tensor -> the axis along which it has these parts.
    """

    kind: Kind
    layer: int
    parts: int
    axes: Mapping[str, int]

    def cut(self, keep: Iterable[int]) -> InputCut:
        """These parts stay."""
        return InputCut(kind=self.kind, layer=self.layer, parts=self.parts, keep=tuple(sorted(keep)))


def cuttables(checkpoint: Checkpoint, kinds: Sequence[Kind]) -> dict[str, Cuttable]:
    """Name of a matrix in the live model -> what may go of its inputs.

    Raises:
        UnsupportedModel: latent or linear attention, a norm over all heads, fused projections, or no shared expert.
    """
    model, found = empty_model(checkpoint), dict[str, Cuttable]()
    if "groups" in kinds:
        found |= _groups(checkpoint, model)
    if "shared" in kinds:
        found |= _shared(checkpoint, model)
    return found


def _groups(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Cuttable]:
    spec, found = MoESpec.from_config(checkpoint.config), dict[str, Cuttable]()
    if spec.latent:
        raise UnsupportedModel(
            "attention is latent: all heads share what it keeps of a token, so no group of heads stands alone",
            file=checkpoint.path,
            hint="leave groups out",
        )
    for name, module in model.named_modules():
        children = dict(module.named_children())
        layer = checkpoint.layout.layer(f"{name}.o_proj.weight") if "o_proj" in children else None
        if layer is not None and set(_PROJECTIONS) <= set(children):
            found[f"{name}.o_proj"] = Cuttable("groups", layer, spec.kv_heads, _head_axes(name, module, spec, layer))
    if len(found) > spec.layers:
        raise UnsupportedModel(
            f"{len(found)} attentions stand in {spec.layers} layers",
            file=checkpoint.path,
            hint="leave groups out",
        )
    lacking = sorted(set(range(spec.layers)) - {each.layer for each in found.values()})
    if lacking or not found:
        raise UnsupportedModel(
            "the layer has no attention with projections of queries, keys, values and output of their own",
            file=checkpoint.path,
            layer=lacking[0] if lacking else None,
            hint="leave groups out",
        )
    return found


def _head_axes(name: str, attention: nn.Module, spec: MoESpec, layer: int) -> dict[str, int]:
    """Tensors of an attention that have a part for each head of keys and values."""
    rows = {"q_proj": spec.heads * spec.head_dim}
    rows |= dict.fromkeys(("k_proj", "v_proj"), spec.kv_heads * spec.head_dim)
    axes: dict[str, int] = {}
    for own, tensor in attention.named_parameters():
        part = own.partition(".")[0]
        if part in rows and tensor.shape[0] == rows[part]:
            axes[f"{name}.{own}"] = 0
        elif own == "o_proj.weight" and tensor.shape[1] == rows["q_proj"]:
            axes[f"{name}.{own}"] = 1
        elif own == "sinks" and tuple(tensor.shape) == (spec.heads,):
            axes[f"{name}.{own}"] = 0
        elif own != "o_proj.bias" and not (own in _NORMS and tuple(tensor.shape) == (spec.head_dim,)):
            over = "is over all heads at once" if own in _NORMS else "belongs to no head that is known"
            raise UnsupportedModel(
                f"{own} of {list(tensor.shape)} {over}: without a group others would not be what they were",
                layer=layer,
                hint="leave groups out",
            )
    return axes


def _shared(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Cuttable]:
    names, found = {id(module): name for name, module in model.named_modules()}, dict[str, Cuttable]()
    for moe in find_moe_layers(model):
        if len(moe.shared) != 1:
            raise UnsupportedModel(
                f"the layer has {len(moe.shared)} shared experts that stand alone, not one",
                file=checkpoint.path,
                layer=moe.index,
                hint="leave shared out",
            )
        own, width = moe.shared[0], moe.geometry.shared_width
        name, axes, down = names[id(own)], dict[str, int](), ""
        for below, tensor in own.named_parameters():
            if tensor.shape[0] == width and tensor.shape[1:] in ((), (moe.geometry.hidden,)):
                axes[f"{name}.{below}"] = 0
            elif tuple(tensor.shape) == (moe.geometry.hidden, width):
                axes[f"{name}.{below}"], down = 1, f"{name}.{below}".removesuffix(".weight")
            elif tuple(tensor.shape) != (moe.geometry.hidden,):
                raise UnsupportedModel(
                    f"the shared expert holds {below} of {list(tensor.shape)}, whose neurons cannot be told apart",
                    layer=moe.index,
                    hint="leave shared out",
                )
        if not down or moe.geometry.hidden == width:
            raise UnsupportedModel(
                "nothing tells the shared expert's neurons apart", layer=moe.index, hint="leave it out"
            )
        found[down] = Cuttable("shared", moe.index, width, axes)
    return found


def set_cuts(config: PreTrainedConfig, cuts: Mapping[str, InputCut], width: int | None) -> None:
    """State the smaller sizes in a config, the width of a head among them.

    Args:
        config: of the output otherwise; changed in place.
        cuts: what stays.
        width: of routed experts, which some families state shared ones as a multiple of.

    Raises:
        BadConfig: layers keep different numbers, or the family cannot say so many neurons.
        UnsupportedModel: the config does not name these sizes.
    """
    text: Any = config.get_text_config()
    own = text.to_dict()
    for kind in sorted({cut.kind for cut in cuts.values()}):
        sizes = {(cut.parts, len(cut.keep)) for cut in cuts.values() if cut.kind == kind}
        if len(sizes) > 1:
            raise BadConfig(f"layers keep different numbers of {kind}, and a config knows one for all")
        before, after = next(iter(sizes))
        if kind == "groups":
            spec = MoESpec.from_config(own)
            text.num_attention_heads, text.num_key_value_heads = spec.heads // before * after, after
            text.head_dim = spec.head_dim  # otherwise it would be taken for hidden / heads
            continue
        said, multiple = stated(own, "shared_width"), stated(own, "shared")
        if said is not None:
            setattr(text, said[0], after)
        elif multiple is not None:
            each = width or before // multiple[1]
            if after % each:
                raise BadConfig(
                    f"this family states shared experts as a multiple of the routed experts' {each} neurons, and "
                    f"{after} is none",
                    hint=f"--set shared={max(1, round(after / each)) * each}",
                )
            setattr(text, multiple[0], after // each)
        else:
            raise UnsupportedModel(f"{type(text).__name__} does not say how wide shared experts are")


def with_cuts(
    kept: Sequence[KeptTensor],
    checkpoint: Checkpoint,
    cuts: Mapping[str, InputCut],
    after: PreTrainedConfig,
) -> list[KeptTensor]:
    """Tensors of the output without the parts that go.

    Raises:
        UnsupportedModel: the checkpoint holds these tensors fused with others, or the family's code makes other sizes
            of the new config.
    """
    known = cuttables(checkpoint, sorted({cut.kind for cut in cuts.values()}))
    shapes = {name: tuple(tensor.shape) for name, tensor in empty_model(after).state_dict().items()}
    axes = {tensor: (axis, cuts[name]) for name, each in known.items() for tensor, axis in each.axes.items()}
    made, missing = [], set(axes)
    for tensor in kept:
        live = checkpoint.layout.live_name(tensor.source.name)
        if live not in axes:
            made.append(tensor)
            continue
        axis, cut = axes[live]
        new = dataclasses.replace(tensor, cut=Cut(axis, cut.parts, cut.keep))
        if new.shape != shapes.get(live):
            raise UnsupportedModel(
                f"{tensor.name} would be {list(new.shape)}, and {type(after).__name__} makes it "
                f"{list(shapes.get(live, ()))}",
                file=checkpoint.path,
                layer=cut.layer,
                hint=f"leave {cut.kind} out",
            )
        missing.discard(live)
        made.append(new)
    if missing:
        raise UnsupportedModel(f"{min(missing)} lies fused with others on disk", file=checkpoint.path)
    return made


@contextlib.contextmanager
def masked(root: nn.Module, cuts: Mapping[str, InputCut]) -> Iterator[None]:
    """Run a model as if the inputs that go were zero, for as long as the block lasts.

    Args:
        root: that the names of the matrices start from.
        cuts: what stays.
    """
    handles = [mask(root.get_submodule(name), cut) for name, cut in cuts.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def mask(matrix: nn.Module, cut: InputCut) -> Any:
    """Have a matrix see zeros where its inputs go; what this returns ends it."""
    stays_P = torch.zeros(cut.parts, dtype=torch.bool)
    stays_P[list(cut.keep)] = True

    def hide(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        given = args[0]
        stays = stays_P.to(given.device).repeat_interleave(given.shape[-1] // cut.parts)
        return (torch.where(stays, given, torch.zeros_like(given)), *args[1:])

    return matrix.register_forward_pre_hook(hide)
