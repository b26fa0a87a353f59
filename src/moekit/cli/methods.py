"""`moekit methods`: what the catalogue holds."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli._command import build_command, method_help
from moekit.cli._examples import example_of
from moekit.cli._options import describe, fields_of, type_name
from moekit.cli._terminal import Terminal

if TYPE_CHECKING:
    from moekit.catalogue import MethodRecord

# Not a kind of method, but what methods see.
STATISTICS = "statistics"


def methods(
    terminal: Terminal,
    kind: Annotated[
        str | None, typer.Argument(help="Only this kind: routing, convert, place, ...; or: statistics")
    ] = None,
    name: Annotated[str | None, typer.Argument(help="Only this method: all that is known of it")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the documentation page of each method.")] = False,
) -> None:
    """List every method, our own and those of installed packages, with its paper, needs and limits.

    `moekit methods KIND NAME` shows a method's knobs and an example. `moekit methods statistics` lists what `profile
    --statistics` can sum up instead, and what each one looks at.
    """
    from moekit import catalogue
    from moekit.errors import BadConfig

    if kind == STATISTICS:
        _statistics(terminal)
        return
    records = list(catalogue.methods(kind))
    if not records:
        kinds = sorted({record.kind for record in catalogue.methods()})
        raise BadConfig(f"no method is of the kind {kind!r}", hint=f"there are: {', '.join([*kinds, STATISTICS])}")
    if name is not None:
        records = [catalogue.get(str(kind), name)]
    terminal.answer(methods=[as_dict(record) for record in records])
    if markdown:
        for record in records:
            terminal.say(page(record))
        return
    if name is not None:
        _show(terminal, records[0])
        return
    rows = [(r.kind, r.name, r.paper or "-", r.axis, traits_of(r), r.origin, r.summary) for r in records]
    terminal.table("", ("kind", "method", "paper", "axis", "traits", "from", "what it does"), rows)
    terminal.say("")
    terminal.say(f"moekit methods {kind or 'KIND'} NAME shows a method's knobs, limits and an example.")


def _show(terminal: Terminal, record: MethodRecord) -> None:
    terminal.say(f"{record.kind} {record.name}\n\n{method_help(record)}\n")
    rows = [(name, type_name(field.annotation), describe(field)) for name, field in fields_of(record.cls).items()]
    if rows:
        terminal.table("", ("knob", "type", "what it is"), rows)
    else:
        terminal.say("It has no knobs.")
    if example := example_of(record):
        terminal.say(f"\nExample: {example}")


def _statistics(terminal: Terminal) -> None:
    from moekit.trace.sources.table import source_of
    from moekit.trace.vocabulary import GROUPS, known_families, known_statistics

    entries = known_statistics().values()
    families = known_families()
    terminal.answer(
        statistics=[
            {
                "name": entry.name,
                "shape": entry.shape,
                "origin": entry.origin,
                "summary": entry.doc,
                "looks_at": {name: source_of(name).shows for name in entry.sources},
                "live_only": next((live for name in entry.sources if (live := source_of(name).live)), ""),
            }
            for entry in entries
        ],
        families=[{"name": name, "summary": doc} for name, doc in families.items()],
        groups={name: list(members) for name, members in GROUPS.items()},
    )
    rows = [(e.name, e.shape or "-", ", ".join(e.sources), e.origin, e.doc) for e in entries]
    rows += [(f"{name}(...)", "", "", "", doc) for name, doc in families.items()]
    terminal.table("", ("statistic", "axes", "looks at", "from", "what it is"), rows)
    for name, members in GROUPS.items():
        terminal.say(f"group {name}: {', '.join(members)}")


def traits_of(record: MethodRecord) -> str:
    """A record's traits in a row, in the order in which the taxonomy explains them."""
    from moekit.catalogue import TRAITS

    return ", ".join(trait for trait in TRAITS if trait in record.traits) or "-"


def as_dict(record: MethodRecord) -> dict[str, Any]:
    """A record as JSON holds it."""
    options = {
        name: {"type": type_name(field.annotation), "help": describe(field), "required": field.is_required()}
        for name, field in fields_of(record.cls).items()
    }
    simple = ("name", "kind", "paper", "needs", "changes", "stock", "limits", "origin", "summary")
    told = {key: getattr(record, key) for key in simple}
    return {**told, "axis": record.axis, "traits": sorted(record.traits), "options": options}


def page(record: MethodRecord) -> str:
    """A method's documentation page in Markdown, from its record alone."""
    from moekit.catalogue import AXES, TRAITS

    lines = [f"# {record.name}", "", record.doc, "", "| | |", "|---|---|"]
    facts = {
        "kind": record.kind,
        "paper": linked(record.paper) or "none",
        "needs of the trace": ", ".join(record.needs) or "nothing",
        "changes": record.changes,
        "axis": f"{record.axis}: {AXES[record.axis]}",
        "loads in stock transformers": "yes" if record.stock else "no: `moekit.load`",
        "comes from": f"`{record.cls.__module__}.{record.cls.__qualname__}`",
    }
    lines += [f"| {key} | {value} |" for key, value in facts.items()]
    if example := example_of(record):
        lines += ["", "## Example", "", "```sh", example, "```"]
    if promised := [trait for trait in TRAITS if trait in record.traits]:
        lines += ["", "## Traits", "", *(f"- {trait}: {TRAITS[trait]}." for trait in promised)]
    if record.limits:
        lines += ["", "## Limits", "", *(f"- {limit}" for limit in record.limits)]
    fields = fields_of(record.cls)
    if fields:
        lines += ["", "## Options", "", "| option | type | meaning |", "|---|---|---|"]
        for name, field in fields.items():
            kind = type_name(field.annotation).replace("|", "or")
            lines.append(f"| `{name}` | {kind} | {describe(field).replace('|', 'or')} |")
    return "\n".join(lines) + "\n"


def linked(paper: str | None) -> str:
    """A paper in Markdown, each arXiv id as a link; "" for none."""
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper or "")


def build() -> Any:
    """The command."""
    return build_command(
        methods,
        examples=[
            "moekit methods routing",
            "moekit methods prune reap",
            "moekit methods statistics",
            "moekit methods --json",
        ],
    )
