"""`use: profile`: record what the routers choose on a text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from moekit._device import DEVICE_HELP, DTYPE_HELP, DtypeName
from moekit.jobs.context import JobContext
from moekit.jobs.options.base import ModelRef, PlanRef, TextRef
from moekit.jobs.shared.estimates import Forecast, Item, Sizes
from moekit.jobs.shared.inputs import model_item, open_model, read_text, rows_of, text_item
from moekit.recipe.steps.base import Step

if TYPE_CHECKING:
    from moekit.trace.recording import Recording


class ProfileStep(Step):
    """Run a model over text and keep which experts each token chose, and statistics of it."""

    use: Literal["profile"] = "profile"
    model: ModelRef = Field(description="MoE: folder or hub id")
    text: TextRef = Field(description="file, folder, source, mix or hub id")
    plan: PlanRef | None = Field(default=None, description="routing plan to route by; the checkpoint's own by default")
    split: Literal["train", "heldout"] | None = Field(default=None, description="part of the text to take")
    max_tokens: int | None = Field(default=65536, ge=1, description="tokens, at most, shared among the documents")
    seq_len: int = Field(default=512, ge=2, description="tokens a row")
    batch_size: int = Field(default=4, ge=1, description="rows a forward pass")
    statistics: tuple[str, ...] = Field(
        default=("basic",),
        description="what to sum up: names or groups, such as basic, gates, outputs (moekit methods statistics)",
    )
    choices: bool = Field(default=True, description="keep every token's choice, for replay and placement")
    weights: bool = Field(default=False, description="keep the gate weights too, 16 bits each")
    device: str = Field(default="auto", description=DEVICE_HELP)
    dtype: DtypeName = Field(default="auto", description=DTYPE_HELP)

    def check(self) -> None:
        """Refuse an unknown statistic, and what could not be summarised in the end."""
        from moekit.trace import check_summary

        check_summary(self._recording())

    def _recording(self) -> Recording:
        from moekit.trace.recording import Recording

        return Recording(statistics=self.statistics, keep_choices=self.choices, weights=self.weights)

    def forecast(self, out: Path, sizes: Sizes) -> Forecast:
        """A choice takes one byte; the geometry is read from the config where it is there."""
        model, text = model_item(self.model, sizes), text_item(self.text, sizes)
        per_token = _bytes_per_token(self.model, self.weights) if self.choices else 0
        trace = None if self.max_tokens is None or per_token is None else self.max_tokens * (per_token + 11)
        return Forecast((model, text), (Item(str(out), trace),), disk=trace, memory=model.nbytes, notes=self._notes())

    def _notes(self) -> tuple[str, ...]:
        """What looking at the statistics costs, where the config is there to tell."""
        from moekit.checkpoint.strictjson import read_json
        from moekit.trace.cost import notes_on, sizes_of

        file = Path(self.model).expanduser() / "config.json"
        if not file.is_file():
            return ()
        sizes = sizes_of(read_json(file), rows=self.batch_size, positions=self.seq_len)
        return () if sizes is None else notes_on(self._recording(), sizes)

    def run(self, work: JobContext) -> dict[str, Any]:
        """Record and save."""
        from moekit.trace import record, summarise

        model, tokenizer = open_model(
            self.model, plan=self.plan, device=self.device, dtype=self.dtype, progress=work.progress
        )
        documents = read_text(self.text, split=self.split, seed=work.seed, progress=work.progress)
        rows = rows_of(documents, tokenizer, seq_len=self.seq_len, max_tokens=self.max_tokens)
        trace = record(
            model,
            rows.batches(self.batch_size),
            self._recording().model_copy(update={"tokenizer": tokenizer, "source": self.text, "seed": work.seed}),
            progress=work.progress,
        )
        trace.save(work.out, overwrite=work.overwrite)
        told = {"tokens": trace.meta.tokens, "domains": list(trace.meta.domains), "warnings": trace.warnings}
        return {**told, "summary": summarise(trace).model_dump(mode="json")}


def _bytes_per_token(model: str, weights: bool) -> int | None:
    """Bytes that one token's choices take, from the model's config; None if it is not there yet."""
    file = Path(model).expanduser() / "config.json"
    if not file.is_file():
        return None
    from moekit.checkpoint.names import text_config
    from moekit.checkpoint.strictjson import read_json

    config = text_config(read_json(file))
    layers = _first(config, "num_hidden_layers")
    top_k = _first(config, "num_experts_per_tok", "moe_k", "num_experts_per_token")
    experts = _first(config, "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    if layers is None or top_k is None or experts is None:
        return None
    return layers * top_k * ((1 if experts <= 255 else 2) + (2 if weights else 0))


def _first(config: Mapping[str, Any], *names: str) -> int | None:
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)
