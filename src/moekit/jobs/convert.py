"""`use: convert`: turn a dense model into a MoE."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from moekit import catalogue
from moekit._device import DtypeName
from moekit.anatomy import find_moe_layers
from moekit.data.encoding import Bos
from moekit.jobs.call import JobResult, TextLike, call
from moekit.jobs.context import JobContext
from moekit.jobs.estimates import ByteSizes, Item, JobEstimate
from moekit.jobs.options.convert import ConvertOptions
from moekit.jobs.shared.inputs import model_item, open_model, read_text, rows_of, save_changed, text_item
from moekit.progress import ProgressLike


class ConvertResult(JobResult):
    """Sizes of the MoE that a dense model became.

    Attributes:
        method: the conversion.
        layers: MoE layers.
        experts: of each.
        top_k: choices a token makes.
        width: of an expert.
        shared_width: of shared experts.
        parameters: of the MoE.
        dense_parameters: of the dense model.
    """

    method: str
    layers: int
    experts: int
    top_k: int
    width: int
    shared_width: int | None
    parameters: int
    dense_parameters: int


def convert(
    model: str | Path,
    *,
    method: str,
    settings: Mapping[str, Any] | None = None,
    data: TextLike | None = None,
    split: Literal["train", "heldout"] | None = "train",
    max_tokens: int = 8192,
    seq_len: int = 256,
    bos: Bos = "auto",
    dtype: DtypeName = "auto",
    drop_unknown: bool = False,
    out: str | Path,
    overwrite: bool = False,
    seed: int = 0,
    progress: ProgressLike = None,
) -> ConvertResult:
    """Make a MoE of a dense model by one of the conversions in the catalogue (`moekit methods convert`).

    Args:
        model: dense model: folder, hub id or packaged model.
        method: conversion; see moekit methods convert.
        settings: the conversion's own options.
        data: calibration text, for conversions that look at activations.
        split: part of the text to take.
        max_tokens: calibration tokens, at most.
        seq_len: tokens a row.
        bos: what stands before each text: see `moekit.data.encoding.beginning`.
        dtype: of weights in memory; auto: as the model is stored, but float32 where the device would only emulate half
            precision.
        drop_unknown: leave out what the source holds beyond the model, such as extra layers.
        out: folder of the new checkpoint.
        overwrite: replace what is there, at the very end.
        seed: of everything random; the same seed gives the same result.
        progress: see `moekit.progress`.

    Returns:
        What `moekit convert` prints.

    Raises:
        BadConfig: an impossible option, or `out` exists.
        BadData: a text or an artefact is missing or damaged.
        BadCheckpoint: a model is damaged.
    """
    return call(ConvertOptions, ConvertResult, dict(locals()))


def check(options: ConvertOptions) -> None:
    """Refuse an unknown method and impossible options."""
    catalogue.make("convert", options.method, options.settings)


def estimate(options: ConvertOptions, out: Path, sizes: ByteSizes) -> JobEstimate:
    """The MoE is at least as large as the dense model; how much larger, the conversion's options decide."""
    model = model_item(options.model, sizes)
    reads = (model,) if options.data is None else (model, text_item(options.data, sizes))
    return JobEstimate(
        reads,
        (Item(str(out), model.nbytes),),
        disk=model.nbytes,
        memory=None if model.nbytes is None else 2 * model.nbytes,
        notes=("sizes are the dense model's: copied experts multiply its feed-forward part",),
    )


def run(options: ConvertOptions, context: JobContext) -> dict[str, Any]:
    """Convert and save."""
    conversion = catalogue.make("convert", options.method, options.settings)
    model, tokenizer = open_model(options.model, device="cpu", dtype=options.dtype, progress=context.progress)
    calibration = None
    if options.data is not None:
        documents = read_text(options.data, split=options.split, seed=context.seed, progress=context.progress)
        rows = rows_of(documents, tokenizer, seq_len=options.seq_len, max_tokens=options.max_tokens, bos=options.bos)
        calibration = rows.calibration
    moe = conversion.convert(
        model,
        calibration,
        context.seed,
        progress=context.progress,
        drop_unknown=options.drop_unknown,
    )
    save_changed(moe, tokenizer, context, parent=options.model, config={"method": options.method, **options.settings})
    layers = find_moe_layers(moe)
    return {
        "method": options.method,
        "layers": len(layers),
        "experts": layers[0].geometry.experts,
        "top_k": layers[0].geometry.top_k,
        "width": layers[0].geometry.width,
        "shared_width": layers[0].geometry.shared_width,
        "parameters": sum(p.numel() for p in moe.parameters()),
        "dense_parameters": sum(p.numel() for p in model.parameters()),
    }
