"""`moekit prune`: drop the experts a model needs least, and prove what that costs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit.cli._command import build_command
from moekit.cli._options import option_parameters, read_options
from moekit.cli._steps import carry_out
from moekit.cli._terminal import Terminal, size
from moekit.errors import BadConfig

if TYPE_CHECKING:
    from moekit.recipe.steps.base import Step

# Fields that the command line gives in another way.
_ELSEWHERE = ("id", "use", "seed", "settings", "write")
_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _own(name: str, kind: Any, default: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, _KEYWORD, default=default, annotation=Annotated[kind, option])


def out_parameters() -> list[inspect.Parameter]:
    """`-o OUT` and `--overwrite`."""
    out = typer.Option("--out", "-o", help="Folder of the smaller model.", show_default=False)
    overwrite = typer.Option("--overwrite", help="Replace OUT, at the very end, if it is there.")
    return [_own("out", Path | None, None, out), _own("overwrite", bool, False, overwrite)]


def step_options(step: type[Step], arguments: Sequence[str]) -> list[inspect.Parameter]:
    """The arguments and options of a step that writes to `-o OUT`."""
    own = option_parameters(step, without=_ELSEWHERE, arguments=arguments, panel=None)
    return [*own[: len(arguments)], *out_parameters(), *own[len(arguments) :]]


def _call(terminal: Terminal, **values: Any) -> None:
    from moekit.recipe.steps.prune import PruneStep
    from moekit.recipe.variables import parse_overrides

    out, overwrite, knobs = values.pop("out"), values.pop("overwrite"), values.pop("knobs")
    given = read_options(PruneStep, values)
    if knobs:
        given["settings"] = parse_overrides(knobs)
    plan = given.get("plan")
    if plan is None and out is None:
        raise BadConfig("nothing says what to write", hint="-o OUT for a model, --plan FILE for a plan, or both")
    if plan is not None:
        _check_plan_file(Path(plan), overwrite)
    if out is None:
        given["write"], out = "plan", Path(given.pop("plan"))
    carry_out(terminal, PruneStep, given, out, overwrite, show)


def _check_plan_file(file: Path, overwrite: bool) -> None:
    if file.suffix != ".json":
        raise BadConfig(f"a plan is a .json file, not {file.name!r}", hint=f"--plan {file.name}.json")
    if file.exists() and not overwrite:
        raise BadConfig("the file exists", file=file, hint="choose another one, or say --overwrite")


def show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    """Print what was decided and what it costs."""
    settings = ", ".join(f"{key}={value}" for key, value in results["settings"].items() if value is not None)
    terminal.say(f"{results['method']} ({settings})" if settings else results["method"])
    experts, nbytes = results["experts"], results["bytes"]
    share = 1 - nbytes["after"] / nbytes["before"]
    terminal.say(
        f"experts {experts['before']:,} -> {experts['after']:,}, "
        f"{size(nbytes['before'])} -> {size(nbytes['after'])} ({share:.0%} less)"
    )
    proof = results.get("proof")
    if proof is not None:
        _show_text(terminal, proof)
    _show_layers(terminal, results, proof)
    _show_figures(terminal, results["layers"])
    for line in results.get("check", {}).get("proven", ()):
        terminal.say(f"proven: {line}")


def _show_text(terminal: Terminal, proof: Mapping[str, Any]) -> None:
    costs = [proof["method"], *proof["baselines"]]
    rows: list[tuple[Any, ...]] = []
    for parts in zip(*(_parts(cost["text"]) for cost in costs), strict=True):
        rows.append((parts[0]["domain"], "unchanged", parts[0]["a"]["perplexity"], None, None, None))
        for cost, part in zip(costs, parts, strict=True):
            rows.append((part["domain"], cost["name"], part["b"]["perplexity"], *_ratio(part["difference"])))
    title = f"held-out text ({proof['documents']} documents, {proof['tokens']:,} tokens), 95 % intervals"
    terminal.table(title, ("on", "model", "perplexity", "x unchanged", "low", "high"), rows)
    against = [
        (text["a"], part["domain"], *_ratio(part["difference"]), (part["difference"] or {}).get("p_value"))
        for text in proof["against"]
        for part in _parts(text)
    ]
    name = proof["method"]["name"]
    terminal.table(
        f"{name} against baselines of the same budget",
        ("baseline", "on", "x its perplexity", "low", "high", "p"),
        against,
    )
    spread = proof["random"]
    if spread is not None:
        terminal.say(
            f"random, {spread['seeds']} seeds: perplexity {spread['mean']:.4g}, standard deviation "
            f"{spread['deviation']:.3g}, from {spread['least']:.4g} to {spread['most']:.4g}"
        )


def _parts(text: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All text, then each domain where there are several."""
    domains = text["domains"] if len(text["domains"]) > 1 else ()
    return [text["overall"], *domains]


