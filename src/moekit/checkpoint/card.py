"""The model card: base model, licence, how it was made, what loads it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moekit._files import open_regular
from moekit.checkpoint.hub import looks_like_hub_id
from moekit.checkpoint.names import text_path
from moekit.checkpoint.record import RECORD_FILE, TENSORS_FILE, Record, TensorExpectation
from moekit.checkpoint.safety import DTYPE_BITS
from moekit.errors import printable

CARD_FILE = "README.md"
# Packed forms whose readers are packages of their own, of the same name.
_READERS = ("compressed-tensors", "auto-round")
_LICENCE = re.compile(r"^license:\s*(.+)$", re.MULTILINE)


def licence_of(parent: str | None) -> str | None:
    """The licence that a local parent's card states in its front matter."""
    if not parent or not (Path(parent) / CARD_FILE).is_file():
        return None
    with open_regular(Path(parent) / CARD_FILE) as file:
        head = file.read(64_000).decode("utf-8", errors="replace")
    front = head.split("---")[1] if head.startswith("---") and head.count("---") >= 2 else ""
    match = _LICENCE.search(front)
    return match.group(1).strip() if match else None


def _front_matter(record: Record, licence: str | None) -> str:
    lines = ["library_name: transformers", "tags:", "- moekit", "- mixture-of-experts"]
    if record.parent and looks_like_hub_id(record.parent) and "/" in record.parent:
        lines.append(f"base_model: {record.parent}")
    if licence:
        lines.append(f"license: {licence}")
    return "\n".join(["---", *lines, "---"])


def _settings(values: dict[str, Any]) -> list[str]:
    rows = [f"| {key} | `{json.dumps(value, default=str)}` |" for key, value in values.items()]
    return ["", "| setting | value |", "|---|---|", *rows] if rows else []


def _sizes(record: Record, config: dict[str, Any]) -> str:
    counts = record.expectations.experts
    kinds = sorted(set(counts.values()))
    experts = f"{kinds[0]}" if len(kinds) == 1 else f"{kinds[0]} to {kinds[-1]}" if kinds else "?"
    return f"`{config.get('model_type', '?')}`, {len(counts)} MoE layers of {experts} routed experts."


def _loading(record: Record, config: Mapping[str, Any]) -> list[str]:
    named = config.get("architectures") or []
    kind = named[0] if text_path(config) and named and isinstance(named[0], str) else "AutoModelForCausalLM"
    lines = [
        "",
        "## Loading",
        "",
        f"A stock Hugging Face folder: `{kind}.from_pretrained` opens it without moekit and without remote code.",
    ]
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method in _READERS:
        lines[-1] += f" The package `{method}` must be installed: it reads the packed experts."
    if len(set(record.expectations.experts.values())) > 1:
        lines[-1] = (
            f"Layers hold different numbers of experts, as `{RECORD_FILE}` says: `moekit.load` opens the folder; "
            f"`{kind}.from_pretrained`, which knows one number for all layers, does not."
        )
    if record.parts:
        names = ", ".join(f"**{part.name}** ({part.kind})" for part in record.parts)
        lines += [
            "",
            f"It was made to run with {names}, kept in `{RECORD_FILE}` and `{TENSORS_FILE}`. Only `moekit.load` "
            "restores that; stock transformers and vLLM run the plain model, so their outputs differ.",
        ]
    return lines


def _pruned(record: Record) -> list[str]:
    """What a model with fewer experts has lost, and what that was measured to cost."""
    before = record.scores.get("before")
    if not isinstance(before, dict):
        return []
    counts = record.expectations.experts
    old = {int(layer): count for layer, count in before["experts"].items()}
    kept, total = sum(counts.get(layer, 0) for layer in old), sum(old.values())
    nbytes = sum(_nbytes(tensor) for tensor in record.expectations.tensors.values())
    lines = ["", "## What was made smaller", ""]
    method = record.config.get("method")
    if isinstance(method, str):
        lines.append(f"- Method: `{method}` of moekit, with the settings below.")
    lines.append(f"- Experts: {kept:,} of {total:,} are left, in {len(old)} layers.")
    lines.append(f"- Weights: {nbytes:,} bytes of {before['bytes']:,} are left.")
    return [*lines, *_proof(record.scores.get("proof"))]


def _nbytes(tensor: TensorExpectation) -> int:
    return math.prod(tensor.shape) * DTYPE_BITS[tensor.dtype] // 8


def _proof(proof: Any) -> list[str]:
    if not isinstance(proof, dict):
        return ["- Proof: none was made; nobody has measured what this costs."]
    told = f"{proof['documents']:,} documents of `{proof['text']}`, {proof['tokens']:,} tokens"
    lines = [f"- Proof: perplexity on {told}, on which nothing was decided; intervals are 95 % over documents.", ""]
    lines += ["| variant | text | before | after | ratio |", "|---|---|---|---|---|"]
    for variant, domains in proof["perplexity"].items():
        for domain, row in domains.items():
            ratio = row["ratio"]
            shown = "" if ratio is None else f"{ratio[0]:.3f} ({ratio[1]:.3f} to {ratio[2]:.3f})"
            lines.append(f"| {variant} | {domain} | {row['before']:.2f} | {row['after']:.2f} | {shown} |")
    return lines


def render(record: Record, config: dict[str, Any], licence: str | None = None) -> str:
    """The text of the card.

    Args:
        record: how the checkpoint was made, expectations filled in.
        config: its config.json.
        licence: of the parent; derived weights stay under it.
    """
    made = [
        "",
        "## How it was made",
        "",
        f"With moekit {record.moekit}:",
        "",
        "```",
        record.command,
        "```",
        "",
        f"Base model: {record.parent or 'none (trained or built from scratch)'}. "
        f"Licence: {licence or 'see the base model' if record.parent else licence or 'not stated'}. "
        f"Seed: {'none' if record.seed is None else record.seed}.",
        *_settings(record.config),
    ]
    limits = [
        "",
        "## Limits",
        "",
        "A changed model is not its base model: evaluate it on your own data before you rely on it. Whatever limits "
        "and biases the base model has, this one has too.",
        "",
        f"Proof of integrity: `moekit check` compares every tensor with the digests in `moekit.json` "
        f"(fingerprint `{(record.fingerprint or '')[:16]}`).",
    ]
    title = ["", "# A Mixture-of-Experts checkpoint made with moekit", "", _sizes(record, config)]
    parts = [_front_matter(record, licence), *title, *_loading(record, config), *_pruned(record), *made, *limits]
    return printable("\n".join(parts) + "\n")
