"""The formats that are read, one row each: what a config calls them, and the class that reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moekit.checkpoint.quantized.awq import Awq
from moekit.checkpoint.quantized.base import Format
from moekit.checkpoint.quantized.float_quantized import FloatQuantized
from moekit.checkpoint.quantized.fp8 import Fp8
from moekit.checkpoint.quantized.gptq import Gptq
from moekit.checkpoint.quantized.mxfp4 import Mxfp4
from moekit.checkpoint.quantized.packed_experts import LAYOUT, PackedExperts
from moekit.checkpoint.quantized.packed_ints import PackedInts


@dataclass(frozen=True)
class Row:
    """A format.

    Attributes:
        method: `quant_method` in the config.
        format: `format` in the config, of methods that have several; "" for all.
        make: the class that reads it.
    """

    method: str
    format: str
    make: Callable[[Mapping[str, Any]], Format]


ROWS: tuple[Row, ...] = (
    Row("fp8", "", Fp8),
    Row("mxfp4", "", Mxfp4),
    Row("compressed-tensors", "pack-quantized", PackedInts),
    Row("compressed-tensors", "float-quantized", FloatQuantized),
    Row("compressed-tensors", "int-quantized", FloatQuantized),
    Row("compressed-tensors", "naive-quantized", FloatQuantized),
    Row("", LAYOUT, PackedExperts),
    Row("gptq", "", Gptq),
    Row("awq", "", Awq),
)


def quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How a config says that weights are quantized; None where they are not."""
    if "quantization_config" not in config:
        return None
    told = config["quantization_config"]
    return told if isinstance(told, Mapping) else {}


def kind(settings: Mapping[str, Any]) -> str:
    """What messages call a way to quantize."""
    method, layout = settings.get("quant_method", "?"), settings.get("format")
    if layout == LAYOUT:
        return f"moekit, {layout}"
    return f"{method}, {layout}" if method == "compressed-tensors" and layout else str(method)


def formats_of(settings: Mapping[str, Any]) -> tuple[Format, ...]:
    """The formats that weights of a checkpoint may be in; empty where none is known.

    Args:
        settings: the config's `quantization_config`.

    Raises:
        UnsupportedModel: a variant of a known format that nothing here reads.
    """
    method = str(settings.get("quant_method", ""))
    layouts = {str(settings.get("format") or "")}
    if layouts & {"mixed-precision", ""}:
        groups = dict(settings.get("config_groups") or {}).values()
        layouts |= {str(group.get("format") or "") for group in groups if isinstance(group, Mapping)}
    makers = dict.fromkeys(row.make for row in ROWS if row.method == method and row.format in ("", *layouts))
    return tuple(make(settings) for make in makers)


def known() -> str:
    """The formats that are read, for a message."""
    return ", ".join(dict.fromkeys(f"{row.method} {row.format}".strip() for row in ROWS))
