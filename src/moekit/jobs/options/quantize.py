"""Options of `moekit.jobs.quantize`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from moekit.jobs.options.base import CommandLine, PlanRef
from moekit.jobs.options.inplace import InPlaceOptions


class QuantizeOptions(InPlaceOptions):
    """Round the weights of the routed experts to few bits (`moekit methods quantize`), kept in the source's dtype."""

    job: ClassVar[str] = "moekit.jobs.quantize"
    kind: ClassVar[str] = "quantize"
    budget: ClassVar[tuple[str, ...]] = ("bits", "mean_bits", "choices", "share", "unit")
    command: ClassVar[CommandLine] = CommandLine(
        help="Round the weights of the routed experts to few bits: decide on text, prove what it costs on held-out "
        "text, against plain rounding to the same bits, write, and check what was written. Weights stay in the "
        "source's dtype: the folder loads anywhere and is as large as before; the bytes of a packed form are told. "
        "Methods: moekit methods quantize.",
        writes="folder of the rounded model",
        arguments=("model",),
        instead="--plan",
        hidden=("write",),
        flags={"from_plan": "--from"},
        examples=(
            "moekit quantize ./moe --method gptq --bits 3 --data my-domain/ -o ./three-bits",
            "moekit quantize ./moe --method rtn --bits 4 --set group=64 --heldout demo -o ./four-bits",
            "moekit quantize ./moe --method gptq --bits gate=2,up=2,down=3 --data demo --plan ./p.json -o ./mixed",
            "moekit quantize ./moe --method gptq --mean-bits 2.5 --share pmq --data my-domain/ -o ./mixed",
            "moekit quantize ./moe --method rtn --mean-bits 3.5 --choices 3,4 --share layers --heldout demo -o ./mixed",
            "moekit quantize --from ./p.json -o ./again",
        ),
    )

    method: str | None = Field(default=None, description="how weights are rounded; see moekit methods quantize")
    bits: int | str | None = Field(
        default=None, description="bits a weight, 1 to 8: one number, or by part (gate=2,up=2,down=3)"
    )
    mean_bits: float | None = Field(
        default=None, ge=1, le=8, description="instead: bits a weight in the mean, at most, shared among the experts"
    )
    choices: int | str | list[int] | None = Field(
        default=None, description="widths that an expert may get of a mean: 2,3,4 by default"
    )
    share: str | dict[str, Any] | None = Field(
        default=None,
        description="how a mean is shared: NAME, or settings with `use: NAME` (moekit methods sharer); pmq by default",
    )
    unit: Literal["expert", "layer"] = Field(
        default="expert", description="what gets one width of a mean: each expert, or each layer, as engines can hold"
    )
    from_plan: PlanRef | None = Field(default=None, description="carry this plan out again instead: the same rounding")
    write: Literal["model", "plan"] = Field(default="model", description="write the rounded model, or the plan alone")
    proof: bool = Field(
        default=True,
        description="measure what it costs, against plain rounding and other shares of the bits",
    )
