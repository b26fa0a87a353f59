"""`use: export`: write a model in a packed form that engines read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from moekit.checkpoint import Checkpoint, Record, atomic_folder
from moekit.checkpoint.expected import verify
from moekit.checkpoint.model import seal
from moekit.checkpoint.record import Expectations
from moekit.errors import BadConfig
from moekit.exporting import gguf_file
from moekit.exporting.auto_round import AutoRound
from moekit.exporting.compressed_tensors import CompressedTensors
from moekit.exporting.folder import PackedFolder, prepare, write
from moekit.exporting.form import Form
from moekit.exporting.gguf_file import GgufFile
from moekit.exporting.gguf_kquants import KQUANTS, TensorType, counted, quantize, sizes
from moekit.exporting.packed import PackedForm
from moekit.exporting.rounded import grids_of
from moekit.jobs.call import JobResult, call
from moekit.jobs.context import JobContext
from moekit.jobs.estimates import ByteSizes, Item, JobEstimate
from moekit.jobs.options.export import ExportOptions
from moekit.jobs.shared.checked import write_checked
from moekit.jobs.shared.inputs import lies_here, model_item, model_location
from moekit.jobs.weights.sizes import check_disk
from moekit.progress import ProgressLike

# Of config, tokenizer, record and card.
_BESIDE_BYTES = 16 << 20


class ExportResult(JobResult):
    """What was packed.

    Attributes:
        to: the form.
        model: what was packed.
        matrices: of experts by their bits ("4 bits"), or stacks of them by what gguf calls them ("Q4_0"): how many.
        group: inputs that share a scale, 0 for a whole row; None where nothing was rounded.
        bytes: of all tensors before and after, and of the experts after.
        tokenizer: what became of it in gguf; None elsewhere, where its files are copied.
        check: what the check of the written folder found; None where moekit does not read the form back.
    """

    to: str
    model: str
    matrices: dict[str, int]
    group: int | None
    bytes: dict[str, int]
    tokenizer: str | None = None
    check: dict[str, Any] | None = None


def export(
    model: str | Path,
    *,
    to: Literal["gguf", "compressed-tensors", "auto-round", "packed"],
    tensor_type: TensorType = "auto",
    round_again: bool = False,
    layers_may_differ: bool = False,
    out: str | Path,
    overwrite: bool = False,
    seed: int = 0,
    progress: ProgressLike = None,
) -> ExportResult:
    """Write a model in a packed form that engines read, bit for bit what the rounded folder computes.

    Args:
        model: rounded model: folder (any model for gguf).
        to: form: gguf (llama.cpp; rounded or not), compressed-tensors (vLLM; one width for all experts of a layer),
            auto-round (transformers with auto-round; a width for each expert), packed (moekit.load, which computes with
            the integers; a width for each expert).
        tensor_type: gguf: of matrices that are not rounded; auto: as they are stored; q2_k to q6_k: by llama.cpp, which
            moekit[engines] brings.
        round_again: gguf with q2_k to q6_k: experts that were rounded become k-quants of their bits, too, instead of
            blocks that hold them exactly.
        layers_may_differ: compressed-tensors: write layers of different widths, or some that were not rounded, which
            vLLM reads and transformers does not.
        out: folder of the packed model.
        overwrite: replace what is there, at the very end.
        seed: not used; every job takes it.
        progress: see `moekit.progress`.

    Returns:
        What `moekit export` prints.

    Raises:
        BadConfig: the experts were not rounded, not symmetrically, or to widths that the form does not hold, or `out`
            exists.
        BadCheckpoint: the model is damaged.
        NumericFault: an expert does not lie on its grid.
        UnsupportedModel: the model is packed already, has runtime parts, its experts have no names of their own, or
            llama.cpp computes its family in another way.
        OutOfBudget: the disk is too small; said before the work.
    """
    return call(ExportOptions, ExportResult, dict(locals()))


def check(options: ExportOptions) -> None:
    """Refuse an option of another form."""
    for name, to in (("layers_may_differ", "compressed-tensors"), ("tensor_type", "gguf"), ("round_again", "gguf")):
        if options.given(name) and options.to != to:
            raise BadConfig(f"{name} changes nothing for {options.to}", hint=f"it is an option of --to {to}")
    if options.round_again and options.tensor_type not in KQUANTS:
        raise BadConfig("round_again is for k-quants", hint="say --to gguf --type q4_k_m, or leave it out")


def estimate(options: ExportOptions, out: Path, sizes: ByteSizes) -> JobEstimate:
    """Sizes of the packed tensors follow from headers and the record."""
    model = model_item(options.model, sizes)
    if not lies_here(options.model):
        return JobEstimate((model,), (Item(str(out), model.nbytes),), disk=model.nbytes)
    work = _prepared(options)
    nbytes = work.nbytes + _BESIDE_BYTES
    notes = ("tensor by tensor: memory does not grow with the model",)
    return JobEstimate((model,), (Item(str(out), nbytes),), disk=_disk(work) + _BESIDE_BYTES, notes=notes)


def run(options: ExportOptions, context: JobContext) -> dict[str, Any]:
    """Refuse what the form does not hold, pack, write, check."""
    check(options)
    work = _prepared(options)
    verify(work.checkpoint)
    check_disk(context.out, context.scratch, _disk(work) + _BESIDE_BYTES, 0)
    grids = grids_of(work.checkpoint)
    return {
        "to": options.to,
        "model": str(work.checkpoint.path),
        "matrices": _matrices(work),
        "group": None if grids is None else grids.group,
        "bytes": {"before": work.checkpoint.nbytes, "after": work.nbytes, "experts": work.expert_bytes},
        **(_write_gguf(work, context) if isinstance(work, GgufFile) else _write_folder(work, context)),
    }


def _prepared(options: ExportOptions) -> GgufFile | PackedFolder:
    checkpoint = Checkpoint.open(model_location(options.model))
    if options.to == "gguf":
        return gguf_file.prepare(checkpoint, options.tensor_type, round_again=options.round_again)
    forms: dict[str, Form] = {
        "auto-round": AutoRound(),
        "compressed-tensors": CompressedTensors(options.layers_may_differ),
        "packed": PackedForm(),
    }
    return prepare(checkpoint, forms[options.to])


def _matrices(work: GgufFile | PackedFolder) -> Mapping[str, int]:
    if isinstance(work, GgufFile):
        return work.kinds
    return {f"{bits} bits": count for bits, count in sorted(Counter(entry.bits for entry in work.plan).items())}


def _write_gguf(work: GgufFile, context: JobContext) -> dict[str, Any]:
    with atomic_folder(context.out, overwrite=context.overwrite, need_bytes=_disk(work)) as folder:
        target = folder / gguf_file.FILE
        if work.k_quant is None:
            return {"tokenizer": gguf_file.write(work, target, context.progress)}
        floats = folder / f"floats-{gguf_file.FILE}"
        told = gguf_file.write(work, floats, context.progress)
        kinds = quantize(floats, target, work.k_quant, work.overrides)
        floats.unlink()
        after, experts = sizes(target)
        nbytes = {"before": work.checkpoint.nbytes, "after": after, "experts": experts}
        return {"tokenizer": told, "matrices": counted(kinds), "bytes": nbytes}


def _disk(work: GgufFile | PackedFolder) -> int:
    """Bytes that lie on disk at once: k-quants, never larger than the floats, are made of a file of floats."""
    return work.nbytes * (2 if isinstance(work, GgufFile) and work.k_quant else 1)


def _write_folder(work: PackedFolder, context: JobContext) -> dict[str, Any]:
    """Write, and check what moekit reads back itself: experts under names that only a library knows are not."""
    if not work.readable:
        with atomic_folder(context.out, overwrite=context.overwrite, need_bytes=work.nbytes) as folder:
            write(work, folder, context.progress)
        return {}
    source = work.checkpoint
    record = Record(
        command=context.command,
        parent=str(source.path),
        parent_fingerprint=source.fingerprint,
        config={"to": work.form.name, "group": work.grids.group},
        # Layers that differ are told by the record alone.
        expectations=Expectations(experts={} if source.record is None else source.record.expectations.experts),
    )

    def made(folder: Path) -> Record:
        folder.mkdir()
        digests = write(work, folder, context.progress)
        return seal(folder, record, digests=digests, progress=context.progress)

    sealed, report = write_checked(context, made)
    told = {
        "ok": report.ok,
        "proven": report.proven,
        "tensors": len(sealed.expectations.tensors),
        "findings": [str(finding) for finding in report.findings],
    }
    return {"check": told}
