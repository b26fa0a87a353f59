"""`moekit bench prune`: all pruning methods on one model and text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moekit._device import DEVICE_HELP, DTYPE_HELP, DtypeName, named_dtype
from moekit.cli._command import build_command
from moekit.cli._options import out_option, parse_value
from moekit.cli._terminal import Terminal
from moekit.errors import BadConfig, BadData

# The page and all figures, at most.
_RESULT_BYTES = 16 << 20

if TYPE_CHECKING:
    from moekit.bench.pruning import PruneBenchResult, PruneBenchSetting, Ranking, RankRow
    from moekit.data import Document


def prune(
    terminal: Terminal,
    model: Annotated[str, typer.Argument(help="MoE: folder or hub id", show_default=False)],
    data: Annotated[
        str, typer.Option(help="text that methods decide from: file, folder, source, mix or hub id", show_default=False)
    ],
    heldout: Annotated[
        str | None,
        typer.Option(help="text to measure on; by default a tenth of the data, kept apart", show_default=False),
    ] = None,
    methods: Annotated[str, typer.Option(help="comma-separated, of merging too; or all that prune")] = "all",
    keep: Annotated[
        str, typer.Option(help="budgets, comma-separated: fractions of the experts, counts, or bytes such as 12GiB")
    ] = "0.75,0.5",
    seeds: Annotated[int, typer.Option(min=1, help="runs of random, and of other methods that draw numbers")] = 5,
    domain: Annotated[
        str | None,
        typer.Option(help="tasks, comma-separated domains: methods also decide from each alone", show_default=False),
    ] = None,
    knobs: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="METHOD.KNOB=VALUE", help="A knob of a method; may be repeated."),
    ] = None,
    out: Annotated[Path, out_option("folder of the page and of bench.json", show_default=True)] = Path("bench-prune"),
    max_tokens: Annotated[int, typer.Option(min=2, help="tokens of data, at most")] = 65536,
    heldout_tokens: Annotated[int, typer.Option(min=2, help="held-out tokens, at most")] = 32768,
    search_tokens: Annotated[int, typer.Option(min=2, help="tokens for methods that decide by trying")] = 4096,
    seq_len: Annotated[int, typer.Option(min=2, help="tokens a row; the model's limit if that is less")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="rows a pass")] = 4,
    window: Annotated[int, typer.Option(min=2, help="longest context of the held-out text, in tokens")] = 512,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="choices a token from now on; as before", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto",
    dtype: Annotated[DtypeName, typer.Option(help=DTYPE_HELP)] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="forget what the folder holds")] = False,
) -> None:
    """Prune one model by every method at several sizes, measure what each costs, and rank them.

    The text goes through the model once for all methods together; all pruned models walk the held-out text side by
    side, and none is written. What was measured is kept in the folder: a run that was ended goes on, and another method
    or size of the same model and text joins what is there. Methods of other packages take part by being installed.
    """
    setting = _setting(
        methods=methods,
        keep=keep,
        knobs=knobs or [],
        domains=_split(domain),
        seeds=seeds,
        seq_len=seq_len,
        batch_size=batch_size,
        window=window,
        search_tokens=search_tokens,
        top_k=top_k,
        seed=terminal.seed,
    )
    if terminal.dry_run:
        _print_estimate(terminal, model, (data, heldout), out, setting, _Run(max_tokens, heldout_tokens, device, dtype))
        return
    with _held(out):
        tokens = (max_tokens, heldout_tokens)
        result = _measure(terminal, setting, model, (data, heldout), tokens, out, device, dtype, overwrite)
        page = _write(terminal, result, out)
    _show(terminal, result)
    terminal.answer(out=str(out), page=str(page), **result.model_dump(mode="json"))
    terminal.say(f"wrote {out}")


def _setting(*, methods: str, keep: str, knobs: Sequence[str], domains: list[str], **more: Any) -> PruneBenchSetting:
    from pydantic import ValidationError

    from moekit.bench.pruning import PruneBenchSetting, default_entries
    from moekit.cli._errors import config_error

    names = None if methods == "all" else _split(methods)
    budgets = [parse_value(part, option="keep") for part in _split(keep)]
    entries = default_entries(names, _by_method(knobs))
    try:
        return PruneBenchSetting(entries=entries, keep=tuple(budgets), domains=tuple(domains), **more)
    except ValidationError as error:
        raise config_error(error) from error


def _by_method(knobs: Sequence[str]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for knob in knobs:
        name, sign, value = knob.partition("=")
        method, dot, option = name.partition(".")
        if not sign or not dot or not option.isidentifier():
            raise BadConfig(f"{knob!r} is no knob", hint="write METHOD.KNOB=VALUE, e.g. dern.alpha=0.4")
        found.setdefault(method, {})[option] = parse_value(value, option=name)
    return found


def _split(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """The folder, if it is a bench's or new; nobody else writes it meanwhile."""
    from moekit.bench.pruning.folder import check_folder
    from moekit.checkpoint.atomic import lock

    target = out.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with lock(target):
        check_folder(out)
        yield


