"""Time of one MoE layer's experts a token: packed integers beside transformers' grouped_mm in fp32, in one run.

    python benchmarks/packed_decode.py
    python benchmarks/packed_decode.py --shape olmoe --tokens 1 --bits 4 --group 32

Shapes are those of one layer of Qwen3-30B-A3B (128 experts of 2048 x 768) and of OLMoE (64 of 2048 x 1024), 8 choices a
token; weights are random numbers on a grid, and grouped_mm is given the very weights that the integers stand for. Every
pass has a routing of its own, so that weights come from memory and not from a cache, and both ways take turns on the
same one. Told are the least and the median time of a pass, how many times faster the packed way is (of medians), its
relative error against an fp32 reference that is exact in the weights, and the time that reading the chosen experts'
bytes takes at the speed at which this machine reads memory (a sum over a gigabyte, measured first).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import Tensor

from moekit.anatomy.probe import MoELayer, find_moe_layers
from moekit.checkpoint.packed_loading import PackedMatrix
from moekit.checkpoint.quantized.packed_experts import words_of
from moekit.experts.kernels import kernel_for
from moekit.experts.methods.packed import Packed
from moekit.experts.packing import stored, tensors_of_layer
from moekit.runtime import attach, detach
from moekit.runtime.attachment import Attachment
from moekit.runtime.experts import inputs_of

CHOICES = 8
SHAPES = {"qwen3-30b": (128, 2048, 768), "olmoe": (64, 2048, 1024)}


def one_layer(experts: int, hidden: int, width: int) -> Any:
    """A model of one MoE layer of this shape, and little else."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=hidden,
        moe_intermediate_size=width,
        num_experts=experts,
        num_experts_per_tok=CHOICES,
        num_hidden_layers=1,
        vocab_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=16,
    )
    config._experts_implementation = "grouped_mm"
    with transformers.initialization.no_init_weights():
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def matrices(layer: MoELayer, bits: int, group: int, generator: torch.Generator) -> Iterator[PackedMatrix]:
    """Random integers of each expert."""
    hidden, width = layer.geometry.hidden, layer.geometry.width
    for expert in range(layer.geometry.experts):
        for part, rows, columns in (("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)):
            low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
            numbers_RC = torch.randint(low, high + 1, (rows, columns), dtype=torch.int8, generator=generator)
            scale_RG = torch.rand(rows, columns // (group or columns), generator=generator) + 0.5
            scale_RG = (scale_RG * (0.03 / (1 << (bits - 1)))).bfloat16()
            yield PackedMatrix(0, expert, part, bits, words_of(numbers_RC, bits), scale_RG)


@torch.no_grad()
def same_weights(layer: MoELayer, tensors: dict[str, Tensor]) -> None:
    """Give the stock experts the weights that the integers stand for."""
    hidden, width = layer.geometry.hidden, layer.geometry.width
    for expert in range(layer.geometry.experts):
        layer.experts.gate_up_proj[expert, :width] = stored(tensors, "gate", expert, hidden).weights()
        layer.experts.gate_up_proj[expert, width:] = stored(tensors, "up", expert, hidden).weights()
        layer.experts.down_proj[expert] = stored(tensors, "down", expert, width).weights()


def bandwidth() -> float:
    """Bytes a second that one pass over a gigabyte reads, the best of three."""
    values, best = torch.ones(1 << 28), 0.0
    for _ in range(3):
        start = time.perf_counter()
        values.sum()
        best = max(best, 4 * len(values) / (time.perf_counter() - start))
    return best


def routing(experts: int, hidden: int, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, choices and weights of a pass."""
    index_TK = torch.rand(tokens, experts, generator=generator).topk(CHOICES, dim=-1).indices
    weights_TK = torch.rand(tokens, CHOICES, generator=generator).softmax(-1)
    return torch.randn(tokens, hidden, generator=generator), index_TK, weights_TK


def timed(run: Callable[..., Tensor], given: tuple[Tensor, ...]) -> float:
    """Seconds of one pass."""
    start = time.perf_counter()
    run(*given)
    return time.perf_counter() - start


@torch.no_grad()
def compare(layer: MoELayer, made: Attachment, tokens: int, bits: int, group: int, passes: int, speed: float) -> None:
    """Time both ways in turns and print a line."""
    experts: Any = layer.experts
    stock = type(experts).stock_class.forward
    generator = torch.Generator().manual_seed(tokens)
    times: dict[str, list[float]] = {"packed": [], "fp32": []}
    least = 0.0
    every_E1 = torch.arange(layer.geometry.experts)[:, None]
    for some_T1 in every_E1.split(16):  # a matrix is laid out when it is first used
        experts(torch.zeros(len(some_T1), layer.geometry.hidden), some_T1, torch.ones(len(some_T1), 1))
    for number in range(passes + 2):
        given = routing(layer.geometry.experts, layer.geometry.hidden, tokens, generator)
        taken = {"fp32": timed(lambda *a: stock(experts, *a), given), "packed": timed(experts, given)}
        if number >= 2:  # the first ones warm up
            for name, seconds in taken.items():
                times[name].append(seconds)
            size = 3 * layer.geometry.hidden * layer.geometry.width
            least += len(given[1].unique()) * size * (bits + 16 / (group or layer.geometry.hidden)) / 8 / speed / passes
    inputs = inputs_of(made.layers[0], experts, *given, run=experts)
    wanted = made.part.reference(inputs)  # type: ignore[attr-defined]
    error = float((experts(*given) - wanted).norm() / wanted.norm())
    middle = {name: statistics.median(some) for name, some in times.items()}
    print(
        f"  {tokens:2d} tokens: packed "
        f"{1e3 * min(times['packed']) / tokens:.2f} / {1e3 * middle['packed'] / tokens:.2f} ms a token, grouped_mm "
        f"fp32 {1e3 * min(times['fp32']) / tokens:.2f} / {1e3 * middle['fp32'] / tokens:.2f} ms, "
        f"{middle['fp32'] / middle['packed']:.2f} times, error {error:.1e}, bytes alone {1e3 * least / tokens:.2f} ms"
    )


def main() -> None:
    """Time every shape, width and number of tokens that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), action="append")
    parser.add_argument("--tokens", type=int, action="append")
    parser.add_argument("--bits", type=int, action="append")
    parser.add_argument("--group", type=int, help="columns that share a scale, 0 for a row; else 0 for 8 bits, or 128")
    parser.add_argument("--experts", type=int, help="fewer of them, where memory is short")
    parser.add_argument("--passes", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    speed = bandwidth()
    print(f"torch {torch.__version__}, {args.threads} threads, memory is read at {speed / 1e9:.1f} GB/s")
    for shape in args.shape or sorted(SHAPES):
        experts, hidden, width = SHAPES[shape]
        model = one_layer(args.experts or experts, hidden, width)
        layer = find_moe_layers(model)[0]
        print(f"{shape}: {args.experts or experts} experts of {hidden} x {width}, {CHOICES} a token")
        for bits in args.bits or (8, 4):
            group = args.group if args.group is not None else 0 if bits > 4 else 128
            kernel = kernel_for(bits, width, hidden, hidden // (group or hidden))
            print(f"{bits} bits, {f'groups of {group}' if group else 'rows'}: kernel {kernel}")
            generator = torch.Generator().manual_seed(bits)
            tensors = tensors_of_layer(matrices(layer, bits, group, generator), 0)
            same_weights(layer, tensors)
            made = attach(model, Packed(), {0: tensors})
            for tokens in args.tokens or (1, 4, 16):
                compare(layer, made, tokens, bits, group, args.passes, speed)
            detach(model)


if __name__ == "__main__":
    main()
