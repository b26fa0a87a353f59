"""`use: check`: prove that a checkpoint is what its record says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moekit import checking
from moekit._ranks import is_first_rank
from moekit.checkpoint import atomic_folder
from moekit.jobs.call import JobResult, call
from moekit.jobs.context import JobContext
from moekit.jobs.estimates import ByteSizes, JobEstimate
from moekit.jobs.options.check import CheckOptions
from moekit.jobs.shared.inputs import model_item
from moekit.progress import ProgressLike

REPORT = "check.json"


class CheckResult(JobResult):
    """What a check found.

    Attributes:
        ok: whether there is no error; warnings and notes do not count.
        folder: what was checked.
        findings: worst first, then by layer and expert.
        proven: what was proved, one sentence each.
        tensors: number of tensors read.
        nbytes: bytes read.
        experts: decoder layer -> routed experts; empty for a dense model.
    """

    ok: bool
    folder: str
    findings: list[checking.Finding]
    proven: list[str]
    tensors: int
    nbytes: int
    experts: dict[int, int]


def check(
    folder: str | Path,
    *,
    parent: str | Path | None = None,
    for_: str | None = None,
    strict: bool = False,
    out: str | Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    progress: ProgressLike = None,
) -> CheckResult:
    """Prove that a checkpoint is what its record says, or find what is wrong with it.

    Every byte is read once, in bounded memory. Without a record the same is checked as far as structure, statistics
    and, if given, the parent can tell.

    Args:
        folder: model folder.
        parent: trusted version to compare with: folder or hub id.
        for_: also say what keeps transformers or vllm from it.
        strict: raise what is wrong, so that a recipe stops there.
        out: folder of the report; None keeps nothing but the result.
        overwrite: replace what is there, at the very end.
        seed: as every job takes one; nothing is random here.
        progress: see `moekit.progress`.

    Returns:
        What `moekit check` prints.

    Raises:
        BadConfig: an unknown target, or `out` exists.
        BadCheckpoint, UnsafeInput: the parent cannot be opened; with `strict`, the worst of what was found.
    """
    return call(CheckOptions, CheckResult, dict(locals()))


def estimate(options: CheckOptions, out: Path, sizes: ByteSizes) -> JobEstimate:
    """Both folders are read."""
    items = [model_item(name, sizes) for name in (options.folder, options.parent) if name is not None]
    note = "tensors are read one at a time: memory does not grow with the model"
    return JobEstimate(tuple(items), (), disk=0, memory=256 << 20, notes=(note,))


def run(options: CheckOptions, context: JobContext) -> dict[str, Any]:
    """Check, and write the report."""
    report = checking.check(options.folder, parent=options.parent, for_=options.for_, progress=context.progress)
    if options.strict:
        report.raise_if_bad()
    if is_first_rank():
        with atomic_folder(context.out, overwrite=context.overwrite) as folder:
            (folder / REPORT).write_text(report.model_dump_json(indent=1) + "\n")
    return {"ok": report.ok, **report.model_dump(mode="json")}
