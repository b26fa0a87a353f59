"""Options of `moekit.jobs.export`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from moekit.exporting.gguf_kquants import TensorType
from moekit.jobs.options.base import CommandLine, JobOptions, ModelRef


class ExportOptions(JobOptions):
    """Write a model in a packed form that engines read, bit for bit what the rounded folder computes."""

    job: ClassVar[str] = "moekit.jobs.export"
    command: ClassVar[CommandLine] = CommandLine(
        help="Write a model in a packed form that engines read. Experts that `moekit quantize --set symmetric=true` "
        "rounded become whole numbers and scales that give back the folder's weights bit for bit; whatever does not is "
        "refused by layer and expert. All other tensors stay as they are.",
        writes="folder of the packed model",
        arguments=("model",),
        examples=(
            "moekit export ./four-bits --to compressed-tensors -o ./for-vllm",
            "moekit export ./mixed --to auto-round -o ./packed",
            "moekit export ./mixed --to packed -o ./packed",
            "moekit export ./four-bits --to gguf --type q8_0 -o ./for-llama-cpp",
            "moekit export ./moe --to gguf --type q4_k_m -o ./for-llama-cpp",
        ),
        flags={"tensor_type": "--type"},
    )

    model: ModelRef = Field(description="rounded model: folder (any model for gguf)")
    to: Literal["gguf", "compressed-tensors", "auto-round", "packed"] = Field(
        description="form: gguf (llama.cpp; rounded or not), compressed-tensors (vLLM; one width for all experts of a "
        "layer), auto-round (transformers with auto-round; a width for each expert), packed (moekit.load, which "
        "computes with the integers; a width for each expert)"
    )
    tensor_type: TensorType = Field(
        default="auto",
        description="gguf: of matrices that are not rounded; auto: as they are stored; q2_k to q6_k: by llama.cpp "
        "(extra: engines)",
    )
    round_again: bool = Field(
        default=False,
        description="gguf with q2_k to q6_k: experts that were rounded become k-quants of their bits, too, instead of "
        "blocks that hold them exactly",
    )
    layers_may_differ: bool = Field(
        default=False,
        description="compressed-tensors: write layers of different widths, or some that were not rounded, which vLLM "
        "reads and transformers does not",
    )
