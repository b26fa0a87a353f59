"""`moekit generate`: the same prompts through two checkpoints, side by side, or through a task's experts alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from moekit._device import DEVICE_HELP, DTYPE_HELP, DtypeName
from moekit._files import read_text
from moekit.cli._command import build_command
from moekit.cli._errors import config_error
from moekit.cli._generate_tasks import generate_by_task
from moekit.cli._options import option_parameters, read_options
from moekit.cli._terminal import Terminal
from moekit.errors import BadConfig, BadData

PROMPTS = (
    "The most important thing about a good bridge is",
    "def fibonacci(n):\n",
    "Es war einmal ein alter König, der",
)


def generate(
    terminal: Terminal,
    model: Annotated[str, typer.Argument(help="checkpoint: folder, hub id or packaged model", show_default=False)],
    other: Annotated[str | None, typer.Argument(help="checkpoint to put beside it", show_default=False)] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="text to continue; may be repeated")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="file with one prompt a line")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest continuation, in tokens")] = 48,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    dtype: Annotated[DtypeName, typer.Option(help=DTYPE_HELP)] = "auto",
    **rest: Any,
) -> None:
    """Continue prompts with a checkpoint, and show beside it what another one says; greedily, so it can be repeated.

    With --expert-sets only the experts of each prompt's task are read from disk.
    """
    from moekit.jobs.options.ranked import RankedOptions
    from moekit.jobs.options.tasks import TaskOptions
    from moekit.jobs.shared.ranked import check_ranks, ranks_of
    from moekit.jobs.shared.tasks import check_tasks

    texts = [*(prompt or ()), *_lines(prompts)] or list(PROMPTS)
    tasks = _options(TaskOptions, {name: rest.pop(name) for name in TaskOptions.model_fields})
    check_tasks(tasks)
    options = _options(RankedOptions, rest)
    if tasks.expert_sets is not None:
        if other is not None or options.ep > 1:
            raise BadConfig(
                "a task's experts are loaded for one model, by one process",
                hint="leave the second checkpoint and --ep out",
            )
        generate_by_task(terminal, tasks, model, texts, max_new_tokens, device, dtype)
        return
    if terminal.dry_run:
        _print_estimate(terminal, [name for name in (model, other) if name is not None])
        return
    check_ranks(options)
    if options.ep > 1 and other is not None:
        raise BadConfig("ranks share one model at a time", hint="leave the second checkpoint out, or --ep")
    with ranks_of(options) as started:
        share = None if started is None else partial(_share, options, started)
        first = _complete(terminal, model, texts, max_new_tokens, device, dtype, share)
    if other is None:
        terminal.answer(**first.model_dump(mode="json"))
        for completion in first.completions:
            terminal.say(f"> {completion.prompt}\n{completion.text}\n")
        return
    from moekit.evaluation import agreement, side_by_side
    from moekit.jobs.shared.inputs import open_model

    second = _complete(terminal, other, texts, max_new_tokens, device, dtype)
    asked, _ = open_model(other, device=device, dtype=dtype, progress=terminal.progress)
    both = side_by_side(first, second, agreement(asked, first))
    terminal.answer(**both.model_dump(mode="json"))
    for pair in both.pairs:
        where = "same" if pair.first_difference is None else f"part at token {pair.first_difference}"
        terminal.say(f"> {pair.prompt}   ({where})\n  a: {pair.a.strip()}\n  b: {pair.b.strip()}\n")
    terminal.say(f"a is {both.a}, b is {both.b}: {both.identical:.0%} of the prompts continued alike;")
    terminal.say(f"given a's text, b chooses the same token at {both.agreement:.1%} of the positions")


def _options(cls: Any, given: dict[str, Any]) -> Any:
    """Options of a group, checked.

    Raises:
        BadConfig: an impossible value.
    """
    try:
        return cls(**read_options(cls, given))
    except ValidationError as error:
        raise config_error(error) from error


def _share(options: Any, started: Any, model: Any, **facts: Any) -> None:
    """Deal the experts out to ranks that all generate the same."""
    from moekit.jobs.shared.ranked import deal_out

    deal_out(model, options, started, shared_batch=True, facts=facts)


def _complete(
    terminal: Terminal,
    reference: str,
    texts: list[str],
    tokens: int,
    device: str,
    dtype: DtypeName,
    share: Callable[..., None] | None = None,
) -> Any:
    from moekit.evaluation import complete
    from moekit.jobs.shared.inputs import open_model

    model, tokenizer = open_model(reference, device=device, dtype=dtype, progress=terminal.progress)
    if share is not None:
        share(model, prompts=texts, tokens=tokens, dtype=dtype)
    return complete(model, tokenizer, texts, max_new_tokens=tokens, name=reference, progress=terminal.progress)


def _lines(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        lines = [line for line in read_text(file).splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise BadData(f"is not UTF-8 text (byte {error.start})", file=file, hint="convert it, as with iconv") from error
    if not lines:
        raise BadData("the file holds no prompt", file=file, hint="write one a line")
    return lines


def _print_estimate(terminal: Terminal, references: list[str]) -> None:
    from moekit.jobs.shared.estimates import ByteSizes, JobEstimate, largest
    from moekit.jobs.shared.inputs import model_item

    items = tuple(model_item(name, ByteSizes()) for name in references)
    terminal.estimate(JobEstimate(items, (), disk=0, memory=largest(item.nbytes for item in items)))


def build() -> Any:
    """The command."""
    from moekit.jobs.options.ranked import RankedOptions
    from moekit.jobs.options.tasks import TaskOptions

    examples = [
        "moekit generate ./moe ./routed --prompt 'Once upon a time' --max-new-tokens 32",
        "torchrun --nproc-per-node 4 -m moekit generate ./moe --ep 4 --dispatch all-reduce",
        "moekit generate ./moe --expert-sets ./expert-sets --keep 0.5 --prompt 'What is 12 times 7?'",
    ]
    extra = [*option_parameters(TaskOptions, panel="Tasks"), *option_parameters(RankedOptions, panel="Ranks")]
    return build_command(generate, examples=examples, extra=extra)
