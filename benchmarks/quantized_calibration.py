"""What calibration on quantized weights costs: its speed over that on the same model in bfloat16, in the same run.

    python benchmarks/quantized_calibration.py [--repeats 3] [--tokens 2048] [--experts 32] [--formats fp8 int4]

Two layers of Qwen3-30B-A3B's widths (hidden 2048, experts of 768, top-8, fewer experts) are written once in bfloat16
and once in each format: fp8 in blocks of 128 x 128 as DeepSeek-V3's files are, int4 in groups of 128 as
compressed-tensors packs them. One calibration pass for REAP streams each folder from disk, layer by layer; passes take
turns, and the median of each counts. Layers are also loaded alone, without any token: that is where formats differ,
and what more tokens hide. bfloat16 is read as float32 where the CPU would emulate it, as in any calibration.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from moekit import catalogue
from moekit.checkpoint import Checkpoint
from moekit.streaming import LayerLoader
from moekit.trace.streamed import record_streamed

BLOCK = 128
LAYERS = 2
FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "modules_to_not_convert": ["lm_head", "mlp.gate"]}
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*mlp.gate$"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": BLOCK},
        }
    },
}
Tensors = dict[str, torch.Tensor]


def to_fp8(name: str, weight: torch.Tensor) -> Tensors:
    rows, columns = weight.shape
    blocks = weight.float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3)) / 448
    packed = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return {name: packed.view(rows, columns), f"{name}_scale_inv": scale}


def to_int4(name: str, weight: torch.Tensor) -> Tensors:
    rows, columns = weight.shape
    groups = weight.float().view(rows, columns // BLOCK, BLOCK)
    scale = groups.abs().amax(-1) / 7
    numbers = (groups / scale[..., None]).round().clamp(-8, 7).long().view(rows, columns // 8, 8) + 8
    words = (numbers << torch.arange(0, 32, 4)).sum(-1)
    stem = name.removesuffix(".weight")
    packed = {
        "weight_packed": words.to(torch.int32),
        "weight_scale": scale,
        "weight_shape": torch.tensor([rows, columns]),
    }
    return {f"{stem}.{part}": tensor for part, tensor in packed.items()}


FORMATS: dict[str, tuple[dict, Callable[[str, torch.Tensor], Tensors]]] = {
    "fp8": (FP8, to_fp8),
    "int4": (INT4, to_int4),
}


def write_models(scratch: Path, experts: int, formats: list[str]) -> dict[str, Path]:
    """A random model in bfloat16, and the same in each format."""
    config = Qwen3MoeConfig(
        vocab_size=1024, hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=LAYERS, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, num_experts=experts, num_experts_per_tok=8, norm_topk_prob=True,
        dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folders = {name: scratch / name for name in ("bfloat16", *formats)}
    model.save_pretrained(folders["bfloat16"])
    plain = load_file(folders["bfloat16"] / "model.safetensors")
    told = json.loads((folders["bfloat16"] / "config.json").read_text())
    for name in formats:
        settings, pack = FORMATS[name]
        tensors: Tensors = {}
        for key, weight in plain.items():
            spared = ".layers." not in key or weight.dim() != 2 or key.endswith("mlp.gate.weight")
            tensors |= {key: weight} if spared else pack(key, weight)
        folders[name].mkdir()
        save_file(tensors, folders[name] / "model.safetensors", metadata={"format": "pt"})
        (folders[name] / "config.json").write_text(json.dumps({**told, "quantization_config": settings}))
    return folders


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def load_layers(folder: Path) -> None:
    loader = LayerLoader(Checkpoint.open(folder), device="cpu")
    for index in range(loader.layers):
        with loader.loaded(index):
            pass
    loader.close()


def measure(folders: dict[str, Path], tokens: int, repeats: int) -> dict[str, dict[str, float]]:
    ids = torch.randint(0, 1024, (tokens // 512, 512), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
    passes: dict[str, list[float]] = {name: [] for name in folders}
    loads: dict[str, list[float]] = {name: [] for name in folders}

    def calibrate(folder: Path) -> None:
        record_streamed(
            Checkpoint.open(folder), batches, statistics=catalogue.make("prune", "reap", {}).required, device="cpu"
        )

    for name, folder in folders.items():  # files come into the cache of the system
        load_layers(folder)
        print(f"{name}: {sum(f.stat().st_size for f in folder.iterdir()) / 2**20:.0f} MiB", flush=True)
    for _ in range(repeats):
        for name, folder in folders.items():
            loads[name].append(timed(lambda folder=folder: load_layers(folder)))
            passes[name].append(timed(lambda folder=folder: calibrate(folder)))
    plain = {"pass": statistics.median(passes["bfloat16"]), "load": statistics.median(loads["bfloat16"])}
    found = {}
    for name in folders:
        own = {"pass": statistics.median(passes[name]), "load": statistics.median(loads[name])}
        speeds = {f"{what}_speed": plain[what] / seconds for what, seconds in own.items()}
        found[name] = {**{f"{what}_seconds": seconds for what, seconds in own.items()}, **speeds}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--formats", nargs="+", choices=sorted(FORMATS), default=["fp8", "int4"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = write_models(Path(scratch), args.experts, args.formats)
        result = measure(folders, args.tokens, args.repeats)
    print(
        f"{args.tokens} tokens, {args.experts} experts a layer, {torch.get_num_threads()} threads, {platform.machine()}"
    )
    for name, told in result.items():
        print(
            f"{name:9} pass {told['pass_seconds']:6.2f} s, {told['pass_speed']:5.2f} of bfloat16's speed; loading the "
            f"layers alone {told['load_seconds']:6.2f} s, {told['load_speed']:5.2f}"
        )


if __name__ == "__main__":
    main()
