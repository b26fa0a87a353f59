"""The table of jobs: names, and where their options stand. Those of kinds of methods come from the catalogue."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from moekit.catalogue import kinds
from moekit.errors import BadConfig
from moekit.jobs.options.base import JobOptions


@dataclass(frozen=True)
class Job:
    """One row.

    Attributes:
        name: of the job: its command, and what a recipe's step says under `use`.
        options: "module:Class" of its options.
        line: what it does, one sentence for `moekit --help`; "" for a job whose command is made by hand, if any.
    """

    name: str
    options: str
    line: str = ""

    def load(self) -> type[JobOptions]:
        """The class of its options.

        Raises:
            BadConfig: what the row names is no such class.
        """
        module, _, name = self.options.partition(":")
        found = getattr(importlib.import_module(module), name, None)
        if not isinstance(found, type) or not issubclass(found, JobOptions):
            raise BadConfig(f"the options of the job {self.name!r} are to be a subclass of JobOptions: {self.options}")
        return found


def _row(name: str, cls: str, line: str = "") -> Job:
    return Job(name, f"moekit.jobs.options.{name.replace('-', '_')}:{cls}", line)


_BEFORE = (
    _row("data", "DataOptions"),
    _row("pretrain-tiny", "PretrainTinyOptions"),
    _row("train", "TrainOptions", "Train or fine-tune, with balance losses from the real selection and exact resume."),
    _row("heal", "HealOptions", "Train a compressed model to answer as the one it was made from, with the proof."),
    _row("profile", "ProfileOptions", "Record what the routers choose on a text: a trace and its statistics."),
    _row(
        "super-experts",
        "SuperExpertsOptions",
        "Find the few experts that make massive activations, and check whether the model breaks without.",
    ),
)
_AFTER = (
    _row("fit", "FitOptions", "Make a model fit a number of bytes: fewer, merged, narrower, rounded experts together."),
    _row("apply", "ApplyOptions", "Carry a pruning plan out, with its own budget or another one."),
    Job(
        "expert-sets",
        "moekit.jobs.options.expert_sets:ExpertSetsOptions",
        "Keep what each task wants of the experts, to load only its experts later.",
    ),
    _row("export", "ExportOptions", "Write a rounded model in a packed form that engines read."),
    _row("generate", "GenerateOptions"),
    _row("check", "CheckOptions"),
    _row("families", "FamiliesOptions"),
    _row("evaluate", "EvaluateOptions", "Perplexity per domain and multiple choice, paired, with error bars."),
    _row("report", "ReportOptions", "Write one self-contained page about a run."),
)


def jobs() -> dict[str, Job]:
    """Name -> job."""
    of_kinds = [Job(kind.job, kind.options, kind.line) for kind in kinds() if kind.job]
    return {job.name: job for job in (*_BEFORE, *of_kinds, *_AFTER)}
