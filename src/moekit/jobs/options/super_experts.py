"""Options of `moekit.jobs.super_experts`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from moekit._device import DEVICE_HELP, DTYPE_HELP, DtypeName
from moekit.data.encoding import BOS_HELP, Bos
from moekit.jobs.options.base import CommandLine, JobOptions, ModelRef, TextRef


class SuperExpertsOptions(JobOptions):
    """Find the few experts that make massive activations, and check on held-out text whether the model breaks without.

    A super expert's largest |output| exceeds both a percentile of all and a share of the largest, in a layer whose
    block makes a massive activation (arXiv:2507.23279). Many models have none.
    """

    job: ClassVar[str] = "moekit.jobs.super_experts"
    needs_out: ClassVar[bool] = False
    command: ClassVar[CommandLine] = CommandLine(
        help="Find the few experts that make massive activations, layer by layer from disk, and check on held-out text "
        "whether the model breaks without them, and without as many others. Many models have none. OUT/"
        "super-experts.json is what moekit prune --protect takes.",
        writes="folder of the report",
        arguments=("model",),
        examples=(
            "moekit super-experts ./moe --data my-domain/ -o ./super",
            "moekit super-experts ./moe --data demo --heldout wikitext --random-seeds 10 -o ./super --json",
        ),
    )

    model: ModelRef = Field(description="MoE: folder or hub id")
    data: TextRef = Field(description="text to find them on: file, folder, source, mix or hub id")
    heldout: TextRef | None = Field(
        default=None, description="text to check on; by default a tenth of data, which is kept apart for it"
    )
    percentile: float = Field(
        default=99.5, ge=0, le=100, description="of all experts' largest |outputs|, which a super expert's exceeds"
    )
    ratio: float = Field(default=0.1, ge=0, le=1, description="share of the largest of them that it exceeds")
    scope: Literal["first-75", "model", "formation"] = Field(
        default="first-75",
        description="layers whose experts compare: the first 75 % and those that form massive activations, all, or "
        "only those that form",
    )
    forming: Literal["gain", "first-75"] = Field(
        default="gain",
        description="layers that form massive activations: those whose block adds one, or the first 75 %",
    )
    max_tokens: int | None = Field(default=65536, ge=1, description="tokens of data, at most, shared by its domains")
    seq_len: int = Field(default=512, ge=2, description="tokens a row; the model's limit if that is less")
    batch_size: int = Field(default=8, ge=1, description="rows a pass")
    proof: bool = Field(
        default=True, description="where any are found, measure the model without them, and without as many others"
    )
    random_seeds: int = Field(default=5, ge=1, le=100, description="draws of as many others")
    proof_tokens: int | None = Field(
        default=32768, ge=2, description="held-out tokens, at most, an equal share of each domain"
    )
    window: int | None = Field(
        default=None, ge=2, description="longest context of the check in tokens (default: the model's, ≤ 1024)"
    )
    bos: Bos = Field(default="auto", description=BOS_HELP)
    device: str = Field(default="auto", description=DEVICE_HELP)
    dtype: DtypeName = Field(default="auto", description=DTYPE_HELP)
