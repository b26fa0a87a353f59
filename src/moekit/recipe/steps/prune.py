"""`use: prune`: decide which experts go, prove what that costs, and write the model without them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from moekit import catalogue
from moekit._device import resolve_device
from moekit.errors import BadConfig, MoekitError
from moekit.jobs.context import JobContext
from moekit.jobs.options.base import ExpertsRef, ModelRef, TextRef, TraceRef
from moekit.jobs.shared.estimates import Forecast, Item, Sizes
from moekit.jobs.shared.hashes import text_hash
from moekit.jobs.shared.inputs import calibration_rows, model_item, read_text, text_item
from moekit.jobs.shared.opened import Source, check_runnable, open_source
from moekit.jobs.shared.protection import SUPER, parse_protected, protection_needs, super_experts
from moekit.jobs.shared.pruned import Decided, finish, in_groups, told_of_plan, warn_of
from moekit.jobs.shared.pruning import (
    PLAN_FILE,
    Outlook,
    WritingOptions,
    budget_of,
    bytes_between,
    check_disk,
    foresee,
    read_heldout,
    refuse_uneven,
    tell_uneven,
)
from moekit.jobs.shared.self_calibration import answered_rows, load_for_answers
from moekit.recipe.steps.base import Step

if TYPE_CHECKING:
    from moekit.compress.engine.plan import PrunePlan
    from moekit.compress.engine.planning import Request
    from moekit.data import Document, TokenBatches
    from moekit.jobs.shared.proof import HeldOut
    from moekit.trace import Trace


class PruneStep(WritingOptions, Step):
    """Let a pruning method (`moekit methods prune`) decide, prove what that costs, and write the smaller model."""

    use: Literal["prune"] = "prune"
    model: ModelRef = Field(description="MoE: folder or hub id")
    method: str = Field(description="which experts go; see moekit methods prune")
    settings: dict[str, Any] = Field(default_factory=dict, description="the method's own knobs")
    keep: int | float | str = Field(
        description="what stays: experts a layer (64), their fraction (0.5; 1.0 is all), or bytes of the model (12GiB)"
    )
    data: TextRef | None = Field(default=None, description="text to decide on: file, folder, source, mix or hub id")
    trace: TraceRef | None = Field(default=None, description="trace of this model to decide on, instead of data")
    heldout: TextRef | None = Field(
        default=None, description="text to prove the result on; by default a tenth of data, which is kept apart for it"
    )
    scope: Literal["uniform", "global"] = Field(
        default="uniform", description="equally many in each layer, or wherever they are worth most (moekit.load only)"
    )
    least: int | None = Field(default=None, ge=1, description="fewest a layer keeps, with scope global")
    most: int | None = Field(default=None, ge=1, description="most a layer keeps, with scope global")
    top_k: int | None = Field(default=None, ge=1, description="choices a token makes from now on; as before by default")
    groups: Literal["free", "equal"] = Field(
        default="free", description="routing groups: lift the router's limits to them, or keep equally many of each"
    )
    protect: ExpertsRef | None = Field(
        default=None, description="experts that stay: super, layer:expert pairs such as 1:68,2:92, or a JSON file"
    )
    answers: int | None = Field(
        default=None,
        ge=1,
        description="take data as prompts: decide on each with the model's own answer of up to so many tokens behind "
        "it (the whole model runs, not layer by layer)",
    )
    demonstrations: int = Field(default=25, ge=1, description="prompts of each domain that are answered")
    max_tokens: int | None = Field(
        default=65536, ge=1, description="tokens of data, at most, shared by its domains; answered prompts count apart"
    )
    seq_len: int = Field(
        default=512,
        ge=2,
        description="tokens a row, the model's limit if that is less; a prompt and its answer are one",
    )
    batch_size: int = Field(default=8, ge=1, description="rows a pass")
    plan: str | None = Field(default=None, description="also write scores and decision to this file")
    write: Literal["model", "plan"] = Field(default="model", description="write the smaller model, or the plan alone")

    def further_outputs(self) -> tuple[Path, ...]:
        """The plan, where it is written beside a model."""
        return () if self.plan is None else (Path(self.plan),)

    def check(self) -> None:
        """Refuse an unknown method, impossible knobs and budgets, and a run without what it needs."""
        resolve_device(self.device)
        method = catalogue.make("prune", self.method, self.settings)
        budget = budget_of(self.keep, self.scope, self.least, self.most)
        refuse_uneven(budget, self.stock_only)
        if budget.scope == "global" and method.searches:
            raise BadConfig(f"{self.method} needs to know how many experts each layer keeps", hint="--scope uniform")
        if self.data is not None and self.trace is not None:
            raise BadConfig("data and trace are both given", hint="decide on one of them; --heldout is for the proof")
        if self.trace is not None and method.searches:
            raise BadConfig(f"{self.method} runs layers on text, which a trace does not hold", hint="give --data")
        if self.data is None and self.trace is None and (method.searches or method.required):
            what = "runs layers on text" if method.searches else f"decides from {', '.join(method.required)}"
            raise BadConfig(f"{self.method} {what}", hint="give text (--data) or a trace (--trace) of this model")
        if self.answers is not None and self.data is None:
            raise BadConfig("there are no prompts to answer", hint="give prompts (--data), or leave --answers out")
        if self.protect == SUPER and self.data is None and self.trace is None:
            raise BadConfig("super experts are found on text", hint="give text (--data) or a trace that holds them")
        if self._proves and self.data is None and self.heldout is None:
            raise BadConfig(
                "there is no text to prove the result on", hint="give --heldout TEXT, or say --no-proof to go without"
            )

    @property
    def _proves(self) -> bool:
        return self.proof and self.write == "model"

    def _statistics(self, source: Source, method: Any) -> tuple[str, ...]:
        """What is recorded: what the method, the protection and the baselines look at."""
        needed = protection_needs(source) if self.protect == SUPER else ()
        return tuple(dict.fromkeys((*method.required, *needed, "load")))

    def forecast(self, out: Path, sizes: Sizes) -> Forecast:
        """Exact where the model lies here; the bytes of a model that is not here yet are those of its parent."""
        model = model_item(self.model, sizes)
        reads = [model, *(text_item(text, sizes) for text in (self.data, self.heldout) if text)]
        reads += [sizes.item(self.trace)] if self.trace else []
        notes = [] if self.answers is None else ["the whole model is loaded to answer the prompts"]
        notes += ["layers are read from disk one at a time: memory does not grow with their number"]
        if self.scope == "global":
            notes.append("layers may keep different numbers of experts: the result loads through moekit.load only")
        if self.write == "plan":
            return Forecast(tuple(reads), (Item(str(out), 16 << 20),), disk=16 << 20, notes=tuple(notes))
        if not (Path(self.model).expanduser() / "config.json").is_file():
            return Forecast(tuple(reads), (Item(str(out), model.nbytes),), disk=model.nbytes, notes=tuple(notes))
        source = open_source(self.model)
        request = self._request(source, 0)
        outlook = self._foresee(source, request)
        disk = outlook.nbytes + self._between(source, outlook, request)
        memory = 2 * max(_layer_bytes(source).values()) + (1 << 30)
        memory = memory if self.answers is None else max(memory, source.nbytes + (1 << 30))
        return Forecast(tuple(reads), (Item(str(out), outlook.nbytes),), disk=disk, memory=memory, notes=tuple(notes))

    def run(self, work: JobContext) -> dict[str, Any]:
        """Refuse what is impossible, calibrate, decide, prove, write, check."""
        self.check()
        source = open_source(self.model, work.progress)
        request = self._request(source, work.seed)
        tell_uneven(request.budget)
        outlook = self._foresee(source, request)
        if self._proves:
            check_runnable(source)
        if self.write == "model":
            check_disk(work.out, work.scratch, outlook.nbytes, self._between(source, outlook, request))
        rows, heldout = self._texts(source, work)
        decided = self._decide(source, request, rows, work)
        warnings = warn_of(decided.plan)
        if self.plan is not None:
            decided.plan.save(self.plan)
        if self.write == "model":
            return finish(decided, heldout, self, work, warnings)
        _save_plan(decided.plan, work)
        return told_of_plan(decided, warnings, outlook.tensors)

    def _request(self, source: Source, seed: int) -> Request:
        from moekit.compress.engine.planning import Request

        method = catalogue.make("prune", self.method, self.settings)
        budget = budget_of(self.keep, self.scope, self.least, self.most)
        named = self.protect is not None and self.protect != SUPER
        protected = parse_protected(str(self.protect), source) if named else None
        return Request(method, budget, self.top_k, self.groups, seed, protected)

    def _foresee(self, source: Source, request: Request) -> Outlook:
        return foresee(source, request, self.method, stock_only=self.stock_only, mtp=self.mtp)

    def _between(self, source: Source, outlook: Outlook, request: Request) -> int:
        tokens = 0 if self.data is None else self.max_tokens or (1 << 20)
        tokens *= 2 if request.method.searches else 1
        proof = (self.proof_tokens or (1 << 20)) if self._proves else 0
        rewritten = 0
        if request.method.rewrites:
            each = _layer_bytes(source)
            rewritten = sum(each[n] * count // source.geometries[n].experts for n, count in outlook.counts.items())
        return bytes_between(source, tokens, proof, 2 + self.random_seeds, rewritten)

    def _texts(self, source: Source, work: JobContext) -> tuple[TokenBatches | None, HeldOut | None]:
        """Rows to decide on and text to prove on; both are read before any work, as either may turn out empty."""
        split = "train" if self.heldout is None else None
        rows = None
        if self.data is not None:
            documents = read_text(self.data, split=split, seed=work.seed, progress=work.progress)
            rows = self._rows(documents, source, work)
        if not self._proves:
            return rows, None
        if self.heldout is not None:
            return rows, read_heldout(self, self.heldout, None, source, work)
        assert self.data is not None
        return rows, read_heldout(self, self.data, "heldout", source, work)

    def _rows(self, documents: list[Document], source: Source, work: JobContext) -> TokenBatches:
        if self.answers is None:
            length = min(self.seq_len, source.longest)
            return calibration_rows(documents, source.tokenizer(), seq_len=length, max_tokens=self.max_tokens)
        return answered_rows(
            documents,
            source,
            work,
            new_tokens=self.answers,
            each=self.demonstrations,
            load=lambda: load_for_answers(source, self.device, self.dtype),
        )

    def _decide(self, source: Source, request: Request, rows: TokenBatches | None, work: JobContext) -> Decided:
        from moekit.compress.engine.planning import plan_pruning
        from moekit.compress.engine.searching import search_pruning
        from moekit.trace import Trace
        from moekit.trace.streamed import Streamed

        if rows is None:
            trace = None if self.trace is None else Trace.load(self.trace)
            request = self._protected(request, source, trace)
            return self._complete(
                source, request, plan_pruning(source.checkpoint, trace, request, work.progress), trace
            )
        with Streamed(
            source.checkpoint,
            rows.batches(self.batch_size),
            statistics=self._statistics(source, request.method),
            folder=work.scratch / "calibration",
            dtype=self.torch_dtype,
            device=self.device,
        ) as streamed:
            streamed.run(work.progress)
            trace = streamed.trace(tokenizer=source.tokenizer(), source=self._origin(), seed=work.seed)
            request = self._protected(request, source, trace)
            known = _known_plan(work, trace, request)
            if known is not None:
                plan = known
            elif request.method.searches:
                plan = search_pruning(source.checkpoint, trace, streamed, request, work.progress)
            else:
                plan = plan_pruning(source.checkpoint, trace, request, work.progress)
        if known is None:
            plan.save(work.scratch / PLAN_FILE)
        return self._complete(source, request, plan, trace)

    def _origin(self) -> str:
        """How the plan names its text: the part in brackets tells that the rest was kept apart."""
        path = Path(str(self.data)).expanduser()
        name = str(path.resolve()) if path.exists() else str(self.data)
        return name if self.heldout is not None else f"{name}[train]"

    def _protected(self, request: Request, source: Source, trace: Trace | None) -> Request:
        if self.protect != SUPER or trace is None:
            return request
        return dataclasses.replace(request, protected=super_experts(source, trace))

    def _complete(self, source: Source, request: Request, plan: PrunePlan, trace: Trace | None) -> Decided:
        """The plan in its final form, with what baselines decide from."""
        from moekit.compress.engine.plan import PrunePlan
        from moekit.compress.engine.planning import plan_file

        layers = in_groups(source, plan)
        if layers != plan.file.layers:
            plan = PrunePlan(plan_file(source.checkpoint, request, layers, trace), plan.statistics)
        plan = PrunePlan(plan.file.model_copy(update={"text_sha256": text_hash(self.data)}), plan.statistics)
        try:
            counted = {} if trace is None else dict(trace.require(("load",)))
        except MoekitError:
            counted = {}  # a trace of something else: frequency cannot be compared with
        return Decided(source, request, plan, counted)


def _layer_bytes(source: Source) -> dict[int, int]:
    """Bytes of all routed experts of each layer."""
    from moekit.compress.engine.planning import sizes_of

    sizes = sizes_of(source.checkpoint, source.geometries)
    return {layer: each * sizes.experts[layer] for layer, each in sizes.expert_bytes.items()}


def _known_plan(work: JobContext, trace: Trace, request: Request) -> PrunePlan | None:
    """The plan that an interrupted run of the same work had come to."""
    from moekit.compress.engine.plan import PrunePlan

    file = work.scratch / PLAN_FILE
    try:
        plan = PrunePlan.load(file) if file.is_file() else None
    except MoekitError:
        return None
    if plan is None or plan.file.trace != trace.digest or plan.file.protected != (request.protected or {}):
        return None
    return plan


def _save_plan(plan: PrunePlan, work: JobContext) -> None:
    """As a file of that name, or in a folder, whole or not at all."""
    from moekit.checkpoint import atomic_folder

    if work.out.suffix == ".json":
        plan.save(work.out)
        return
    with atomic_folder(work.out, overwrite=work.overwrite) as folder:
        plan.save(folder / PLAN_FILE)
