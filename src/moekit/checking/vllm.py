"""What vLLM can and cannot load, by its registry of classes and the rules of its loaders (as of mid 2026).

It is not imported: the facts stand here, and a newer version may know more.
"""

from __future__ import annotations

from collections.abc import Iterator

from moekit.anatomy.layout import parse_expert_tensor
from moekit.checking.report import Finding
from moekit.checkpoint.experts import counts_of
from moekit.checkpoint.folder import INDEX_FILE, Checkpoint
from moekit.checkpoint.layout import Layout
from moekit.checkpoint.record import TENSORS_FILE

# Mixture-of-Experts classes in vLLM's registry of models.
# Written in full lines: one name a line would be two screens of nothing else.
# fmt: off
MOE_CLASSES = frozenset({
    "AfmoeForCausalLM", "ArcticForCausalLM", "AriaForConditionalGeneration", "BailingMoeForCausalLM",
    "BailingMoeV2ForCausalLM", "Cohere2MoeForCausalLM", "DbrxForCausalLM", "DeepseekForCausalLM",
    "DeepseekV2ForCausalLM", "DeepseekV32ForCausalLM", "DeepseekV3ForCausalLM", "DeepseekV4ForCausalLM",
    "DeepseekVLV2ForCausalLM", "Dots1ForCausalLM", "Ernie4_5_MoeForCausalLM",
    "Ernie4_5_VLMoeForConditionalGeneration", "ExaoneMoEForCausalLM", "FlexOlmoForCausalLM", "Gemma4ForCausalLM",
    "Gemma4ForConditionalGeneration", "Glm4MoeForCausalLM", "Glm4MoeLiteForCausalLM",
    "Glm4vMoeForConditionalGeneration", "GlmMoeDsaForCausalLM", "GptOssForCausalLM", "GraniteMoeForCausalLM",
    "GraniteMoeHybridForCausalLM", "GraniteMoeSharedForCausalLM", "Grok1ForCausalLM", "Grok1ModelForCausalLM",
    "HYV3ForCausalLM", "HunYuanMoEV1ForCausalLM", "JambaForCausalLM", "KimiK25ForConditionalGeneration",
    "KimiLinearForCausalLM", "KimiVLForConditionalGeneration", "LagunaForCausalLM", "Lfm2MoeForCausalLM",
    "Llama4ForCausalLM", "Llama4ForConditionalGeneration", "LongcatFlashForCausalLM", "MiMoV2FlashForCausalLM",
    "MiMoV2ForCausalLM", "MiniMaxForCausalLM", "MiniMaxM1ForCausalLM", "MiniMaxM2ForCausalLM",
    "MiniMaxText01ForCausalLM", "MiniMaxVL01ForConditionalGeneration", "MistralLarge3ForCausalLM",
    "MixtralForCausalLM", "NemotronHForCausalLM", "NemotronHPuzzleForCausalLM", "OlmoeForCausalLM",
    "PanguProMoEV2ForCausalLM", "PanguUltraMoEForCausalLM", "Param2MoEForCausalLM", "PhiMoEForCausalLM",
    "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM", "Qwen3OmniMoeForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration", "SarvamMLAForCausalLM",
    "SarvamMoEForCausalLM", "Step3TextForCausalLM", "Step3VLForConditionalGeneration", "Step3p5ForCausalLM",
})
# fmt: on


def check_vllm(checkpoint: Checkpoint, layout: Layout | None) -> Iterator[Finding]:
    """What keeps vLLM from loading a folder.

    Args:
        checkpoint: opened.
        layout: of its config.
    """
    yield from _architecture(checkpoint)
    yield from _files(checkpoint, layout)
    yield from _mixed_formats(checkpoint)


def _architecture(checkpoint: Checkpoint) -> Iterator[Finding]:
    if not checkpoint.config.get("architectures"):
        yield Finding(
            severity="error",
            code="no-architecture",
            message="the config names no architecture, by which vllm chooses the model class",
            file=str(checkpoint.path / "config.json"),
            hint='add "architectures" as save_pretrained writes it',
        )
        return
    named = [name for name in checkpoint.config["architectures"] if isinstance(name, str)]
    if counts_of(checkpoint) and not MOE_CLASSES.intersection(named):
        yield Finding(
            severity="warning",
            code="unknown-to-vllm",
            message=f"vllm has no class of its own for {', '.join(named)}; it runs such a model on transformers' code, "
            "if that class supports it",
            file=str(checkpoint.path / "config.json"),
            hint="a newer vllm may have one; try it before you rely on it (vllm serve --model-impl transformers)",
        )


def _files(checkpoint: Checkpoint, layout: Layout | None) -> Iterator[Finding]:
    if (checkpoint.path / TENSORS_FILE).exists() and not (checkpoint.path / INDEX_FILE).exists():
        yield Finding(
            severity="error",
            code="extra-file-taken-for-weights",
            message=f"vllm loads every *.safetensors unless an index names the shards, so {TENSORS_FILE} too",
            file=str(checkpoint.path),
            hint="save it again with moekit, which writes an index then",
        )
    fused = [name for name in checkpoint.tensors if (found := parse_expert_tensor(name)) and found.expert is None]
    if layout is not None and fused and not all(name in layout.stock for name in fused):
        yield Finding(
            severity="warning",
            code="fused-experts",
            message="experts lie stacked under transformers' own names; vllm's loaders expect this family's split ones",
            file=str(checkpoint.path),
            hint="load and save it with moekit, which writes the split layout",
        )


def _mixed_formats(checkpoint: Checkpoint) -> Iterator[Finding]:
    """VLLM takes the format of a layer's first expert for all of them; layers may differ, experts may not."""
    formats: dict[int, dict[str, dict[int, set[tuple[str, str, tuple[int, ...]]]]]] = {}
    dtypes: dict[int, set[str]] = {}
    for name, info in checkpoint.tensors.items():
        found = parse_expert_tensor(name)
        if found is None:
            continue
        if found.suffix in {"", "weight", "weight_packed"}:
            dtypes.setdefault(found.layer, set()).add(f"{found.suffix} {info.dtype}")
        if found.expert is not None:
            parts = formats.setdefault(found.layer, {}).setdefault(found.part, {})
            parts.setdefault(found.expert, set()).add((found.suffix, info.dtype, info.shape))
    for layer, kinds in dtypes.items():
        differ = any(len({frozenset(kind) for kind in part.values()}) > 1 for part in formats.get(layer, {}).values())
        if len(kinds) > 1 or differ:
            told = ", ".join(sorted(kind.strip() for kind in kinds))
            yield Finding(
                severity="error",
                code="mixed-formats",
                message=f"experts of one layer have different formats ({told})",
                file=str(checkpoint.path),
                layer=layer,
                hint="vllm wants one format and width for all experts of a layer; mix between layers instead",
            )
