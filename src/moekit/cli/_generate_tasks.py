"""`moekit generate --expert-sets`: prompts answered by the experts of their task alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moekit.cli._terminal import Terminal, size

if TYPE_CHECKING:
    from moekit.jobs.options.tasks import TaskOptions


def generate_by_task(
    terminal: Terminal, options: TaskOptions, model: str, texts: Sequence[str], tokens: int, device: str, dtype: str
) -> None:
    """Say which task each prompt belongs to, load that task's experts, and continue it."""
    from moekit.jobs.shared.tasks import TaskModels, read_bytes, summary

    models = TaskModels(options, model, device=device, dtype=dtype, progress=terminal.progress)
    if terminal.dry_run:
        terminal.estimate(models.estimate())
        return

    def tell(task: str, work: Any) -> None:
        counts = sorted({len(outcome.keep) for outcome in work.outcomes.values()})
        terminal.note(
            f"{task}: {counts[0]} of {max(work.counts.values())} experts a layer, {size(read_bytes(work))} of "
            f"{size(models.source.nbytes)}"
        )

    answered = models.complete(models.assign(texts), tokens, tell)
    terminal.answer(**summary(models, answered))
    for item in answered:
        terminal.say(f"[{item.assigned}]\n> {item.completion.prompt}\n{item.completion.text}\n")
