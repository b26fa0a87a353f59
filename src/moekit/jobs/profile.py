"""`use: profile`: record what the routers choose on a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moekit.jobs.context import JobContext
from moekit.jobs.options.profile import ProfileOptions
from moekit.jobs.shared.estimates import Forecast, Item, Sizes
from moekit.jobs.shared.inputs import model_item, open_model, read_text, rows_of, text_item
from moekit.trace import record, summarise


def estimate(options: ProfileOptions, out: Path, sizes: Sizes) -> Forecast:
    """A choice takes one byte; the geometry is read from the config where it is there."""
    model, text = model_item(options.model, sizes), text_item(options.text, sizes)
    per_token = _bytes_per_token(options.model, options.weights) if options.choices else 0
    trace = None if options.max_tokens is None or per_token is None else options.max_tokens * (per_token + 11)
    return Forecast((model, text), (Item(str(out), trace),), disk=trace, memory=model.nbytes)


def run(options: ProfileOptions, context: JobContext) -> dict[str, Any]:
    """Record and save."""
    model, tokenizer = open_model(
        options.model, plan=options.plan, device=options.device, dtype=options.dtype, progress=context.progress
    )
    documents = read_text(options.text, split=options.split, seed=context.seed, progress=context.progress)
    rows = rows_of(documents, tokenizer, seq_len=options.seq_len, max_tokens=options.max_tokens)
    trace = record(
        model,
        rows.batches(options.batch_size),
        statistics=options.statistics,
        keep_choices=options.choices,
        weights=options.weights,
        tokenizer=tokenizer,
        source=options.text,
        seed=context.seed,
        progress=context.progress,
    )
    trace.save(context.out, overwrite=context.overwrite)
    told = {"tokens": trace.meta.tokens, "domains": list(trace.meta.domains), "warnings": trace.warnings}
    return {**told, "summary": summarise(trace).model_dump(mode="json")}


def _bytes_per_token(model: str, weights: bool) -> int | None:
    """Bytes that one token's choices take, from the model's config; None if it is not there yet."""
    file = Path(model).expanduser() / "config.json"
    if not file.is_file():
        return None
    config = json.loads(file.read_text())
    layers = _first(config, "num_hidden_layers")
    top_k = _first(config, "num_experts_per_tok", "moe_k", "num_experts_per_token")
    experts = _first(config, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if layers is None or top_k is None or experts is None:
        return None
    return layers * top_k * ((1 if experts <= 255 else 2) + (2 if weights else 0))


def _first(config: dict[str, Any], *names: str) -> int | None:
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)
