"""`use: apply`: carry a pruning plan out, with its own budget or another one, without a new pass over the text."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from moekit._device import resolve_device
from moekit.errors import BadConfig, MoekitError
from moekit.jobs.context import JobContext
from moekit.jobs.options.base import ModelRef, PlanRef, TextRef
from moekit.jobs.shared.estimates import Forecast, Item, Sizes
from moekit.jobs.shared.inputs import model_item, text_item
from moekit.jobs.shared.opened import Source, check_runnable, open_source
from moekit.jobs.shared.pruned import Decided, finish, in_groups, warn_of
from moekit.jobs.shared.pruning import (
    PLAN_FILE,
    WritingOptions,
    budget_of,
    bytes_between,
    check_disk,
    check_unchanged,
    foresee,
    heldout_of_plan,
    read_heldout,
    refuse_uneven,
    tell_uneven,
)
from moekit.recipe.steps.base import Step

if TYPE_CHECKING:
    from moekit.compress.budget.sizes import Budget
    from moekit.compress.engine.plan import PrunePlan
    from moekit.compress.engine.planning import Request
    from moekit.jobs.shared.proof import HeldOut

logger = logging.getLogger(__name__)


class ApplyStep(WritingOptions, Step):
    """Write the model that a pruning plan describes, or decide anew from the plan's scores with another budget."""

    use: Literal["apply"] = "apply"
    plan: PlanRef = Field(description="plan file, or the folder of a prune step that wrote one")
    model: ModelRef | None = Field(default=None, description="MoE: folder or hub id; the plan's own by default")
    heldout: TextRef | None = Field(
        default=None, description="text to prove the result on; by default what was kept apart when the plan was made"
    )
    keep: int | float | str | None = Field(
        default=None, description="what stays instead: experts a layer, their fraction, or bytes; see moekit prune"
    )
    scope: Literal["uniform", "global"] | None = Field(
        default=None, description="equally many in each layer, or wherever they are worth most; the plan's by default"
    )
    least: int | None = Field(default=None, ge=1, description="fewest a layer keeps, with scope global")
    most: int | None = Field(default=None, ge=1, description="most a layer keeps, with scope global")
    other_weights: bool = Field(
        default=False, description="accept a model of the same shape and other weights, such as a quantized copy"
    )

    def inputs(self) -> list[tuple[str, str]]:
        """The plan's own model, too, where no other is given."""
        found = super().inputs()
        if self.model is None and _plan_path(self.plan).is_file():
            with contextlib.suppress(MoekitError):  # told where the plan is read
                found.append(("model", self._load().file.model))
        return found

    def check(self) -> None:
        """Refuse an impossible budget."""
        resolve_device(self.device)
        if self.keep is None and (self.scope or self.least or self.most):
            raise BadConfig("scope, least and most are about another budget", hint="give --keep as well")
        if self.keep is not None:
            budget_of(self.keep, self.scope or "global", self.least, self.most)

    def forecast(self, out: Path, sizes: Sizes) -> Forecast:
        """Exact where plan and model lie here."""
        reads = [sizes.item(self.plan), *(text_item(text, sizes) for text in (self.heldout,) if text)]
        if not _plan_path(self.plan).is_file():
            return Forecast(tuple(reads), (Item(str(out), None),))
        plan = self._load()
        reference = self.model or plan.file.model
        model = model_item(reference, sizes)
        if model.nbytes is None or not (Path(reference).expanduser() / "config.json").is_file():
            return Forecast((*reads, model), (Item(str(out), model.nbytes),), disk=model.nbytes)
        source = open_source(reference)
        plan = self._fitting(plan, source)
        request = self._request(plan)
        refuse_uneven(request.budget, self.stock_only)
        nbytes = foresee(source, request, plan.file.method, stock_only=self.stock_only, mtp=self.mtp).nbytes
        disk = nbytes + self._between(source, plan)
        return Forecast((*reads, model), (Item(str(out), nbytes),), disk=disk, memory=1 << 30)

    def run(self, work: JobContext) -> dict[str, Any]:
        """Refuse what is impossible, decide anew if asked, prove, write, check."""
        self.check()
        plan = self._load()
        source = open_source(self.model or plan.file.model, work.progress)
        plan = self._fitting(plan, source)
        request = self._request(plan)
        refuse_uneven(request.budget, self.stock_only)
        tell_uneven(request.budget)
        outlook = foresee(source, request, plan.file.method, stock_only=self.stock_only, mtp=self.mtp)
        if self.proof:
            check_runnable(source)
        check_disk(work.out, work.scratch, outlook.nbytes, self._between(source, plan))
        heldout = self._heldout(plan, source, work)
        decided = Decided(source, request, self._decided(plan, source, request), plan.statistics)
        return finish(decided, heldout, self, work, warn_of(decided.plan))

    def _load(self) -> PrunePlan:
        from moekit.compress.engine.plan import PrunePlan

        return PrunePlan.load(_plan_path(self.plan))

    def _fitting(self, plan: PrunePlan, source: Source) -> PrunePlan:
        """The plan as one of this model.

        Raises:
            BadConfig: it was made for another one.
        """
        from moekit.compress.engine.plan import PrunePlan

        if not self.other_weights:
            plan.check_model(source.checkpoint.fingerprint, source.checkpoint.path)
            return plan
        told = {layer: (p.experts, p.hidden, p.width) for layer, p in plan.file.layers.items()}
        here = {layer: (g.experts, g.hidden, g.width) for layer, g in source.geometries.items()}
        if told != here:
            raise BadConfig(
                f"this plan was made for {plan.file.model}, a model of another shape",
                file=source.checkpoint.path,
                hint="make a plan for this model: scores of one say nothing of another",
            )
        update = {"fingerprint": source.checkpoint.fingerprint}
        return PrunePlan(plan.file.model_copy(update=update), plan.statistics)

    def _budget(self, plan: PrunePlan) -> Budget:
        if self.keep is None:
            return plan.file.budget
        before = plan.file.budget
        scope = self.scope or before.scope
        if scope == "uniform":
            return budget_of(self.keep, scope, self.least, self.most)
        return budget_of(self.keep, scope, self.least or before.least, self.most or before.most)

    def _request(self, plan: PrunePlan) -> Request:
        from moekit.compress.engine.planning import Request

        file = plan.file
        return Request(plan.method, self._budget(plan), file.top_k, file.groups, file.seed, file.protected)

    def _decided(self, plan: PrunePlan, source: Source, request: Request) -> PrunePlan:
        from moekit.compress.engine.plan import PrunePlan
        from moekit.compress.engine.planning import redecide

        if self.keep is None:
            return plan
        made = redecide(plan, source.checkpoint, request.budget)
        return PrunePlan(made.file.model_copy(update={"layers": in_groups(source, made)}), made.statistics)

    def _between(self, source: Source, plan: PrunePlan) -> int:
        proof = (self.proof_tokens or (1 << 20)) if self.proof else 0
        rewritten = source.nbytes if plan.method.rewrites else 0
        return bytes_between(source, 0, proof, 2 + self.random_seeds, rewritten)

    def _heldout(self, plan: PrunePlan, source: Source, work: JobContext) -> HeldOut | None:
        """Text to prove on: the one given, else what was kept apart when the plan was made."""
        if not self.proof:
            return None
        if self.heldout is not None:
            return read_heldout(self, self.heldout, None, source, work)
        known = heldout_of_plan(plan)
        if known is not None:
            check_unchanged(known, plan.file.text_sha256)
        try:
            if known is not None:
                return read_heldout(self, known, "heldout", source, work)
        except MoekitError as error:
            logger.warning("the text of the plan cannot be read again: %s", error.message)
        logger.warning("there is no text to prove the result on, so nothing says what it costs: give --heldout TEXT")
        return None


def _plan_path(reference: str) -> Path:
    path = Path(reference).expanduser()
    return path / PLAN_FILE if path.is_dir() else path