def _ratio(difference: Mapping[str, Any] | None) -> tuple[Any, Any, Any]:
    if difference is None:
        return (None, None, None)
    return (difference["ratio"], difference["ratio_low"], difference["ratio_high"])


def _show_layers(terminal: Terminal, results: Mapping[str, Any], proof: Mapping[str, Any] | None) -> None:
    costs = [] if proof is None else [proof["method"], *proof["baselines"]]
    columns = ["layer", "experts", "kept", "never routed"]
    if proof is not None:
        columns += ["tokens hit %", "choices lost %", *(f"error: {cost['name']}" for cost in costs)]
    rows = []
    for layer in results["layers"]:
        row = [layer["layer"], layer["experts"], len(layer["kept"]), len(layer["never_routed"])]
        if proof is not None:
            number = layer["layer"]
            row += [100 * _at(proof["method"][name], number) for name in ("lost_tokens", "lost_choices")]
            row += [_at(cost["reconstruction"], number) for cost in costs]
        rows.append(row)
    terminal.table("layer by layer", columns, rows)
    if proof is not None:
        terminal.say("hit: had chosen an expert that is gone; error: of the block's output, relative to its norm")


def _show_figures(terminal: Terminal, layers: Sequence[Mapping[str, Any]]) -> None:
    """What the method itself tells of each layer, as far as it is single numbers."""
    found = [{k: v for k, v in layer["figures"].items() if isinstance(v, int | float)} for layer in layers]
    names = list(dict.fromkeys(name for figures in found for name in figures))
    if names:
        rows = [
            (layer["layer"], *(figures.get(name) for name in names))
            for layer, figures in zip(layers, found, strict=True)
        ]
        terminal.table("what the method tells", ("layer", *(name.replace("_", " ") for name in names)), rows)


def _at(values: Mapping[Any, float], layer: int) -> float:
    """A layer's value; JSON makes its number text."""
    return values[layer] if layer in values else values[str(layer)]


def build() -> Any:
    """The command."""
    from moekit.recipe.steps.prune import PruneStep

    knobs = typer.Option("--set", metavar="KNOB=VALUE", help="A knob of the method; may be repeated.")
    return build_command(
        _call,
        name="prune",
        help="Drop the experts that a model needs least: decide on text, prove what it costs on held-out text, against "
        "frequency and random pruning of the same budget, write, and check what was written. Methods: moekit methods "
        "prune.",
        extra=[*step_options(PruneStep, ("model",)), _own("knobs", list[str] | None, None, knobs)],
        examples=[
            "moekit prune ./moe --method easy-ep --keep 0.5 --data my-domain/ -o ./half",
            "moekit prune ./moe --method dern --set alpha=0.4 --keep 64 --data demo --protect super -o ./dern",
            "moekit prune ./moe --method reap --keep 0.5 --data demo --plan ./p.json",
            "moekit prune ./moe --method reap --keep 12GiB --scope global --least 16 --data demo -o ./uneven",
        ],
    )
