"""`moekit methods`: what the catalogue holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli._command import build_command
from moekit.cli._options import describe, fields_of, type_name
from moekit.cli._terminal import Terminal

if TYPE_CHECKING:
    from moekit.catalogue import MethodRecord


def methods(
    terminal: Terminal,
    kind: Annotated[str | None, typer.Argument(help="Only this kind: routing, convert, place, ...")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the documentation page of each method.")] = False,
) -> None:
    """List every method, our own and those of installed packages, with its paper, needs and limits."""
    from moekit import catalogue
    from moekit.errors import BadConfig

    records = list(catalogue.methods(kind))
    if not records:
        kinds = sorted({record.kind for record in catalogue.methods()})
        raise BadConfig(f"no method is of the kind {kind!r}", hint=f"there are: {', '.join(kinds)}")
    terminal.answer(methods=[as_dict(record) for record in records])
    if markdown:
        for record in records:
            terminal.say(page(record))
        return
    rows = [(r.kind, r.name, r.paper or "-", r.stock, r.origin, r.summary) for r in records]
    terminal.table("", ("kind", "method", "paper", "stock", "from", "what it does"), rows)


def as_dict(record: MethodRecord) -> dict[str, Any]:
    """A record as JSON holds it."""
    options = {
        name: {"type": type_name(field.annotation), "help": describe(field), "required": field.is_required()}
        for name, field in fields_of(record.cls).items()
    }
    simple = ("name", "kind", "paper", "needs", "changes", "stock", "limits", "origin", "summary")
    return {**{key: getattr(record, key) for key in simple}, "options": options}


def page(record: MethodRecord) -> str:
    """A method's documentation page in Markdown, from its record alone."""
    lines = [f"# {record.name}", "", record.doc, "", "| | |", "|---|---|"]
    facts = {
        "kind": record.kind,
        "paper": record.paper or "none",
        "needs of the trace": ", ".join(record.needs) or "nothing",
        "changes": record.changes,
        "loads in stock transformers": "yes" if record.stock else "no: `moekit.load`",
        "comes from": f"`{record.cls.__module__}.{record.cls.__qualname__}`",
    }
    lines += [f"| {key} | {value} |" for key, value in facts.items()]
    if record.limits:
        lines += ["", "## Limits", "", *(f"- {limit}" for limit in record.limits)]
    fields = fields_of(record.cls)
    if fields:
        lines += ["", "## Options", "", "| option | type | meaning |", "|---|---|---|"]
        for name, field in fields.items():
            kind = type_name(field.annotation).replace("|", "or")
            lines.append(f"| `{name}` | {kind} | {describe(field).replace('|', 'or')} |")
    return "\n".join(lines) + "\n"


def build() -> Any:
    """The command."""
    return build_command(methods, examples=["moekit methods routing", "moekit methods --json"])
