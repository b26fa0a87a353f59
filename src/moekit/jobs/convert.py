"""`use: convert`: turn a dense model into a MoE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moekit import catalogue
from moekit.anatomy import find_moe_layers
from moekit.jobs.context import JobContext
from moekit.jobs.options.convert import ConvertOptions
from moekit.jobs.shared.estimates import Forecast, Item, Sizes
from moekit.jobs.shared.inputs import model_item, open_model, read_text, rows_of, save_changed, text_item


def check(options: ConvertOptions) -> None:
    """Refuse an unknown method and impossible options."""
    catalogue.make("convert", options.method, options.settings)


def estimate(options: ConvertOptions, out: Path, sizes: Sizes) -> Forecast:
    """The MoE is at least as large as the dense model; how much larger, the conversion's options decide."""
    model = model_item(options.model, sizes)
    reads = (model,) if options.text is None else (model, text_item(options.text, sizes))
    return Forecast(
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
    if options.text is not None:
        documents = read_text(options.text, split=options.split, seed=context.seed, progress=context.progress)
        rows = rows_of(documents, tokenizer, seq_len=options.seq_len, max_tokens=options.max_tokens)
        calibration = rows.calibration
    moe = conversion.convert(model, calibration, context.seed, progress=context.progress)
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
