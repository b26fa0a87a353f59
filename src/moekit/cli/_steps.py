"""Commands that do what a recipe's step does: the step's fields are the options, so both mean the same."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from pydantic import ValidationError

from moekit._files import require_own_folder
from moekit.cli._command import build_command, build_method_group
from moekit.cli._errors import config_error
from moekit.cli._options import keyword_parameter, option_parameters, read_options
from moekit.cli._terminal import Terminal, is_first_rank
from moekit.errors import BadConfig, MoekitError

if TYPE_CHECKING:
    from moekit.catalogue import MethodRecord
    from moekit.jobs.context import JobContext
    from moekit.recipe.steps.base import Step

# Fields that the command line gives in another way.
_ELSEWHERE = ("id", "use", "seed", "method", "settings")

OVERWRITE = typer.Option("--overwrite", help="Replace OUT, at the very end, if it is there.")

Show = Callable[[Terminal, Mapping[str, Any]], None]


def _out_parameters(what: str) -> list[inspect.Parameter]:
    out = typer.Argument(help=what, show_default=False)
    return [keyword_parameter("out", Path, out), keyword_parameter("overwrite", bool, OVERWRITE, False)]


def build_step_command(
    step: type[Step],
    *,
    name: str,
    help: str,
    arguments: Sequence[str],
    writes: str,
    examples: Sequence[str],
    show: Show,
) -> Any:
    """Make a command of a step.

    Args:
        step: its class.
        name: the command's name.
        help: what it does.
        arguments: fields that are given as arguments; the rest are options.
        writes: what OUT is.
        examples: command lines for --help.
        show: prints the results as tables.
    """
    extra = step_parameters(step, arguments, writes)

    def call(terminal: Terminal, **values: Any) -> None:
        out, overwrite = values.pop("out"), values.pop("overwrite")
        carry_out(terminal, step, read_options(step, values), out, overwrite, show)

    return build_command(call, examples=examples, name=name, help=help, extra=extra)


def build_step_group(
    step: type[Step],
    kind: str,
    *,
    name: str,
    help: str,
    arguments: Sequence[str],
    writes: str,
    example: Callable[[MethodRecord], str],
    show: Show,
) -> Any:
    """Make `moekit NAME METHOD ...` of a step that takes any method of a kind."""

    def call(terminal: Terminal, method: str, settings: dict[str, Any], **values: Any) -> None:
        out, overwrite = values.pop("out"), values.pop("overwrite")
        given = {**read_options(step, values), "method": method, "settings": settings}
        carry_out(terminal, step, given, out, overwrite, show)

    extra = step_parameters(step, arguments, writes)
    return build_method_group(kind, call, name=name, help=help, example=example, extra=extra)


def step_parameters(step: type[Step], arguments: Sequence[str], writes: str) -> list[inspect.Parameter]:
    """Arguments, OUT and options of a step.

    Args:
        step: its class.
        arguments: fields that are given as arguments.
        writes: what OUT is.
    """
    own = option_parameters(step, without=_ELSEWHERE, arguments=arguments, panel=None)
    first, rest = own[: len(arguments)], own[len(arguments) :]
    return [*first, *_out_parameters(writes), *rest]


def carry_out(
    terminal: Terminal, step: type[Step], values: Mapping[str, Any], out: Path, overwrite: bool, show: Show
) -> None:
    """Run one step outside a recipe, or say what it would do.

    Raises:
        BadConfig: an option is impossible, OUT exists, is read, or is being written by the same command.
    """
    from moekit.jobs.shared.estimates import Sizes
    from moekit.jobs.shared.outputs import refuse_harm

    try:
        ready = step(**values)
    except ValidationError as error:
        raise config_error(error) from error
    ready.check()
    refuse_harm(ready, out)
    if terminal.dry_run:
        terminal.forecast(ready.forecast(out, Sizes()))
        return
    if out.exists() and not overwrite and not (out.is_dir() and not any(out.iterdir())):
        what = "file" if out.is_file() else "folder"
        raise BadConfig(f"the {what} exists", file=out, hint="choose another one, or say --overwrite")
    work = _workplace(terminal, ready, out, overwrite)
    with _alone(work):
        require_own_folder(work.scratch)
        _refuse_further(ready, work)
        results = _run(ready, work)
    terminal.answer(out=str(out), **results)
    show(terminal, results)
    terminal.say(f"wrote {out}")


def _workplace(terminal: Terminal, ready: Step, out: Path, overwrite: bool) -> JobContext:
    """The same command on the same inputs finds the same scratch folder, so that work which can resume does."""
    from moekit import __version__
    from moekit.jobs.context import JobContext
    from moekit.jobs.shared.hashes import hash_of, reference_hash

    inputs = [reference_hash(reference) for _, reference in ready.inputs()]
    key = hash_of([type(ready).__name__, ready.identity(), terminal.seed, inputs, __version__])[:16]
    return JobContext(
        out=out,
        scratch=out.parent / f".{out.name}.scratch-{key}",
        seed=terminal.seed,
        progress=terminal.progress,
        command=terminal.command,
        overwrite=overwrite,
    )


@contextmanager
def _alone(work: JobContext) -> Iterator[None]:
    """Two starts of one command would write into one scratch folder; the ranks of one start may."""
    from moekit.checkpoint.atomic import lock

    if not is_first_rank():
        yield
        return
    work.out.parent.mkdir(parents=True, exist_ok=True)
    # Not the scratch folder itself: steps may lock that for their own writers.
    with lock(work.scratch.with_name(f"{work.scratch.name}-start")):
        yield


def _refuse_further(ready: Step, work: JobContext) -> None:
    """Files beside OUT may be there only if an interrupted run of the same command wrote them."""
    if work.overwrite or work.scratch.exists():
        return
    for file in ready.further_outputs():
        if file.exists():
            raise BadConfig("the file exists", file=file, hint="choose another one, or say --overwrite")


def _run(step: Step, work: JobContext) -> dict[str, Any]:
    """Do it, and leave nothing beside OUT but what the same command can go on with."""
    try:
        results = step.run(work)
    except MoekitError:
        if not any(work.scratch.glob("checkpoint-*")):
            shutil.rmtree(work.scratch, ignore_errors=True)
        raise
    if is_first_rank():
        shutil.rmtree(work.scratch, ignore_errors=True)
    return results
