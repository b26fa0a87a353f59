"""`use: super-experts`: find the experts that make massive activations, and check whether the model breaks without."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from moekit._device import DtypeName, named_dtype, resolve_device
from moekit.checkpoint import atomic_folder
from moekit.data import TokenBatches
from moekit.data.batches import arrange, pad_id_of
from moekit.data.encoding import Bos
from moekit.data.forcing import refuse_reader
from moekit.data.shares import take_shares
from moekit.diagnose.super_experts.massive_activations import LayerStream, StreamedProfile, layer_streams
from moekit.diagnose.super_experts.report import SuperExpertReport
from moekit.errors import BadConfig
from moekit.evaluation.super_expert_study import STUDY_FILE, SuperExpertStudy
from moekit.evaluation.super_experts import SuperExpertCheck, check_super_experts
from moekit.jobs.call import JobResult, TextLike, call
from moekit.jobs.context import JobContext
from moekit.jobs.estimates import ByteSizes, Item, JobEstimate
from moekit.jobs.options.super_experts import SuperExpertsOptions
from moekit.jobs.shared.inputs import lies_here, model_item, text_item
from moekit.jobs.shared.opened import OpenedModel, check_runnable, open_source
from moekit.jobs.weights.plans import origin
from moekit.jobs.weights.proof import HeldOut
from moekit.jobs.weights.protection import find_in_trace, protection_needs
from moekit.jobs.weights.sizes import bytes_between, check_disk, memory_of
from moekit.jobs.weights.texts import read_texts
from moekit.progress import ProgressLike

# A report is small: some hundred bytes a layer, and a number for each expert.
_FILE_BYTES = 1 << 20


class SuperExpertsResult(JobResult):
    """What was found, and whether the model breaks without it.

    Attributes:
        protect: decoder layer -> experts that must stay.
        source: the text.
        report: what was found, thresholds and maxima.
        streams: the residual stream after each layer, and what makes its massive activations.
        check: the model without them; None where nothing was found or checked.
        verdict: what was found, in words.
        check_verdict: what the check says, in words.
        forms: layers that form massive activations.
        room: how many experts could exceed the percentile.
        file: what `prune --protect` takes; None where nothing was kept.
    """

    protect: dict[str, Any] | dict[int, Any]
    source: str
    report: dict[str, Any]
    streams: list[dict[str, Any]]
    check: dict[str, Any] | None
    verdict: str
    check_verdict: str | None
    forms: list[int]
    room: int
    file: str | None


def super_experts(
    model: str | Path,
    *,
    data: TextLike,
    heldout: TextLike | None = None,
    percentile: float = 99.5,
    ratio: float = 0.1,
    scope: Literal["first-75", "model", "formation"] = "first-75",
    forming: Literal["gain", "first-75"] = "gain",
    max_tokens: int | None = 65536,
    seq_len: int = 512,
    batch_size: int = 8,
    proof: bool = True,
    random_seeds: int = 5,
    proof_tokens: int | None = 32768,
    window: int | None = None,
    bos: Bos = "auto",
    device: str = "auto",
    dtype: DtypeName = "auto",
    out: str | Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    progress: ProgressLike = None,
) -> SuperExpertsResult:
    """Find the few experts that make massive activations, and check on held-out text whether the model breaks without.

    Args:
        model: MoE: folder or hub id.
        data: text to find them on: file, folder, source, mix or hub id.
        heldout: text to check on; by default a tenth of data, which is kept apart for it.
        percentile: of all experts' largest |outputs|, which a super expert's exceeds.
        ratio: share of the largest of them that it exceeds.
        scope: layers whose experts compare: the first 75 % and those that form massive activations, all, or only those
            that form.
        forming: layers that form massive activations: those whose block adds one, or the first 75 %.
        max_tokens: tokens of data, at most, shared by its domains.
        seq_len: tokens a row; the model's limit if that is less.
        batch_size: rows a pass.
        proof: where any are found, measure the model without them, and without as many others.
        random_seeds: draws of as many others.
        proof_tokens: held-out tokens, at most, an equal share of each domain.
        window: longest context of the check in tokens (default: the model's, ≤ 1024)
        bos: what stands before each text: see `moekit.data.encoding.beginning`.
        device: where layers run: cpu, cuda, ...
        dtype: of weights in memory; auto: as the model is stored, but float32 where the device would only emulate half
            precision.
        out: folder of the report; None keeps nothing but the result.
        overwrite: replace what is there, at the very end.
        seed: of everything random; the same seed gives the same result.
        progress: see `moekit.progress`.

    Returns:
        What `moekit super-experts` prints.

    Raises:
        BadConfig: an impossible option, or `out` exists.
        BadData: a text or an artefact is missing or damaged.
        BadCheckpoint: a model is damaged.
    """
    return call(SuperExpertsOptions, SuperExpertsResult, dict(locals()))


def check(options: SuperExpertsOptions) -> None:
    """Refuse held-out text that nothing would be measured on."""
    resolve_device(options.device)
    if options.heldout is not None and not options.proof:
        raise BadConfig("there is held-out text, but no check", hint="leave --heldout or --no-proof out")


def estimate(options: SuperExpertsOptions, out: Path, sizes: ByteSizes) -> JobEstimate:
    """What lies on the disk meanwhile is exact where the model lies here."""
    model = model_item(options.model, sizes)
    reads = (model, *(text_item(text, sizes) for text in (options.data, options.heldout) if text))
    notes = ["layers are read from disk one at a time: memory does not grow with their number"]
    if options.proof:
        draws = f"{options.random_seeds} draw{'s' if options.random_seeds > 1 else ''} of as many others"
        notes.append(f"where any are found, the held-out text is walked without them, and without {draws}")
    disk: int | None = _FILE_BYTES
    memory = None
    if lies_here(options.model):
        source = open_source(options.model)
        check_runnable(source)
        disk = _FILE_BYTES + _between(options, source)
        memory = memory_of(source, options)
    return JobEstimate(reads, (Item(str(out), _FILE_BYTES),), disk=disk, memory=memory, notes=tuple(notes))


def run(options: SuperExpertsOptions, context: JobContext) -> dict[str, Any]:
    """Refuse what is impossible, walk the text, judge, check, write."""
    check(options)
    source = open_source(options.model, context.progress)
    refuse_reader(source.checkpoint.config, "super experts cannot be found")
    check_runnable(source)
    check_disk(context.out, context.scratch, _FILE_BYTES, _between(options, source))
    rows, heldout = _texts(options, source, context)
    report, streams = _look(options, source, rows, context)
    proof = None
    if report.found and heldout is not None:
        proof = _prove(options, source, report, heldout, context)
    study = SuperExpertStudy.of(report, streams, origin(options.data, apart=_apart(options)), proof)
    with atomic_folder(context.out, overwrite=context.overwrite) as folder:
        study.save(folder / STUDY_FILE)
    return summary_of(study, context.out / STUDY_FILE if context.kept else None)


def _between(options: SuperExpertsOptions, source: OpenedModel) -> int:
    proof = (options.proof_tokens or (1 << 20)) if options.proof else 0
    tokens, variants = options.max_tokens or (1 << 20), 1 + options.random_seeds
    return bytes_between(source, options, tokens=tokens, proof_tokens=proof, variants=variants)


def _texts(
    options: SuperExpertsOptions, source: OpenedModel, context: JobContext
) -> tuple[TokenBatches, HeldOut | None]:
    """Rows to look at and text to check on; both are read before any work, as either may turn out empty."""
    documents, heldout = read_texts(
        options,
        source,
        context.progress,
        apart=_apart(options),
        proves=options.proof,
    )
    tokenizer = source.tokenizer()
    # Sinks stand at the beginning of a text: each document begins a row, as texts of this model do.
    found = take_shares(documents, tokenizer, options.max_tokens, bos=options.bos, progress=context.progress)
    length = min(options.seq_len, source.longest)
    rows = arrange(found, length, pad=True, pad_id=pad_id_of(tokenizer))
    return rows, heldout


def _look(
    options: SuperExpertsOptions, source: OpenedModel, rows: TokenBatches, context: JobContext
) -> tuple[SuperExpertReport, tuple[LayerStream, ...]]:
    """One pass over the text; goes on at the layer that an interrupted one had come to."""
    needs = protection_needs(source)
    streamed = StreamedProfile(
        source.checkpoint,
        rows.batches(options.batch_size),
        moe_layers=source.geometries,
        statistics=needs,
        folder=context.scratch / "calibration",
        dtype=named_dtype(options.dtype),
        device=options.device,
    )
    with streamed:
        streamed.run(context.progress)
        trace = streamed.trace(
            tokenizer=source.tokenizer(), source=origin(options.data, apart=_apart(options)), seed=context.seed
        )
    rule = {
        "percentile": options.percentile,
        "ratio": options.ratio,
        "scope": options.scope,
        "forming": options.forming,
    }
    report = find_in_trace(source, trace, **rule)
    return report, layer_streams(trace.require(needs), streamed.dense, streamed.apart)


def _prove(
    options: SuperExpertsOptions, source: OpenedModel, report: SuperExpertReport, heldout: HeldOut, context: JobContext
) -> SuperExpertCheck:
    return check_super_experts(
        source.checkpoint,
        heldout.documents,
        report.pairs,
        geometries=source.geometries,
        source=heldout.source,
        draws=options.random_seeds,
        seed=context.seed,
        window=heldout.window,
        folder=context.scratch / "check",
        dtype=named_dtype(options.dtype),
        device=options.device,
        progress=context.progress,
    )


def _apart(options: SuperExpertsOptions) -> bool:
    """Whether a tenth of the text is kept apart for the check."""
    return options.proof and options.heldout is None


def summary_of(study: SuperExpertStudy, file: Path | None) -> dict[str, Any]:
    """A study as plain values, single experts' maxima left out.

    Args:
        study: what was found.
        file: where it lies; None where it was not kept.
    """
    told = study.model_dump(mode="json", exclude={"kind": True, "format": True, "report": {"format", "layers"}})
    forms = [layer for layer, profile in study.report.layers.items() if profile.forms]
    check = None if study.check is None else study.check.verdict
    return {
        **told,
        "verdict": study.report.verdict,
        "check_verdict": check,
        "forms": forms,
        "room": study.report.room,
        "file": None if file is None else str(file),
    }
