"""`use: profile`: record what the routers choose on a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from moekit._device import DtypeName, named_dtype
from moekit.checkpoint.names import text_config
from moekit.checkpoint.skeleton import empty_model
from moekit.checkpoint.strictjson import read_json
from moekit.data.encoding import Bos
from moekit.data.forcing import reading_notes
from moekit.jobs.call import JobResult, ModelLike, TextLike, call
from moekit.jobs.context import JobContext
from moekit.jobs.estimates import ByteSizes, Item, JobEstimate
from moekit.jobs.options.profile import ProfileOptions
from moekit.jobs.shared.inputs import (
    model_item,
    model_location,
    open_model,
    read_text,
    rows_of,
    text_item,
)
from moekit.jobs.shared.layerwise import layerwise_source
from moekit.jobs.shared.pictures import picture_reader
from moekit.jobs.shared.rehearsal import refuse_broken
from moekit.progress import ProgressLike
from moekit.trace import Trace, check_summary, record, single_figures, summarise
from moekit.trace.cost import cost_of, notes_on, sizes_of
from moekit.trace.recording import Recording
from moekit.trace.streamed import record_streamed

# Sums of all layers and what describes them, of models of usual size.
_STATISTICS = 64 << 10


class ProfileResult(JobResult):
    """What the routers chose, summed up.

    Attributes:
        tokens: recorded.
        domains: of the text.
        warnings: what a reader must know.
        summary: load, partners and domains of each layer; None for a dense model.
        figures: decoder layer -> statistics that are one number.
    """

    tokens: int
    domains: list[str]
    warnings: list[str]
    summary: dict[str, Any] | None
    figures: dict[str, dict[str, float]]


def profile(
    model: ModelLike,
    *,
    data: TextLike,
    plan: str | Path | None = None,
    split: Literal["train", "heldout"] | None = None,
    max_tokens: int | None = 65536,
    seq_len: int = 512,
    batch_size: int = 4,
    statistics: Sequence[str] = ("basic",),
    choices: bool = True,
    weights: bool = False,
    bos: Bos = "auto",
    device: str = "auto",
    dtype: DtypeName = "auto",
    tokenizer: Any = None,
    out: str | Path,
    overwrite: bool = False,
    seed: int = 0,
    progress: ProgressLike = None,
) -> ProfileResult:
    """Run a model over text and keep which experts each token chose, and statistics of it.

    Args:
        model: MoE: folder or hub id.
        data: file, folder, source, mix or hub id.
        plan: routing plan to route by; the checkpoint's own by default.
        split: part of the text to take.
        max_tokens: tokens, at most, shared among the documents.
        seq_len: tokens a row.
        batch_size: rows a forward pass.
        statistics: what to sum up: names or groups, such as basic, gates, outputs (moekit methods statistics).
        choices: keep every token's choice, for replay and placement.
        weights: keep the gate weights too, 16 bits each.
        bos: what stands before each text: see `moekit.data.encoding.beginning`.
        device: cpu, cuda, ..., or auto: a GPU if there is one.
        dtype: of weights in memory; auto: as the model is stored, but float32 where the device would only emulate half
            precision.
        tokenizer: of a model that is given live.
        out: folder of the trace.
        overwrite: replace what is there, at the very end.
        seed: of everything random; the same seed gives the same result.
        progress: see `moekit.progress`.

    Returns:
        What `moekit profile` prints.

    Raises:
        BadConfig: an impossible option, or `out` exists.
        BadData: a text or an artefact is missing or damaged.
        BadCheckpoint: a model is damaged.
    """
    return call(ProfileOptions, ProfileResult, dict(locals()))


def check(options: ProfileOptions) -> None:
    """Refuse an unknown statistic, and what could not be summarised in the end."""
    check_summary(_recording(options))


def _recording(options: ProfileOptions) -> Recording:
    return Recording(statistics=options.statistics, keep_choices=options.choices, weights=options.weights)


def estimate(options: ProfileOptions, out: Path, sizes: ByteSizes) -> JobEstimate:
    """A choice takes one byte; the geometry is read from the config where it is there."""
    model, text = model_item(options.model, sizes), text_item(options.data, sizes)
    per_token = _bytes_per_token(options.model, options.weights) if options.choices else 0
    # No token is shorter than a byte of the text; rows are filled up, which may take one more of each.
    most = [n for n in (options.max_tokens, text.nbytes) if n is not None]
    tokens = min(most) + options.seq_len if most else None
    trace = None if tokens is None or per_token is None else tokens * (per_token + 11) + _STATISTICS
    nbytes, notes = _cost(options)
    if trace is not None:
        trace += nbytes
    return JobEstimate((model, text), (Item(str(out), trace),), disk=trace, memory=model.nbytes, notes=notes)


def _cost(options: ProfileOptions) -> tuple[int, tuple[str, ...]]:
    """Bytes of the statistics, and what looking at them costs, where the config is there to tell."""
    file = Path(options.model).expanduser() / "config.json"
    sizes = None
    if file.is_file():
        sizes = sizes_of(read_json(file), rows=options.batch_size, positions=options.seq_len)
    if sizes is None:
        return 0, ()
    recording = _recording(options)
    return cost_of(recording, sizes)[1], notes_on(recording, sizes)


def run(options: ProfileOptions, context: JobContext) -> dict[str, Any]:
    """Record and save."""
    recording = _recording(options)
    trace, notes = _layer_by_layer(options, recording, context) or _whole(options, recording, context)
    trace.save(context.out, overwrite=context.overwrite)
    told = {"tokens": trace.meta.tokens, "domains": list(trace.meta.domains)}
    told["warnings"] = [*trace.warnings, *notes]
    figures = {} if trace.statistics is None else single_figures(trace.statistics)
    # A dense model routes nothing that could be summarised.
    summary = summarise(trace).model_dump(mode="json") if recording.routed else None
    return {**told, "summary": summary, "figures": {str(layer): named for layer, named in figures.items()}}


def _rows(
    options: ProfileOptions,
    tokenizer: Any,
    context: JobContext,
    config: Mapping[str, Any] | None,
    model: Callable[[], nn.Module],
) -> Any:
    """The text in batches; with its pictures, where the model's config is given."""
    documents = read_text(options.data, split=options.split, seed=context.seed, progress=context.progress)
    location = model_location(options.model)
    pictures = None if config is None else picture_reader(documents, location, config, model)
    rows = rows_of(
        documents,
        tokenizer,
        seq_len=options.seq_len,
        max_tokens=options.max_tokens,
        bos=options.bos,
        pictures=pictures,
    )
    return rows.batches(options.batch_size)


