"""`moekit check`: prove that a checkpoint is what its record says."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli._command import build_command
from moekit.cli._jobs import carry_out
from moekit.cli._terminal import Terminal, size

if TYPE_CHECKING:
    from moekit.checking import CheckReport


def check(
    terminal: Terminal,
    folder: Annotated[str, typer.Argument(help="model folder", show_default=False)],
    parent: Annotated[str | None, typer.Option(help="trusted version to compare with: folder or hub id")] = None,
    for_: Annotated[str | None, typer.Option("--for", help="also say what keeps transformers or vllm from it")] = None,
) -> None:
    """Prove that a checkpoint is what its record says: experts present, sizes true, numbers finite, no dead expert.

    Every byte is read once. With a parent, what the record says has stayed is compared byte for byte, the rest by
    likeness. Leaves with 0 if nothing is wrong, 2 if something is, 3 if the folder is unsafe.
    """
    from moekit.jobs.options.check import CheckOptions

    given = {"folder": folder, "parent": parent, "for_": for_}
    carry_out(terminal, CheckOptions, given, None, False, partial(_show, target=for_))


def _show(terminal: Terminal, results: Mapping[str, Any], *, target: str | None) -> None:
    from moekit.checking import CheckReport

    report = CheckReport.model_validate({key: value for key, value in results.items() if key != "ok"})
    for finding in report.findings:
        terminal.say(str(finding))
        if finding.hint and finding.severity == "error":
            terminal.say(f"  -> {finding.hint}")
    for line in report.proven:
        terminal.say(f"proven: {line}")
    errors = sum(finding.severity == "error" for finding in report.findings)
    warnings = sum(finding.severity == "warning" for finding in report.findings)
    verdict = "nothing is wrong" if report.ok else f"{errors} error{'s' * (errors > 1)}"
    if warnings:
        verdict = f"{'no error' if report.ok else verdict}, {warnings} warning{'s' * (warnings > 1)}"
    terminal.say(f"{report.folder}: {verdict}; {_layers(report)}{report.tensors} tensors, {size(report.nbytes)} read")
    if target is not None and report.ok and not any(target in finding.message for finding in report.findings):
        terminal.say(f"for {target}: nothing is known that keeps it from loading this; it was not started to try")
    if not report.ok:
        terminal.close()
        raise typer.Exit(3 if report.unsafe else 2)


def _layers(report: CheckReport) -> str:
    if not report.tensors:
        return ""
    counts = sorted(set(report.experts.values()))
    if not counts:
        return "0 expert layers (a dense model), "
    of = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{len(report.experts)} expert layers of {of} experts, "


def build() -> Any:
    """The command."""
    examples = ["moekit check ./moe", "moekit check ./moe --parent allenai/OLMoE-1B-7B-0924 --for vllm"]
    return build_command(check, examples=examples)
