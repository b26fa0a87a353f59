"""`use: export`: write a model in a packed form that engines read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal

from moekit.checkpoint import Checkpoint, Record, atomic_folder
from moekit.checkpoint.expected import verify
from moekit.checkpoint.model import seal
from moekit.errors import BadConfig
from moekit.exporting.auto_round import AutoRound
from moekit.exporting.compressed_tensors import CompressedTensors
from moekit.exporting.folder import PackedFolder, prepare, write
from moekit.exporting.form import Form
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
        layers: with routed experts.
        matrices: of experts, by the bits of their numbers.
        group: inputs that share a scale; 0 for a whole row.
        bytes: of all tensors before and after, and of the experts after.
        check: what the check of the written folder found; None where moekit does not read the form back.
    """

    to: str
    model: str
    layers: int
    matrices: dict[int, int]
    group: int
    bytes: dict[str, int]
    check: dict[str, Any] | None = None


def export(
    model: str | Path,
    *,
    to: Literal["compressed-tensors", "auto-round"],
    layers_may_differ: bool = False,
    out: str | Path,
    overwrite: bool = False,
    seed: int = 0,
    progress: ProgressLike = None,
) -> ExportResult:
    """Write a model in a packed form that engines read, bit for bit what the rounded folder computes.

    Args:
        model: rounded model: folder.
        to: form: compressed-tensors (vLLM; one width for all experts of a layer), auto-round (transformers with
            auto-round; a width for each expert).
        layers_may_differ: compressed-tensors: write layers of different widths, which vLLM reads and transformers
            misreads.
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
        UnsupportedModel: the model is packed already, or its experts have no names of their own.
        OutOfBudget: the disk is too small; said before the work.
    """
    return call(ExportOptions, ExportResult, dict(locals()))


def check(options: ExportOptions) -> None:
    """Refuse an option of another form."""
    if options.layers_may_differ and options.to != "compressed-tensors":
        raise BadConfig(
            f"layers_may_differ changes nothing for {options.to}", hint="leave it out: layers may differ there"
        )


def estimate(options: ExportOptions, out: Path, sizes: ByteSizes) -> JobEstimate:
    """Sizes of the packed tensors follow from headers and the record."""
    model = model_item(options.model, sizes)
    if not lies_here(options.model):
        return JobEstimate((model,), (Item(str(out), model.nbytes),), disk=model.nbytes)
    nbytes = _prepared(options).nbytes + _BESIDE_BYTES
    notes = ("matrix by matrix: memory does not grow with the model",)
    return JobEstimate((model,), (Item(str(out), nbytes),), disk=nbytes, notes=notes)


def run(options: ExportOptions, context: JobContext) -> dict[str, Any]:
    """Refuse what the form does not hold, pack, write, check."""
    check(options)
    work = _prepared(options)
    verify(work.checkpoint)
    check_disk(context.out, context.scratch, work.nbytes + _BESIDE_BYTES, 0)
    report = _write_folder(work, context)
    return {
        "to": options.to,
        "model": str(work.checkpoint.path),
        "layers": len({entry.matrix.layer for entry in work.plan}),
        "matrices": dict(sorted(Counter(entry.bits for entry in work.plan).items())),
        "group": work.grids.group,
        "bytes": {"before": work.checkpoint.nbytes, "after": work.nbytes, "experts": work.expert_bytes},
        "check": report,
    }


def _prepared(options: ExportOptions) -> PackedFolder:
    form: Form = AutoRound() if options.to == "auto-round" else CompressedTensors(options.layers_may_differ)
    return prepare(Checkpoint.open(model_location(options.model)), form)


def _write_folder(work: PackedFolder, context: JobContext) -> dict[str, Any] | None:
    """Write, and check what moekit reads back itself: experts under names that only a library knows are not."""
    if not work.readable:
        with atomic_folder(context.out, overwrite=context.overwrite, need_bytes=work.nbytes) as folder:
            write(work, folder, context.progress)
        return None
    source = work.checkpoint
    record = Record(
        command=context.command,
        parent=str(source.path),
        parent_fingerprint=source.fingerprint,
        config={"to": work.form.name, "group": work.grids.group},
    )

    def made(folder: Path) -> Record:
        folder.mkdir()
        digests = write(work, folder, context.progress)
        return seal(folder, record, digests=digests, progress=context.progress)

    sealed, report = write_checked(context, made)
    return {
        "ok": report.ok,
        "proven": report.proven,
        "tensors": len(sealed.expectations.tensors),
        "findings": [str(finding) for finding in report.findings],
    }