def _measure(
    terminal: Terminal,
    setting: PruneBenchSetting,
    model: str,
    texts: tuple[str, str | None],
    tokens: tuple[int, int],
    out: Path,
    device: str,
    dtype: str,
    overwrite: bool,
) -> PruneBenchResult:

    from moekit.bench.pruning import Subject, bench_pruning, take_tokens
    from moekit.bench.pruning.folder import WORK, earlier_result, forget
    from moekit.jobs.shared.opened import open_source

    progress = terminal.progress
    source = open_source(model, progress)
    calibration, heldout = (
        _read(terminal, *part) for part in ((texts[0], texts[1], "train"), (texts[1] or texts[0], texts[1], "heldout"))
    )
    if missing := [name for name in setting.domains if name not in {d.domain for d in heldout}]:
        raise BadData(f"the held-out text has no domain {', '.join(missing)}", hint="measure on text of each task")
    tokenizer = source.tokenizer()
    subject = Subject(
        source.checkpoint,
        named_dtype(dtype),
        device,
        tokenizer,
        texts[0] if texts[1] is not None else f"{texts[0]}[train]",
    )
    limits = {"seq_len": min(setting.seq_len, source.longest), "window": min(setting.window, source.longest)}
    shown = take_tokens(calibration, tokenizer, tokens[0])
    measured = take_tokens(heldout, tokenizer, tokens[1])
    # Not before all else is known to be in order: a mistyped option costs nobody a result.
    if overwrite:
        forget(out)
    earlier = earlier_result(out)
    setting = setting.model_copy(update=limits)
    return bench_pruning(subject, shown, measured, setting, out / WORK, progress, earlier=earlier)


def _read(terminal: Terminal, text: str, heldout: str | None, part: str) -> list[Document]:
    """A text of its own as a whole; where there is one text for both, the part of it."""
    from moekit.jobs.shared.inputs import read_text

    split = part if heldout is None else None
    return read_text(text, split=split, seed=terminal.seed, progress=terminal.progress)


@dataclass(frozen=True)
class _Run:
    """How much text goes through the model, where, and how wide."""

    tokens: int
    heldout_tokens: int
    device: str
    dtype: DtypeName


def _print_estimate(
    terminal: Terminal, model: str, texts: tuple[str, str | None], out: Path, setting: PruneBenchSetting, run: _Run
) -> None:
    from moekit.jobs.estimates import ByteSizes, Item, JobEstimate
    from moekit.jobs.shared.inputs import lies_here, model_item, text_item

    sizes = ByteSizes()
    reads = (model_item(model, sizes), *(text_item(text, sizes) for text in texts if text is not None))
    runs = len(setting.entries) - 1 + setting.seeds
    count = runs * len(setting.keep) * (1 + len(setting.domains))
    notes = (
        f"{len(setting.entries)} methods, about {count} pruned models, none of them written",
        "layers are read from disk one at a time: memory does not grow with their number",
    )
    written = Item(str(out), _RESULT_BYTES)
    disk = memory = None
    if lies_here(model):
        disk, memory = _needs(model, setting, run, count)
    terminal.estimate(JobEstimate(reads, (written,), disk=disk, memory=memory, notes=notes))


