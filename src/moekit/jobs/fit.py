"""`use: fit`: make a model fit a number of bytes, by all kinds of compression under one budget, at the least loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from moekit._device import DtypeName, resolve_device
from moekit.compress.joint.planning import Planner
from moekit.compress.joint.profiles import ProfileName
from moekit.data.encoding import Bos
from moekit.errors import BadConfig, MoekitError
from moekit.jobs.call import JobResult, TextLike, call
from moekit.jobs.context import JobContext
from moekit.jobs.estimates import ByteSizes, Item, JobEstimate
from moekit.jobs.fitting.carrying import Carrier
from moekit.jobs.fitting.choosing import choose
from moekit.jobs.fitting.costs import price as price_recipes
from moekit.jobs.fitting.finishing import check_told, logger, save_plan, stored_bytes, summary, write_model
from moekit.jobs.fitting.healing import check_healing, healed, unhealed_folder
from moekit.jobs.fitting.request import ask, methods_of, parse_bytes
from moekit.jobs.options.fit import FitOptions
from moekit.jobs.shared.inputs import lies_here, model_item, text_item
from moekit.jobs.shared.outputs import model_or_plan
from moekit.jobs.weights.plans import PLAN_BYTES
from moekit.jobs.weights.sizes import check_disk
from moekit.jobs.weights.texts import read_texts
from moekit.progress import ProgressLike

_STREAMED = "layers are read from disk one at a time, but for one way back through the whole model where that fits"


class FitResult(JobResult):
    """Which plan was taken, what it was expected to cost, and what it was measured to cost.

    Attributes:
        engine: what is to load the result.
        model: what was made to fit.
        methods: way -> name and knobs of the method that carries it out.
        plan: hash of the plan.
        name: of the plan among those that were tried.
        tokens: that costs were measured on.
        price: "fisher" for nats a token, "change" for changes of the residual stream.
        bytes: before, asked for, fewest that could be met, after as the budget counts, and of the folder's weights.
        packed: form in which the folder must be exported to take as few bytes as counted; "" where it does already.
        expected: cost of the plan.
        bound: no plan of the same width and number of experts is expected to cost less; None for plans not solved for.
        measured: KL of the unchanged model's predictions to the result's on held-out text that it was not chosen on,
            nats a token; None without a proof.
        correlation: of the ranks of expected and measured costs of all plans tried; None with fewer than three.
        tried: plans, best first by `chosen_on`, the KL on one half of the held-out documents; `measured` on the other.
        front: expected costs over budgets.
        layers: each with its recipe, bytes and expected cost.
        refused: recipes that this family cannot hold, and why.
        warnings: what a reader must know.
        proof: held-out text, the best plan against the others; None where nothing was measured.
        check: what the check of the written folder found; None where only a plan was written.
        healed: what learnt, the folder of the model before, and what healing told; None without.
    """

    engine: ProfileName
    model: str
    methods: dict[str, Any]
    plan: str
    name: str
    tokens: int
    price: Literal["fisher", "change"]
    bytes: dict[str, int]
    packed: str
    expected: float
    bound: float | None
    measured: float | None
    correlation: float | None
    tried: list[dict[str, Any]]
    front: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    refused: dict[str, str]
    warnings: list[str]
    proof: dict[str, Any] | None = None
    check: dict[str, Any] | None = None
    healed: dict[str, Any] | None = None


def fit(
    model: str | Path,
    *,
    bytes: int | str,
    engine: ProfileName = "stock",
    data: TextLike,
    heldout: TextLike | None = None,
    drop: str = "reap",
    merge: str = "hc-smoe",
    narrow: str = "slimmoe",
    rounding: str = "rtn",
    settings: Mapping[str, Any] | None = None,
    ways: tuple[Literal["drop", "merge"], ...] = ("drop", "merge"),
    experts: tuple[float, ...] = (0.75, 0.5),
    widths: tuple[float, ...] = (0.75, 0.5),
    bits: tuple[int, ...] = (),
    group: int | None = None,
    choices: int = 24,
    price: Literal["auto", "fisher", "change"] = "auto",
    tries: int = 3,
    random_plans: int = 6,
    front: int = 8,
    costs: str | Path | None = None,
    max_tokens: int | None = 65536,
    seq_len: int = 512,
    batch_size: int = 8,
    heal: Literal["none", "router", "norms", "experts", "lora", "all"] = "none",
    heal_settings: Mapping[str, Any] | None = None,
    unhealed: str | Path | None = None,
    plan: str | Path | None = None,
    write: Literal["model", "plan"] = "model",
    proof: bool = True,
    proof_tokens: int | None = 32768,
    window: int | None = None,
    bos: Bos = "auto",
    device: str = "auto",
    dtype: DtypeName = "auto",
    out: str | Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    progress: ProgressLike = None,
) -> FitResult:
    """Make a model fit a number of bytes by fewer, merged, narrower and rounded experts together, at the least loss.

    Args:
        model: MoE: folder or hub id.
        bytes: of the result's weight files, such as 12GiB.
        engine: what is to load the result. stock: a folder of plain weights, one number of experts and one width for
            all layers; vllm, llama.cpp: bits besides, layer by layer, counted as they will be packed; moekit: the
            number of experts, too, layer by layer.
        data: text to measure costs on: file, folder, source, mix or hub id.
        heldout: text to measure plans on; by default a tenth of data, which is kept apart for it.
        drop: which experts are dropped; see moekit methods prune.
        merge: which experts are merged; see moekit methods merge.
        narrow: how experts become narrower; see moekit methods slim.
        rounding: how weights are rounded; see moekit methods quantize.
        settings: knobs of these methods: drop, merge, narrow or bits -> knob -> value.
        ways: how experts go: dropped, merged, or either.
        experts: fractions of the experts to try beside what the budget holds; 1 for no fewer.
        widths: fractions of the experts' neurons to try; 1 for no narrower.
        bits: to try; all that the engine holds by default.
        group: inputs that share a scale; by default the largest of 128, 64, ... that fits.
        choices: recipes that are measured in each layer.
        price: fisher: squared products of changes and gradients, in nats, which needs the whole model in memory once;
            change: of the residual stream, layer by layer; auto: fisher where it fits.
        tries: plans of least expected cost that are measured.
        random_plans: random plans of the same bytes that are measured, too: they tell whether to trust.
        front: budgets for which the expected cost is told.
        costs: file of measured costs: read where it is there, and written, for further budgets.
        max_tokens: tokens of data, at most, shared by its domains.
        seq_len: tokens a row; the model's limit if that is less.
        batch_size: rows a pass.
        heal: weights that learn, once the model fits, to answer as the unchanged one does: see `moekit.heal`.
        heal_settings: steps, lr, loss, lm, ...: `moekit.training.healing.HealConfig`.
        unhealed: folder of the model before healing, which the healed one's record names as its parent; by default
            OUT-unhealed.
        plan: also write the plan to this file.
        write: write the model, or the plan alone.
        proof: measure plans; without, the one of least expected cost is taken.
        proof_tokens: held-out tokens, at most, an equal share of each domain.
        window: longest context of the proof in tokens (default: the model's, ≤ 1024)
        bos: what stands before each text: see `moekit.data.encoding.beginning`.
        device: where layers run: cpu, cuda, ...
        dtype: of weights in memory; auto: as the model is stored, but float32 where the device would only emulate half
            precision.
        out: folder of the model that fits; None writes the plan alone.
        overwrite: replace what is there, at the very end.
        seed: of everything random; the same seed gives the same result.
        progress: see `moekit.progress`.

    Returns:
        What `moekit fit` prints.

    Raises:
        BadConfig: an impossible option, or bytes that hold no plan; names the fewest that do.
        BadData: no text.
        BadCheckpoint: the model is damaged, or what was written is not what it must be; then nothing is left.
        UnsupportedModel: no Mixture of Experts, or weights that are quantized already.
        OutOfBudget: the disk is too small.
    """
    return call(FitOptions, FitResult, dict(locals()))


def settle(options: FitOptions, out: Path | None, overwrite: bool) -> tuple[FitOptions, Path, bool]:
    """Without `out` the plan alone is written."""
    return model_or_plan(options, out, overwrite)


def check(options: FitOptions) -> None:
    """Refuse unknown methods, impossible knobs and bytes."""
    parse_bytes(options.bytes)
    resolve_device(options.device)
    check_healing(options)
    methods_of(options, 0, gradients=options.price != "change")
    if options.costs is not None and Path(options.costs).suffix != ".json":
        name = Path(options.costs).name
        raise BadConfig(f"costs are a .json file, not {name!r}", hint=f"--costs {name}.json")


def estimate(options: FitOptions, out: Path, sizes: ByteSizes) -> JobEstimate:
    """Exact where the model lies here; the bytes of a model that is not here yet are those of its parent."""
    model = model_item(options.model, sizes)
    reads = [model, *(text_item(text, sizes) for text in (options.data, options.heldout) if text)]
    plan_only = options.write == "plan"
    if model.nbytes is None or not lies_here(options.model):
        nbytes = PLAN_BYTES if plan_only else model.nbytes
        return JobEstimate(tuple(reads), (Item(str(out), nbytes),), disk=nbytes, notes=(_STREAMED,))
    asked = ask(options)
    written = PLAN_BYTES if plan_only else asked.written * (1 if options.heal == "none" else 2)
    recipes = f"{len(asked.menu.recipes)} recipes a layer; {asked.floor:,} bytes are the fewest that they can meet"
    return JobEstimate(
        tuple(reads),
        (Item(str(out), written),),
        disk=written + asked.between,
        memory=asked.memory,
        notes=(recipes, _STREAMED),
    )


def run(options: FitOptions, context: JobContext) -> dict[str, Any]:
    """Refuse what is impossible, price recipes, solve, measure the best plans, write the best, check it."""
    check(options)
    progress, scratch = context.progress, context.scratch
    asked = ask(options, progress)
    plan_only = options.write == "plan"
    check_disk(context.out, scratch, PLAN_BYTES if plan_only else asked.written, asked.between)
    documents, heldout = read_texts(
        options, asked.source, progress, apart=options.heldout is None, proves=options.proof
    )
    priced = price_recipes(options, asked, documents, scratch, seed=context.seed, progress=progress)
    planner = Planner(priced.table, asked.sizes, asked.profile, asked.even)
    asked = dataclasses.replace(asked, composer=priced.composer)
    carrier = Carrier(asked.source, asked.composer, priced.statistics, context.seed)
    chosen = choose(options, asked, planner, carrier, heldout, context)
    told = summary(asked, chosen, priced, planner, options.front)
    for line in told["warnings"]:
        logger.warning("%s", line)
    told["proof"] = None if chosen.proof is None else chosen.proof.model_dump(mode="json")
    if plan_only:
        save_plan(context.out, asked, chosen.plan, priced)
        return told
    fitted = context
    if options.heal != "none":
        # What stands there already, an interrupted run of this call wrote.
        fitted = dataclasses.replace(context, out=unhealed_folder(options, context.out), overwrite=True)
    with _plan_beside(options, lambda file: save_plan(file, asked, chosen.plan, priced), context.overwrite):
        record, report = write_model(asked, chosen, priced, carrier, fitted)
    told["bytes"]["folder"] = stored_bytes(fitted.out)
    told["check"] = check_told(record, report)
    return told if options.heal == "none" else {**told, "healed": healed(options, fitted.out, context)}


@contextmanager
def _plan_beside(options: FitOptions, save: Any, overwrite: bool) -> Iterator[None]:
    """A plan's file beside a model that is made meanwhile; one that failed leaves none."""
    if options.plan is None:
        yield
        return
    file = Path(options.plan)
    save(file)
    try:
        yield
    except (MoekitError, OSError):
        if not overwrite:
            file.unlink(missing_ok=True)
        raise
