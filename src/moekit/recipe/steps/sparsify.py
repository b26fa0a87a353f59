"""`use: sparsify`: zero single weights of the experts, prove what that costs, and write the sparse model."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from moekit import catalogue
from moekit._device import DEVICE_HELP, DTYPE_HELP, DtypeName, resolve_device
from moekit.errors import BadConfig, MoekitError, UnsupportedModel
from moekit.jobs.context import JobContext
from moekit.jobs.options.base import ModelRef, PlanRef, TextRef
from moekit.jobs.shared.estimates import Forecast, Item, Sizes
from moekit.jobs.shared.hashes import text_hash
from moekit.jobs.shared.inputs import calibration_rows, model_item, read_text, text_item
from moekit.jobs.shared.opened import Source, open_source
from moekit.jobs.shared.pruning import (
    PLAN_FILE,
    WritingOptions,
    bytes_between,
    check_disk,
    check_unchanged,
    read_heldout,
)
from moekit.jobs.shared.sparse import Machine, finish, told_of, warn_of
from moekit.recipe.steps.base import Step

if TYPE_CHECKING:
    from moekit.compress.budget.parents import Original
    from moekit.compress.engine.sequential import Request
    from moekit.compress.engine.sparsity_plan import SparsityPlan
    from moekit.compress.engine.zeroing import SparsifyMethod
    from moekit.data import TokenBatches
    from moekit.jobs.shared.proof import HeldOut

logger = logging.getLogger(__name__)

# What a stored plan has decided already.
_DECIDED = ("model", "method", "settings", "sparsity", "total", "original", "data", "plan")


class SparsifyStep(Step):
    """Zero the weights of the experts that matter least (`moekit methods sparsify`); routers and biases stay."""

    use: Literal["sparsify"] = "sparsify"
    model: ModelRef | None = Field(default=None, description="MoE: folder or hub id; a stored plan names its own")
    method: str | None = Field(default=None, description="which weights go; see moekit methods sparsify")
    settings: dict[str, Any] = Field(default_factory=dict, description="the method's own knobs")
    sparsity: float | None = Field(
        default=None, ge=0, lt=1, description="share of zeros among the routed experts' weights of this model"
    )
    total: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="share that is to be gone, with whole experts or as zeros, of the routed experts' weights of the "
        "checkpoint that this model was pruned from",
    )
    original: ModelRef | None = Field(
        default=None, description="that checkpoint; found through the parents that records name by default"
    )
    data: TextRef | None = Field(default=None, description="text to decide on: file, folder, source, mix or hub id")
    heldout: TextRef | None = Field(
        default=None, description="text to prove the result on; by default a tenth of data, which is kept apart for it"
    )
    max_tokens: int | None = Field(default=65536, ge=1, description="tokens of data, at most, shared by its domains")
    seq_len: int = Field(default=512, ge=2, description="tokens a row; the model's limit if that is less")
    batch_size: int = Field(default=8, ge=1, description="rows a pass")
    plan: str | None = Field(default=None, description="also write what was decided to this file")
    from_plan: PlanRef | None = Field(
        default=None, description="carry this plan out again instead: the same zeros without a text"
    )
    write: Literal["model", "plan"] = Field(default="model", description="write the sparse model, or the plan alone")
    proof: bool = Field(default=True, description="measure what it costs, against magnitudes at the same sparsity")
    proof_tokens: int | None = Field(
        default=32768, ge=2, description="held-out tokens, at most, an equal share of each domain"
    )
    window: int | None = Field(
        default=None, ge=2, description="longest context of the proof in tokens (default: the model's, ≤ 1024)"
    )
    device: str = Field(default="auto", description=DEVICE_HELP)
    dtype: DtypeName = Field(default="auto", description=DTYPE_HELP)

    @field_validator("settings")
    @classmethod
    def _pattern(cls, settings: dict[str, Any]) -> dict[str, Any]:
        # YAML reads 2:4 as a number to the base of 60, and m is below 60 wherever it does.
        found = settings.get("pattern")
        return settings | {"pattern": f"{found // 60}:{found % 60}"} if type(found) is int else settings

    def further_outputs(self) -> tuple[Path, ...]:
        """The plan, where it is written beside a model."""
        return () if self.plan is None else (Path(self.plan),)

    def check(self) -> None:
        """Refuse an unknown method, impossible knobs and shares, and a run without what it needs."""
        resolve_device(self.device)
        if self.from_plan is not None:
            given = [name for name in _DECIDED if getattr(self, name)]
            if given or self.write == "plan":
                what = f"{', '.join(given)} given as well" if given else "only a plan is to be written"
                raise BadConfig(f"a stored plan is to be carried out, but {what}", hint="leave that out")
            return
        if self.model is None or self.method is None:
            raise BadConfig(
                "model and method are missing", hint="moekit sparsify MODEL --method METHOD, or --from PLAN"
            )
        method = self._method()
        if self.sparsity is not None and self.total is not None:
            raise BadConfig("sparsity and total are both given", hint="one follows from the other: leave one out")
        if self.sparsity is None and self.total is None and method.fixed_sparsity is None:
            raise BadConfig("nothing says how many weights go", hint="--sparsity 0.5, or --total 0.65")
        if self.sparsity is not None:
            from moekit.compress.engine.zeroing import check_sparsity

            check_sparsity(self.sparsity, method.fixed_sparsity)
        if self.data is None and (method.required or method.sequential):
            needs = ", ".join(method.required) or "activations"
            raise BadConfig(f"{self.method} decides from {needs}", hint="give text (--data)")
        if self._proves and self.data is None and self.heldout is None:
            raise BadConfig(
                "there is no text to prove the result on", hint="give --heldout TEXT, or say --no-proof to go without"
            )

    def forecast(self, out: Path, sizes: Sizes) -> Forecast:
        """As large as the model: zeros are stored."""
        reference = self.model
        reads = [text_item(text, sizes) for text in (self.data, self.heldout) if text]
        if self.from_plan is not None:
            reads.append(sizes.item(self.from_plan))
            reference = self._stored().file.model if _plan_path(self.from_plan).is_file() else None
        if reference is None:
            return Forecast(tuple(reads), (Item(str(out), None),))
        model = model_item(reference, sizes)
        notes = ("layers are read from disk one at a time: memory does not grow with their number",)
        if self.write == "plan":
            return Forecast((model, *reads), (Item(str(out), 16 << 20),), disk=16 << 20, notes=notes)
        if model.nbytes is None or not (Path(reference).expanduser() / "config.json").is_file():
            return Forecast((model, *reads), (Item(str(out), model.nbytes),), disk=model.nbytes, notes=notes)
        source = open_source(reference)
        if self.from_plan is None:
            self._request(source, 0)
        nbytes = _foresee(source)
        disk = nbytes + self._between(source)
        return Forecast((model, *reads), (Item(str(out), nbytes),), disk=disk, memory=1 << 30, notes=notes)

    def run(self, work: JobContext) -> dict[str, Any]:
        """Refuse what is impossible, calibrate, decide, prove, write, check."""
        self.check()
        plan = None if self.from_plan is None else self._stored()
        source = open_source(str(self.model) if plan is None else plan.file.model, work.progress)
        if plan is not None:
            plan.check_model(source.checkpoint.fingerprint, source.checkpoint.path)
        request = None if plan is not None else self._request(source, work.seed)
        nbytes = _foresee(source)
        if self.write == "model":
            check_disk(work.out, work.scratch, nbytes, self._between(source))
        heldout = self._heldout(source, plan, work)
        if request is not None:
            plan = self._plan(source, request, work)
        assert plan is not None
        warn_of(plan.file.warnings)
        if self.plan is not None:
            plan.save(self.plan)
        if self.write == "model":
            return finish(plan, source, heldout, Machine(self.device, self._torch_dtype), work)
        _save_plan(plan, work)
        return told_of(plan, None)

    @property
    def _proves(self) -> bool:
        return self.proof and self.write == "model"

    @property
    def _torch_dtype(self) -> Any:
        return WritingOptions(dtype=self.dtype).torch_dtype

    def _method(self) -> SparsifyMethod:
        method: SparsifyMethod = catalogue.make("sparsify", str(self.method), self.settings)
        return method

    def _stored(self) -> SparsityPlan:
        from moekit.compress.engine.sparsity_plan import SparsityPlan

        return SparsityPlan.load(_plan_path(str(self.from_plan)))

    def _request(self, source: Source, seed: int) -> Request:
        """What is asked for, in shares of the weights that are there.

        Raises:
            BadConfig: a total that cannot be met, or a parent that says how many weights there were is gone.
        """
        from moekit.compress.budget.parents import expert_weights
        from moekit.compress.budget.sparsity import remaining_sparsity
        from moekit.compress.engine.sequential import Request

        method, original = self._method(), self._original(source)
        weights = None if original is None else original.weights
        if self.total is None:
            share = method.fixed_sparsity if self.sparsity is None else self.sparsity
            assert share is not None
            return Request(method, share, None, weights, seed)
        assert weights is not None
        removed = 1 - expert_weights(source.geometries) / weights
        share = remaining_sparsity(self.total, removed)
        if method.fixed_sparsity is not None:
            share = _fixed(method.fixed_sparsity, self.total, removed, source)
        return Request(method, share, self.total, weights, seed)

    def _original(self, source: Source) -> Original | None:
        from moekit.compress.budget.parents import find_original

        try:
            return find_original(source.checkpoint, self.original)
        except MoekitError:
            if self.total is not None or self.original is not None:
                raise
            return None  # only a figure less to print

    def _between(self, source: Source) -> int:
        passes = 0
        if self.from_plan is None and self.data is not None:
            passes = 2 if self._method().reads_weights else 1
        tokens = passes * (self.max_tokens or (1 << 20))
        proof = (self.proof_tokens or (1 << 20)) if self._proves else 0
        return bytes_between(source, tokens, proof, 2, 0)

    def _plan(self, source: Source, request: Request, work: JobContext) -> SparsityPlan:
        from moekit.compress.engine.sequential import Calibration, plan_sparsity
        from moekit.compress.engine.sparsity_plan import SparsityPlan

        text = None
        if self.data is not None:
            tokenizer = source.tokenizer()
            text = Calibration(
                list(self._rows(source, tokenizer, work).batches(self.batch_size)),
                work.scratch / "calibration",
                self._torch_dtype,
                self.device,
                tokenizer,
                self._origin(),
            )
        plan = plan_sparsity(source.checkpoint, text, request, work.progress)
        kept = _named(self.data) if self.data is not None and self.heldout is None else ""
        return SparsityPlan(
            plan.file.model_copy(update={"kept_apart": kept, "text_sha256": text_hash(self.data)}), plan.statistics
        )

    def _rows(self, source: Source, tokenizer: Any, work: JobContext) -> TokenBatches:
        split = "train" if self.heldout is None else None
        documents = read_text(str(self.data), split=split, seed=work.seed, progress=work.progress)
        length = min(self.seq_len, source.longest)
        return calibration_rows(documents, tokenizer, seq_len=length, max_tokens=self.max_tokens)

    def _origin(self) -> str:
        """How the plan names its text: the part in brackets tells that the rest was kept apart."""
        name = _named(str(self.data))
        return name if self.heldout is not None else f"{name}[train]"

    def _heldout(self, source: Source, plan: SparsityPlan | None, work: JobContext) -> HeldOut | None:
        """Text to prove on: the one given, else what is kept apart, now or when the plan was made."""
        if not self._proves:
            return None
        options = WritingOptions(proof_tokens=self.proof_tokens, window=self.window)
        if self.heldout is not None:
            return read_heldout(options, self.heldout, None, source, work)
        if plan is None:
            return read_heldout(options, str(self.data), "heldout", source, work)
        check_unchanged(plan.file.kept_apart, plan.file.text_sha256)
        try:
            if plan.file.kept_apart:
                return read_heldout(options, plan.file.kept_apart, "heldout", source, work)
        except MoekitError as error:
            logger.warning("the text of the plan cannot be read again: %s", error.message)
        logger.warning("there is no text to prove the result on, so nothing says what it costs: give --heldout TEXT")
        return None


def _foresee(source: Source) -> int:
    """Bytes of the result's files; refuses what cannot be written, before any work.

    Raises:
        UnsupportedModel: the weights are quantized, or experts cannot be told apart on disk.
        BadConfig: the checkpoint carries a routing policy.
    """
    from moekit.compress.engine.layout import prepare
    from moekit.compress.engine.outcome import LayerDecision

    quantized = source.checkpoint.config.get("quantization_config")
    if quantized is not None:
        raise UnsupportedModel(
            f"the weights are quantized ({quantized.get('quant_method', '?')}): zeros cannot be put into them",
            file=source.checkpoint.path,
            hint="give the unquantized checkpoint, and quantize what comes out",
        )
    decisions = {layer: LayerDecision(keep=tuple(range(g.experts))) for layer, g in source.geometries.items()}
    return prepare(source.checkpoint, decisions, mtp="keep").nbytes


def _fixed(share: float, total: float, removed: float, source: Source) -> float:
    """The share that a pattern fixes, where it meets the total.

    Raises:
        BadConfig: it does not; names the total that it gives.
    """
    from moekit.compress.budget.sparsity import total_sparsity

    whole = total_sparsity(removed, share)
    inputs = max(max(g.hidden, g.width) for g in source.geometries.values())
    if abs(whole - total) > 1 / inputs:
        raise BadConfig(
            f"the total is to be {total:g}, but {removed:g} is removed and the pattern zeroes exactly {share:g} of the "
            f"rest, {whole:g} in all",
            hint=f"ask for a total of {whole:.6g}, for pattern=unstructured, or remove other experts",
        )
    return share


def _named(reference: str) -> str:
    """A text as a reader in another working folder finds it."""
    path = Path(reference).expanduser()
    return str(path.resolve()) if path.exists() else reference


def _plan_path(reference: str) -> Path:
    path = Path(reference).expanduser()
    return path / PLAN_FILE if path.is_dir() else path


def _save_plan(plan: SparsityPlan, work: JobContext) -> None:
    """As a file of that name, or in a folder, whole or not at all."""
    from moekit.checkpoint import atomic_folder

    if work.out.suffix == ".json":
        plan.save(work.out)
        return
    with atomic_folder(work.out, overwrite=work.overwrite) as folder:
        plan.save(folder / PLAN_FILE)