def _needs(model: str, setting: PruneBenchSetting, run: _Run, count: int) -> tuple[int, int]:
    """Bytes on disk and in memory: states of the pass over the text, then those of models that are measured together.

    Args:
        model: its folder.
        setting: of the bench.
        run: how much text goes through it.
        count: pruned models.
    """
    from moekit.bench.pruning.measuring import MOST_TOGETHER
    from moekit.jobs.shared.opened import open_source
    from moekit.jobs.weights.sizes import bytes_between, memory_of

    source = open_source(model)
    decided = bytes_between(source, run, tokens=run.tokens)
    variants = min(count, MOST_TOGETHER)
    measured = bytes_between(source, run, proof_tokens=run.heldout_tokens, variants=variants)
    # What is measured stays in memory as far as it may, beyond that it lies in a file of the system's.
    kept = setting.memory_bytes // 2
    disk = _RESULT_BYTES + max(decided, measured if measured > kept else 0)
    return disk, memory_of(source, run) + setting.memory_bytes


def _write(terminal: Terminal, result: PruneBenchResult, out: Path) -> Path:
    from moekit.bench.pruning.result import FILE
    from moekit.report import build as build_page
    from moekit.report.sections.pruning import report

    result.save(out / FILE)
    page: Path = build_page(report(result, terminal.command), out)
    return page


def _show(terminal: Terminal, result: PruneBenchResult) -> None:
    from moekit.report.sections.pruning_findings import findings, headline

    for ranking in result.rankings:
        terminal.table(_title(ranking), _COLUMNS, [_row(row) for row in ranking.rows])
    for skipped in result.skipped:
        terminal.say(f"{skipped.name} took no part ({skipped.calibration}): {skipped.reason}")
    for finding in (headline(result), *findings(result)):
        terminal.say(finding.text)


_COLUMNS = (
    "method",
    "seeds",
    "loss",
    "perplexity",
    "rise",
    "low",
    "high",
    "of random's rise avoided",
    "against frequency",
    "over seeds",
    "output changed",
    "seconds",
)


def _title(ranking: Ranking) -> str:
    from moekit.report.sections.pruning_findings import keep_name

    decided = "" if ranking.calibration == "all" else f", decided from {ranking.calibration} alone"
    measured = "" if ranking.text == "all" else f", on {ranking.text}"
    return f"{keep_name(ranking.keep)}{decided}{measured}; unchanged {ranking.unchanged:.3f} nats a token"


def _row(row: RankRow) -> tuple[Any, ...]:
    rise, frequency = row.rise, row.against_frequency
    return (
        row.name,
        row.seeds,
        row.nll,
        math.exp(min(row.nll, 690.0)),
        *((None, None, None) if rise is None else (rise.mean, rise.low, rise.high)),
        None if row.removed is None else f"{row.removed.mean:.0%}",
        None if frequency is None else frequency.mean,
        row.spread,
        row.reconstruction,
        row.seconds,
    )


def command() -> Any:
    """The command."""
    return build_command(
        prune,
        name="prune",
        examples=[
            "moekit bench prune ./moe --data ./text -o ./bench",
            "moekit bench prune ./moe --data demo --methods reap,easy-ep,dern --keep 0.75,0.5 --set dern.alpha=0.4",
            'moekit bench prune ./moe --data ./text --domain "python,man pages" --seeds 10 -o ./tasks',
        ],
    )
