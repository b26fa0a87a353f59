"""`use: convert`: turn a dense model into a MoE."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from moekit import catalogue
from moekit._device import DTYPE_HELP, DtypeName
from moekit.data.encoding import BOS_HELP, Bos
from moekit.jobs.context import JobContext
from moekit.jobs.options.base import ModelRef, TextRef
from moekit.jobs.shared.estimates import Forecast, Item, Sizes
from moekit.jobs.shared.inputs import model_item, open_model, read_text, rows_of, save_changed, text_item
from moekit.recipe.steps.base import Step


class ConvertStep(Step):
    """Make a MoE of a dense model by one of the conversions in the catalogue (`moekit methods convert`)."""

    use: Literal["convert"] = "convert"
    model: ModelRef = Field(description="dense model: folder, hub id or packaged model")
    method: str = Field(description="conversion; see moekit methods convert")
    settings: dict[str, Any] = Field(default_factory=dict, description="the conversion's own options")
    text: TextRef | None = Field(default=None, description="calibration text, for conversions that look at activations")
    split: Literal["train", "heldout"] | None = Field(default="train", description="part of the text to take")
    max_tokens: int = Field(default=8192, ge=1, description="calibration tokens, at most")
    seq_len: int = Field(default=256, ge=2, description="tokens a row")
    bos: Bos = Field(default="auto", description=BOS_HELP)
    dtype: DtypeName = Field(default="auto", description=DTYPE_HELP)

    drop_unknown: bool = Field(
        default=False, description="leave out what the source holds beyond the model, such as a vision tower"
    )

    def check(self) -> None:
        """Refuse an unknown method and impossible options."""
        catalogue.make("convert", self.method, self.settings)

    def forecast(self, out: Path, sizes: Sizes) -> Forecast:
        """The MoE is at least as large as the dense model; how much larger, the conversion's options decide."""
        model = model_item(self.model, sizes)
        reads = (model,) if self.text is None else (model, text_item(self.text, sizes))
        return Forecast(
            reads,
            (Item(str(out), model.nbytes),),
            disk=model.nbytes,
            memory=None if model.nbytes is None else 2 * model.nbytes,
            notes=("sizes are the dense model's: copied experts multiply its feed-forward part",),
        )

    def run(self, work: JobContext) -> dict[str, Any]:
        """Convert and save."""
        from moekit.anatomy import find_moe_layers

        conversion = catalogue.make("convert", self.method, self.settings)
        model, tokenizer = open_model(self.model, device="cpu", dtype=self.dtype, progress=work.progress)
        calibration = None
        if self.text is not None:
            documents = read_text(self.text, split=self.split, seed=work.seed, progress=work.progress)
            rows = rows_of(documents, tokenizer, seq_len=self.seq_len, max_tokens=self.max_tokens, bos=self.bos)
            calibration = rows.calibration
        moe = conversion.convert(model, calibration, work.seed, progress=work.progress, drop_unknown=self.drop_unknown)
        save_changed(moe, tokenizer, work, parent=self.model, config={"method": self.method, **self.settings})
        layers = find_moe_layers(moe)
        return {
            "method": self.method,
            "layers": len(layers),
            "experts": layers[0].geometry.experts,
            "top_k": layers[0].geometry.top_k,
            "width": layers[0].geometry.width,
            "shared_width": layers[0].geometry.shared_width,
            "parameters": sum(p.numel() for p in moe.parameters()),
            "dense_parameters": sum(p.numel() for p in model.parameters()),
        }
