"""`moekit sparsify`: zero single weights of the experts, and prove what that costs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from moekit.cli._command import build_command
from moekit.cli._options import option_parameters, read_options
from moekit.cli._steps import carry_out
from moekit.cli._terminal import Terminal
from moekit.errors import BadConfig

# Fields that the command line gives in another way.
_ELSEWHERE = ("id", "use", "seed", "settings", "write", "model", "from_plan")
_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _own(name: str, kind: Any, default: Any, option: Any) -> inspect.Parameter:
    return inspect.Parameter(name, _KEYWORD, default=default, annotation=Annotated[kind, option])


def _call(terminal: Terminal, **values: Any) -> None:
    from moekit.recipe.steps.sparsify import SparsifyStep
    from moekit.recipe.variables import parse_overrides

    out, overwrite, knobs = values.pop("out"), values.pop("overwrite"), values.pop("knobs")
    given = read_options(SparsifyStep, values)
    if knobs:
        given["settings"] = parse_overrides(knobs)
    plan = given.get("plan")
    if plan is None and out is None:
        raise BadConfig("nothing says what to write", hint="-o OUT for a model, --plan FILE for a plan, or both")
    if plan is not None:
        _check_plan_file(Path(plan), overwrite)
    if out is None:
        given["write"], out = "plan", Path(given.pop("plan"))
    carry_out(terminal, SparsifyStep, given, out, overwrite, show)


def _check_plan_file(file: Path, overwrite: bool) -> None:
    if file.suffix != ".json":
        raise BadConfig(f"a plan is a .json file, not {file.name!r}", hint=f"--plan {file.name}.json")
    if file.exists() and not overwrite:
        raise BadConfig("the file exists", file=file, hint="choose another one, or say --overwrite")


def show(terminal: Terminal, results: Mapping[str, Any]) -> None:
    """Print the zeros counted and what they cost."""
    settings = ", ".join(f"{key}={value}" for key, value in results["settings"].items() if value is not None)
    terminal.say(f"{results['method']} ({settings})" if settings else results["method"])
    _show_weights(terminal, results)
    proof = results.get("proof")
    if proof is not None:
        _show_text(terminal, proof)
    _show_layers(terminal, results, proof)
    for line in results.get("check", {}).get("proven", ()):
        terminal.say(f"proven: {line}")


def _show_weights(terminal: Terminal, results: Mapping[str, Any]) -> None:
    told = results["weights"]
    original, present, zeros = told["original"], told["present"], told["zeros"]
    if zeros is None:
        terminal.say(f"{results['sparsity']:.2%} of {present:,} weights of routed experts are to become zero")
        return
    terminal.say(f"zeros: {zeros:,} of {present:,} weights of routed experts ({told['sparsity']:.4%})")
    if original is not None and original != present:
        gone = original - present + zeros
        terminal.say(
            f"gone in all: {original - present:,} with their experts + {zeros:,} zeros = {gone:,} of {original:,} "
            f"({told['total']:.4%})"
        )


def _show_text(terminal: Terminal, proof: Mapping[str, Any]) -> None:
    costs = [proof["method"], *proof["baselines"]]
    rows: list[tuple[Any, ...]] = []
    for parts in zip(*(_parts(cost["text"]) for cost in costs), strict=True):
        rows.append((parts[0]["domain"], "unchanged", parts[0]["a"]["perplexity"], None, None, None))
        for cost, part in zip(costs, parts, strict=True):
            rows.append((part["domain"], cost["name"], part["b"]["perplexity"], *_ratio(part["difference"])))
    title = f"held-out text ({proof['documents']} documents, {proof['tokens']:,} tokens), 95 % intervals"
    terminal.table(title, ("on", "model", "perplexity", "x unchanged", "low", "high"), rows)
    for text in proof["against"]:
        against = [
            (part["domain"], *_ratio(part["difference"]), (part["difference"] or {}).get("p_value"))
            for part in _parts(text)
        ]
        title = f"{proof['method']['name']} against {text['a']} at the same sparsity"
        terminal.table(title, ("on", "x its perplexity", "low", "high", "p"), against)


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
    columns = ["layer", "experts", "zeros asked %", "zeros %", "never routed"]
    columns += [f"error: {cost['name']}" for cost in costs]
    rows = []
    for layer in results["layers"]:
        zeros = None if layer["zeros"] is None else 100 * layer["zeros"]
        row = [layer["layer"], layer["experts"], 100 * layer["sparsity"], zeros, len(layer["never_routed"])]
        rows.append(row + [_at(cost["reconstruction"], layer["layer"]) for cost in costs])
    terminal.table("layer by layer", columns, rows)
    if costs:
        terminal.say("error: of the block's output, relative to its norm")


def _at(values: Mapping[Any, float], layer: int) -> float:
    """A layer's value; JSON makes its number text."""
    return values[layer] if layer in values else values[str(layer)]


def build() -> Any:
    """The command."""
    from moekit.recipe.steps.sparsify import SparsifyStep

    model = typer.Argument(help="MoE: folder or hub id; a stored plan (--from) names its own.", show_default=False)
    out = typer.Option("--out", "-o", help="Folder of the sparse model.", show_default=False)
    overwrite = typer.Option("--overwrite", help="Replace OUT, at the very end, if it is there.")
    stored = typer.Option("--from", metavar="PLAN", help="Carry this plan out again: the same zeros without a text.")
    knobs = typer.Option("--set", metavar="KNOB=VALUE", help="A knob of the method; may be repeated.")
    return build_command(
        _call,
        name="sparsify",
        help="Zero single weights of the experts: decide on text, prove what it costs on held-out text, against "
        "magnitudes at the same sparsity, write, and check what was written. Methods: moekit methods sparsify.",
        extra=[
            _own("model", str | None, None, model),
            _own("out", Path | None, None, out),
            _own("overwrite", bool, False, overwrite),
            *option_parameters(SparsifyStep, without=_ELSEWHERE, panel=None),
            _own("from_plan", str | None, None, stored),
            _own("knobs", list[str] | None, None, knobs),
        ],
        examples=[
            "moekit sparsify ./moe --method wanda --sparsity 0.5 --data demo -o ./sparse",
            "moekit sparsify ./moe --method wanda --set pattern=2:4 --data my-domain/ -o ./two-of-four",
            "moekit sparsify ./pruned --method owl --total 0.65 --data demo --plan ./p.json -o ./sparse",
            "moekit sparsify --from ./p.json -o ./again",
        ],
    )