# What was recorded, and what a reader must know of how the text was read.
_Recorded = tuple[Trace, tuple[str, ...]]


def _layer_by_layer(options: ProfileOptions, recording: Recording, context: JobContext) -> _Recorded | None:
    """Record a quantized model whose weights have to be read as floats here; None for all others."""
    if context.live is not None or options.plan is not None or recording.whole_model:
        return None
    source = layerwise_source(options.model, device=options.device, progress=context.progress)
    if source is None:
        return None
    tokenizer = source.tokenizer()
    trace = record_streamed(
        source.checkpoint,
        _rows(options, tokenizer, context, source.checkpoint.config, lambda: empty_model(source.checkpoint)),
        statistics=options.statistics,
        keep_choices=options.choices,
        weights=options.weights,
        dtype=named_dtype(options.dtype),
        device=options.device,
        tokenizer=tokenizer,
        source=options.data,
        seed=context.seed,
        progress=context.progress,
    )
    return trace, reading_notes(source.checkpoint.config)


def _whole(options: ProfileOptions, recording: Recording, context: JobContext) -> _Recorded:
    """Record the whole model, as transformers loads it."""
    model, tokenizer = open_model(
        options.model,
        plan=options.plan,
        device=options.device,
        dtype=options.dtype,
        progress=context.progress,
        live=context.live,
    )
    refuse_broken(model.config.to_dict())
    trace = record(
        model,
        _rows(options, tokenizer, context, None if context.live else model.config.to_dict(), lambda: model),
        recording.model_copy(update={"tokenizer": tokenizer, "source": options.data, "seed": context.seed}),
        progress=context.progress,
    )
    return trace, reading_notes(model.config)


def _bytes_per_token(model: str, weights: bool) -> int | None:
    """Bytes that one token's choices take, from the model's config; None if it is not there yet."""
    file = Path(model).expanduser() / "config.json"
    if not file.is_file():
        return None
    config = text_config(read_json(file))
    layers = _first(config, "num_hidden_layers")
    top_k = _first(config, "num_experts_per_tok", "moe_k", "num_experts_per_token")
    experts = _first(config, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if layers is None or top_k is None or experts is None:
        return None
    return layers * top_k * ((1 if experts <= 255 else 2) + (2 if weights else 0))


def _first(config: Mapping[str, Any], *names: str) -> int | None:
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)
