"""One builder for the commands of all jobs: their options are the job's, so that recipes and calls mean the same."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import typer

from moekit import catalogue
from moekit.cli._command import build_command, build_method_group
from moekit.cli._options import keyword_parameter, option_parameters, out_option, read_options
from moekit.cli._terminal import Terminal
from moekit.jobs.options.base import CommandLine, JobOptions
from moekit.jobs.table import Job, jobs

Show = Callable[[Terminal, Mapping[str, Any]], None]

_HELP = "--help lists every option with its unit and bounds"


def command_of(job: Job, *, name: str | None = None) -> Any:
    """The command of a job.

    Args:
        job: its row in the table.
        name: of the command; the job's by default.
    """
    options = job.load()
    told = options.command
    show = view_of(job.name)
    if told.by_method:

        def by_method(terminal: Terminal, method: str, settings: dict[str, Any], **values: Any) -> None:
            given = {**read_options(options, _without_out(values)), "method": method, "settings": settings}
            carry_out(terminal, options, given, values["out"], values["overwrite"], show)

        assert told.example is not None
        extra = _parameters(options, told)
        group = build_method_group(
            told.by_method, by_method, name=job.name, help=told.help, example=told.example, extra=extra
        )
        for command in group.commands.values():
            _add_aliases(command, told)
        return group
    held = _settings_class(told)
    knobs = [] if held is None else option_parameters(held, without=("seed",), panel=told.panel)
    names = {parameter.name for parameter in knobs}

    def call(terminal: Terminal, **values: Any) -> None:
        given = read_options(options, _without_out({k: v for k, v in values.items() if k not in names}))
        if held is not None:
            given["settings"] = read_options(held, {k: v for k, v in values.items() if k in names})
        elif values.get("knobs"):
            given["settings"] = parse_knobs(values["knobs"])
        carry_out(terminal, options, given, values["out"], values["overwrite"], show)

    command = build_command(
        call,
        examples=told.examples,
        name=name or job.name,
        help=told.help,
        extra=[*_parameters(options, told), *knobs],
        closing=partial(methods_of, job.name),
    )
    _add_aliases(command, told)
    return command


def methods_of(job: str) -> str:
    """The methods that a job takes, by kind; "" for a job that takes none."""
    rows = [kind for kind in catalogue.kinds() if job in (kind.job, *kind.within)]
    named = [(kind, ", ".join(record.name for record in catalogue.methods(kind.name))) for kind in rows]
    return "\n\n".join(f"{kind.title} (moekit methods {kind.name}): {names}." for kind, names in named)


def job_command(name: str) -> Any:
    """The command of the job of this name."""
    return command_of(jobs()[name])


def view_of(name: str) -> Show:
    """What prints a job's results: `show` of `moekit.cli.views.NAME`, or a plain table where there is none."""
    module = f"moekit.cli.views.{name.replace('-', '_')}"
    if importlib.util.find_spec(module) is None:
        return show_plain
    show: Show = importlib.import_module(module).show
    return show


def show_plain(terminal: Terminal, results: Mapping[str, Any]) -> None:
    """Whatever a job returned that fits into a line."""
    rows = [(key.replace("_", " "), value) for key, value in results.items() if not isinstance(value, dict | list)]
    terminal.table("", ("figure", "value"), rows)


def carry_out(
    terminal: Terminal,
    options: type[JobOptions],
    values: Mapping[str, Any],
    out: Path | None,
    overwrite: bool,
    show: Show,
) -> None:
    """Do a job, or say what it would do.

    Raises:
        BadConfig: an option is impossible, OUT exists, is read, or is being written by the same command.
    """
    from moekit.jobs.call import kept_or_not, options_from, perform, ready
    from moekit.jobs.estimates import ByteSizes

    given = options_from(options, values, hint=_HELP)
    with kept_or_not(given, out) as place:
        if terminal.dry_run:
            settled, target, _ = ready(given, place, overwrite=overwrite)
            estimate = settled.estimate(target, ByteSizes())
            terminal.estimate(replace(estimate, writes=()) if out is None and not options.needs_out else estimate)
            return
        target, results = perform(
            given,
            place,
            seed=terminal.seed,
            overwrite=overwrite,
            progress=terminal.progress,
            command=terminal.command,
            kept=out is not None or options.needs_out,
        )
    if out is None and not options.needs_out:
        terminal.answer(**results)
        show(terminal, results)
        return
    terminal.answer(out=str(target), **results)
    show(terminal, results)
    terminal.say(f"wrote {target}")


def parse_knobs(knobs: list[str]) -> dict[str, Any]:
    """A method's `settings` from `--set KNOB=VALUE`."""
    from moekit.recipe.variables import parse_overrides

    return parse_overrides(knobs)


def _without_out(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in ("out", "overwrite", "knobs")}


def _settings_class(told: CommandLine) -> Any:
    if not told.settings:
        return None
    module, _, name = told.settings.partition(":")
    return getattr(importlib.import_module(module), name)


def _parameters(options: type[JobOptions], told: CommandLine) -> list[inspect.Parameter]:
    """Arguments and options of a job, OUT first among these, in the order of --help."""
    hidden = {*told.hidden, "settings", *(("method",) if told.by_method else ())}
    own = option_parameters(options, without=hidden, arguments=told.arguments, panel=None, flags=told.flags)
    first, rest = own[: len(told.arguments)], own[len(told.arguments) :]
    out = _out_parameter(options, told)
    overwrite = keyword_parameter("overwrite", bool, typer.Option("--overwrite", help=told.overwrite), False)
    knobs = []
    if "settings" in options.model_fields and not told.by_method and not told.settings:
        option = typer.Option("--set", metavar="KNOB=VALUE", help="A knob of the method; may be repeated.")
        knobs.append(keyword_parameter("knobs", list[str] | None, option, None))
    return [*first, out, overwrite, *rest, *knobs]


def _out_parameter(options: type[JobOptions], told: CommandLine) -> inspect.Parameter:
    """OUT of a job: required, unless its result alone or something else may be wanted."""
    if options.needs_out and not told.instead:
        return keyword_parameter("out", Path, out_option(told.writes))
    without = f"may be left out with {told.instead}" if told.instead else "without it nothing is kept"
    return keyword_parameter("out", Path | None, out_option(f"{told.writes}; {without}"), None)


def _add_aliases(command: Any, told: CommandLine) -> None:
    for option in command.params:
        option.opts += [told.aliases[option.name] for _ in option.opts if option.name in told.aliases][:1]
