"""Options of the jobs that leave each layer fewer experts: `moekit.jobs.prune`, `moekit.jobs.merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from moekit.jobs.options.base import ExpertsRef, ModelRef, PathText, TextRef, TraceRef
from moekit.jobs.options.writing import WritingOptions


class FewerOptions(WritingOptions):
    """What is to stay of which model, and what is decided on.

    Attributes:
        kind: of the methods.
    """

    kind: ClassVar[str] = ""

    model: ModelRef = Field(description="MoE: folder or hub id")
    method: str = Field(description="what decides; see moekit methods")
    settings: dict[str, Any] = Field(default_factory=dict, description="the method's own knobs")
    keep: int | float | str = Field(
        description="what stays: experts a layer (64), their fraction (0.5, 1/2; 1.0 is all), or bytes of the model "
        "(12GiB)"
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
    repair: Literal["none", "least-squares"] = Field(
        default="none",
        description="refit the down projections of experts that stay to what each layer gave as a whole, on the text",
    )
    ridge: float | None = Field(
        default=None,
        ge=0,
        description="of the repair: pulls refitted weights to what they were, as a share of the mean square of a "
        "neuron; 0.0001 for experts with more than 20 tokens a neuron, else 0.01",
    )
    self_generated: int | None = Field(
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
    plan: PathText | None = Field(default=None, description="also write scores and outcome to this file")
    write: Literal["model", "plan"] = Field(default="model", description="write the smaller model, or the plan alone")

    def further_outputs(self, out: Path) -> tuple[Path, ...]:
        """The plan, where it is written beside a model."""
        return () if self.plan is None else (Path(self.plan),)
