"""`moekit generate`: the same prompts through two checkpoints, side by side, or through a task's experts alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from moekit._device import DEVICE_HELP, DTYPE_HELP, DtypeName
from moekit.cli._command import build_command
from moekit.cli._jobs import carry_out
from moekit.cli._options import option_parameters, read_options
from moekit.cli._terminal import Terminal, size


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
    from moekit.jobs.options.generate import GenerateOptions

    given = {
        **read_options(GenerateOptions, rest),
        "model": model,
        "other": other,
        "prompt": tuple(prompt or ()),
        "prompts": prompts,
        "max_new_tokens": max_new_tokens,
        "device": device,
        "dtype": dtype,
    }
    carry_out(terminal, GenerateOptions, given, None, False, _show)


def _show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    if "pairs" in results:
        _show_pairs(terminal, results)
        return
    for task, loaded in results.get("loaded", {}).items():
        kept = len(next(iter(loaded["experts"].values())))
        share = f"{size(loaded['bytes'])} of {size(results['model_bytes'])}"
        terminal.note(f"{task}: {kept} of {loaded['of']} experts a layer, {share}")
    for made in results["completions"]:
        head = f"[{_task(made)}]\n" if "task" in made else ""
        terminal.say(f"{head}> {made['prompt']}\n{made['text']}\n")


def _show_pairs(terminal: Terminal, results: Mapping[str, Any]) -> None:
    for pair in results["pairs"]:
        first = pair["first_difference"]
        where = "same" if first is None else f"part at token {first}"
        terminal.say(f"> {pair['prompt']}   ({where})\n  a: {pair['a'].strip()}\n  b: {pair['b'].strip()}\n")
    alike = f"{results['identical']:.0%} of the prompts continued alike;"
    terminal.say(f"a is {results['a']}, b is {results['b']}: {alike}")
    terminal.say(f"given a's text, b chooses the same token at {results['agreement']:.1%} of the positions")


def _task(made: Mapping[str, Any]) -> str:
    """The task of a prompt, and how near it is."""
    from moekit.jobs.tasks.answering import Assigned

    nearest = tuple((near["task"], near["distance"]) for near in made["nearest"])
    return str(Assigned(made["prompt"], made["task"], made["metric"] or "", nearest))


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
