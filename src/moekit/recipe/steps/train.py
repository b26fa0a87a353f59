"""`use: train`: train or fine-tune a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from moekit._device import DEVICE_HELP
from moekit.errors import BadConfig
from moekit.jobs.context import JobContext
from moekit.jobs.options.base import ModelRef, PlanRef, TextRef
from moekit.jobs.shared.estimates import Forecast, Item, Sizes
from moekit.jobs.shared.inputs import (
    changed_bytes,
    is_first_rank,
    model_item,
    open_model,
    read_text,
    save_changed,
    text_item,
)
from moekit.jobs.shared.ranked import RankedOptions, deal_out, ranks_of
from moekit.recipe.steps.base import Step

if TYPE_CHECKING:
    from moekit.parallel.data_parallel import RankedTraining
    from moekit.parallel.launch.start import StartedRanks
    from moekit.training import TrainConfig

# Weights, gradients and two moments of Adam, four bytes each, for weights that may be stored in two.
_TRAINING_FACTOR = 8


class TrainStep(RankedOptions, Step):
    """Train a model on text, under the routing policy that it carries or is given; a killed run resumes exactly."""

    use: Literal["train"] = "train"
    model: ModelRef = Field(description="model: folder or hub id")
    text: TextRef = Field(description="training text: file, folder, source, mix or hub id")
    plan: PlanRef | None = Field(default=None, description="routing plan to train under; the checkpoint's by default")
    split: Literal["train", "heldout"] | None = Field(default=None, description="part of the text to take")
    heldout: TextRef | None = Field(default=None, description="text whose loss is watched")
    device: str = Field(default="auto", description=DEVICE_HELP)
    data_parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp", description="under --ep: what is no expert lies whole on every rank, or is dealt out (FSDP2)"
    )
    drop_unknown: bool = Field(
        default=False, description="leave out what the source holds beyond the model, such as a vision tower"
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="steps, lr, balance_coef, ...: TrainConfig")

    def check(self) -> None:
        """Refuse impossible settings."""
        self.config(0)
        self.check_ranks()

    def identity(self) -> dict[str, Any]:
        """Where ranks share the model, their number and way are none of it: others may go on with the run."""
        told = self.model_dump(mode="json", exclude={"device"})
        if self.ep == 1:
            return told
        for name in (*RankedOptions.model_fields, "data_parallel"):
            del told[name]
        told["settings"] = {k: v for k, v in told["settings"].items() if k not in ("batch", "accumulation")}
        return told

    def config(self, seed: int) -> TrainConfig:
        """The run's knobs.

        Raises:
            BadConfig: an unknown or impossible one.
        """
        from moekit._validation import faults
        from moekit.training import TrainConfig

        try:
            return TrainConfig(**{"seed": seed, **self.settings})
        except ValidationError as error:
            raise BadConfig(f"training: {faults(error)}", hint="moekit train --help lists every option") from error

    def forecast(self, out: Path, sizes: Sizes) -> Forecast:
        """The trained model, and a checkpoint with optimizer state while it runs."""
        model = model_item(self.model, sizes)
        texts = [text_item(item, sizes) for item in (self.text, self.heldout) if item]
        needed = None if model.nbytes is None else _TRAINING_FACTOR * model.nbytes
        # What was learnt, then the model; two checkpoints with both moments where any are kept.
        copies = 2 if self.config(0).save_every is None else 8
        kept = None if model.nbytes is None else copies * model.nbytes
        return Forecast((model, *texts), (Item(str(out), changed_bytes(self.model, model)),), disk=kept, memory=needed)

    def run(self, work: JobContext) -> dict[str, Any]:
        """Train and save."""
        self.check_ranks()
        with ranks_of(self) as started:
            return self._train(work, started)

    def _train(self, work: JobContext, started: StartedRanks | None) -> dict[str, Any]:
        from moekit.training import train

        config = self.config(work.seed)
        model, tokenizer = self._open(work)
        distribution = None
        if started is not None:
            distribution = self._distribute(model, started, config.model_dump(mode="json"))
        documents = read_text(self.text, split=self.split, seed=work.seed, progress=work.progress)
        heldout = None if self.heldout is None else read_text(self.heldout, seed=work.seed, progress=work.progress)
        result = train(
            model,
            tokenizer,
            documents,
            config,
            output=work.scratch,
            heldout=heldout,
            progress=work.progress,
            distribution=distribution,
        )
        if distribution is not None:
            model = self._whole(model, work)
        scores = result.model_dump(mode="json", exclude={"history"})
        settings = {**config.model_dump(mode="json", exclude_defaults=True), "text": self.text}
        save_changed(
            model,
            tokenizer,
            work,
            parent=self.model,
            config=settings,
            scores=scores,
            drop_unknown=self.drop_unknown,
        )
        return {**scores, "tokens_per_second": result.tokens_per_second, "final_loss": result.losses[-1]}

    def _open(self, work: JobContext, device: str | None = None) -> tuple[Any, Any]:
        return open_model(
            self.model, plan=self.plan, device=device or self.device, dtype="float32", progress=work.progress
        )

    def _distribute(self, model: Any, started: StartedRanks, settings: dict[str, Any]) -> RankedTraining:
        from moekit.checkpoint import fingerprint_model
        from moekit.parallel.data_parallel import RankedTraining

        facts = {"model": fingerprint_model(model)}
        ranks = deal_out(model, self, started, shared_batch=False, facts=settings)
        distribution = RankedTraining(ranks, self.data_parallel, facts)
        distribution.prepare(model)
        return distribution

    def _whole(self, model: Any, work: JobContext) -> Any:
        """A whole model with what the ranks have learnt, on the first; elsewhere the shared one."""
        from moekit.parallel.checkpoints.gathering import gather_state

        state = gather_state(model)
        if not is_first_rank():
            return model
        whole, _ = self._open(work, "cpu")
        whole.load_state_dict(state)
        return whole
