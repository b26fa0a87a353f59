"""Making commands: the common options are added once, here, and a method's options come from its pydantic fields."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand, TyperGroup

from moekit.cli._options import keyword_parameter, option_parameters, read_options
from moekit.cli._terminal import Terminal

if TYPE_CHECKING:
    from moekit.catalogue import MethodRecord

    Command = Any

_EVERYWHERE = "Everywhere"


def _common() -> list[inspect.Parameter]:
    def flag(name: str, kind: Any, default: Any, *names: str, text: str) -> inspect.Parameter:
        option = typer.Option(*names, help=text, rich_help_panel=_EVERYWHERE)
        return keyword_parameter(name, kind, option, default)

    return [
        flag(
            "dry_run", bool, False, "--dry-run", text="Say what would be read, written and needed, in bytes, and stop."
        ),
        flag("json", bool, False, "--json", text="Answer with one JSON object on stdout."),
        flag(
            "seed",
            int | None,
            None,
            "--seed",
            text="Seed of everything random (default: 0, or the recipe's); the same seed gives the same result.",
        ),
        flag("quiet", bool, False, "--quiet", "-q", text="No progress and no tables; warnings and errors still show."),
        flag("debug", bool, False, "--debug", text="Show the traceback of an error."),
        flag(
            "home", Path | None, None, "--home", text="Folder for downloads (default: $MOEKIT_HOME or ~/.cache/moekit)."
        ),
    ]


def build_command(
    function: Callable[..., None],
    *,
    examples: Sequence[str],
    name: str | None = None,
    help: str | None = None,
    extra: Sequence[inspect.Parameter] = (),
    closing: Callable[[], str] | None = None,
) -> Command:
    """Turn `function(terminal, ...)` into a command with the common options.

    Args:
        function: its first parameter receives the `Terminal`; the others become arguments and options.
        examples: shown under --help, one command line each.
        name: the command's name; the function's by default.
        help: help text; the function's docstring by default.
        extra: further parameters, handed to the function by keyword.
        closing: last paragraph of the help text, made when --help is asked for.
    """
    common = _common()
    own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
    own = [p for p in own if p.kind is not inspect.Parameter.VAR_KEYWORD]
    keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own, *extra)]
    shared = {parameter.name for parameter in common}

    def call(**values: Any) -> None:
        options = {key: values.pop(key) for key in shared}
        seed = options.pop("seed")
        terminal = Terminal(**options, seed=seed or 0, seed_given=seed is not None)
        function(terminal, **values)
        terminal.close()

    call.__signature__ = inspect.Signature([*keyword_only, *common])  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in (*keyword_only, *common)}
    app = typer.Typer(add_completion=False, rich_markup_mode="rich")
    app.command(
        name=name or function.__name__.replace("_", "-"),
        help=flowing(help or inspect.getdoc(function) or ""),
        epilog=example_lines(examples),
        context_settings={"help_option_names": ["-h", "--help"]},
        cls=ClosedCommand,
    )(call)
    command = typer.main.get_command(app)
    assert isinstance(command, ClosedCommand)
    command.closing = closing
    return command


class ClosedCommand(TyperCommand):
    """A command whose help text may end with what takes long to look up, and that knows a misplaced OUT."""

    closing: Callable[[], str] | None = None

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Tell whoever gives OUT as an argument how it is given; other faults are typer's to tell."""
        if not ctx.resilient_parsing and "out" in {parameter.name for parameter in self.params}:
            given, beyond, _ = self.make_parser(ctx).parse_args(args=list(args))
            if beyond and not {"out", "help"} & given.keys():
                several = f"arguments {' '.join(beyond)}" if len(beyond) > 1 else f"argument {beyond[0]}"
                ctx.fail(f"unexpected {several}: where to write is an option, -o OUT")
        found: list[str] = super().parse_args(ctx, args)
        return found

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Append the last paragraph, once."""
        if self.closing is not None and (told := self.closing()):
            self.help = f"{self.help}\n\n{told}"
        self.closing = None
        super().format_help(ctx, formatter)


def example_lines(lines: Sequence[str]) -> str:
    """Examples as they stand under --help.

    Args:
        lines: one command line each.
    """
    head = "Example:" if len(lines) == 1 else "Examples:"
    # A blank line between them: rich joins lines of one paragraph.
    return "\n\n".join([head, *(line.replace("[", "\\[") for line in lines)])


def build_method_group(
    kind: str,
    function: Callable[..., None],
    *,
    name: str,
    help: str,
    example: Callable[[MethodRecord], str],
    extra: Sequence[inspect.Parameter] = (),
) -> Command:
    """Make `moekit COMMAND METHOD ...` for every method of a kind.

    Args:
        kind: the catalogue's kind.
        function: `function(terminal, method, settings, ...)`; `settings` are the method's own options that were given.
        name: the command's name.
        help: help text of the group.
        example: a command line for a method's --help.
        extra: the command's own parameters, handed to the function by keyword.
    """
    from moekit import catalogue

    records = list(catalogue.methods(kind))
    group = build_group(name=name, help=help, examples=[example(record) for record in records[:1]])
    for record in records:
        group.add_command(_method_command(record, function, example(record), extra), record.name)
    return group


def build_group(*, name: str, help: str, examples: Sequence[str]) -> TyperGroup:
    """A command that only holds others.

    Args:
        name: the command's name.
        help: help text.
        examples: shown under --help, one command line each.
    """
    return TyperGroup(
        name=name,
        help=help,
        epilog=example_lines(examples),
        no_args_is_help=True,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def _method_command(
    record: MethodRecord, function: Callable[..., None], example: str, extra: Sequence[inspect.Parameter]
) -> Command:
    own = option_parameters(record.cls, taken={p.name for p in (*extra, *_common())})

    def call(terminal: Terminal, **values: Any) -> None:
        given = {name: values.pop(name) for name in [p.name for p in own]}
        function(terminal, method=record.name, settings=read_options(record.cls, given), **values)

    # A required option of the method must not come after one that has a default: arguments first, the rest by name.
    return build_command(call, examples=[example], name=record.name, help=method_help(record), extra=[*extra, *own])


def method_help(record: MethodRecord) -> str:
    """A method's help text, from its record."""
    from moekit.catalogue import TRAITS

    facts = [f"Paper: {record.paper}." if record.paper else "", f"Changes: {record.changes}."]
    facts.append("The result loads in stock transformers." if record.stock else "The result needs moekit.load.")
    if told := [TRAITS[trait] for trait in TRAITS if trait in record.traits and trait != "stock"]:
        facts.append(f"Traits: {'; '.join(told)}.")
    if record.needs:
        facts.append(f"Needs these statistics of the trace: {', '.join(record.needs)}.")
    limits = "\n\n".join(f"Limit: {limit}" for limit in record.limits)
    return "\n\n".join(part for part in (flowing(record.doc), " ".join(filter(None, facts)), limits) if part)


def flowing(text: str) -> str:
    """Docstring paragraphs without their line breaks, so that the terminal's width decides; indented lines stay."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(p if p.startswith(" ") or "::" in p else " ".join(p.split()) for p in paragraphs)
