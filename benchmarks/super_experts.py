"""Do a few experts carry a model's massive activations, and what happens without them, and without as many others?

    python benchmarks/super_experts.py                    # SmolLM2-135M as a MoE, in two ways
    python benchmarks/super_experts.py --model FOLDER     # any MoE

SmolLM2 has massive activations of its own. As a MoE whose experts are cut from the dense networks ("split") they must
lie in routed experts, as one whose dense networks stay beside new experts ("shared") in shared ones; both compute
exactly what the dense model does. Prints the report, the tokens that are sinks, the neurons that carry them, max |H| by
layer with and without the super experts, the decay of attention sinks, and perplexity on held-out text: whole, without
the super experts, and without as many others drawn at random (mean and spread over seeds). Minutes on two cores.

Legend: R rows, S positions, H hidden, I width of an expert.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import moekit
from moekit.anatomy import find_moe_layers
from moekit.anatomy.convert import ActivationSplit, Residual
from moekit.compress.protect.ablation import Pair, random_experts, without_experts
from moekit.compress.protect.sinks import find_sinks, measure_sink_decay, sink_router_scores, sinks_mask
from moekit.compress.protect.super_experts import NEEDS, SHARED, SuperExpertReport, find_super_experts
from moekit.data import fetch, load_text, pack
from moekit.trace import record
from moekit.trace.each_expert import plain_expert
from moekit.trace.seam import read_arguments


def rows_of(data: str, split: str, tokenizer: PreTrainedTokenizerBase, rows: int, length: int) -> Tensor:
    """Rows of each domain in equal numbers, unpadded, [R, S]."""
    documents = load_text(data, split=split, limit_bytes=400_000)
    domains = dict.fromkeys(d.domain for d in documents)
    each = max(rows // len(domains), 1)
    parts = [pack([d for d in documents if d.domain == name], tokenizer, length).input_ids[:each] for name in domains]
    return torch.cat(parts).long()


@torch.no_grad()
def perplexity(model: PreTrainedModel, ids_RS: Tensor) -> float:
    """On rows of equal length."""
    return math.exp(statistics.fmean(float(model(row[None], labels=row[None]).loss) for row in ids_RS))


@contextlib.contextmanager
def streams(model: PreTrainedModel) -> Iterator[list[tuple[float, int, int, float]]]:
    """Largest |value| after each decoder layer, dense ones too, its channel, its position, and the median."""
    found: list[tuple[float, int, int, float]] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        size_RSH = (output[0] if isinstance(output, tuple) else output).abs()
        place = int(size_RSH.argmax())
        hidden, length = size_RSH.shape[2], size_RSH.shape[1]
        found.append((float(size_RSH.max()), place % hidden, place // hidden % length, float(size_RSH.median())))

    hooks = [layer.register_forward_hook(look) for layer in model.get_decoder().layers]
    try:
        with torch.no_grad():
            yield found
    finally:
        for hook in hooks:
            hook.remove()


def largest(model: PreTrainedModel, ids_RS: Tensor, pairs: list[Pair]) -> list[tuple[float, int, int, float]]:
    """`streams` without some experts."""
    with streams(model) as found, without_experts(model, pairs):
        model(ids_RS, use_cache=False)
    return found


@torch.no_grad()
def carriers(model: PreTrainedModel, ids_RS: Tensor, layer: int, expert: int | None) -> list[str]:
    """The neurons of an expert (None: of a dense layer) that make up its largest output, with their shares of it."""
    kept: list[tuple[Tensor, Tensor]] = []  # inputs of the down projection [N, I], and its weight [H, I]

    def of_linear(module: nn.Module, args: Any) -> None:
        kept.append((args[0].reshape(-1, args[0].shape[-1]), module.weight))

    if expert is None or expert == SHARED:
        block = model.get_decoder().layers[layer].mlp
        where = block if expert is None else next(m for m in find_moe_layers(model) if m.index == layer).shared[0]
        hook = where.down_proj.register_forward_pre_hook(of_linear)
    else:
        moe = next(m for m in find_moe_layers(model) if m.index == layer)
        one = plain_expert(moe.experts)
        if one is None:
            return ["unknown: the experts cannot be looked into"]
        run: Callable[[int, Tensor], tuple[Tensor | None, Tensor]] = one

        def of_expert(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            hidden_TH, index_TK, _ = read_arguments(moe, args, kwargs)
            inner_nI, _ = run(expert, hidden_TH[(index_TK == expert).any(dim=1)])
            assert inner_nI is not None
            down = moe.experts.down_proj[expert]
            kept.append((inner_nI, down.T if moe.geometry.transposed else down))

        hook = moe.experts.register_forward_pre_hook(of_expert, with_kwargs=True)
    model(ids_RS, use_cache=False)
    hook.remove()
    inner_NI, down_HI = kept[0]
    output_NH = inner_NI @ down_HI.T
    token, channel = divmod(int(output_NH.abs().argmax()), output_NH.shape[1])
    value, parts_I = output_NH[token, channel], inner_NI[token] * down_HI[channel]
    best = parts_I.abs().topk(min(4, len(parts_I))).indices.tolist()
    return [
        f"neuron {i}: {float(parts_I[i] / value):.1%} (activation {float(inner_NI[token, i]):.1f} x weight "
        f"{float(down_HI[channel, i]):.2f})"
        for i in best
    ]


def print_report(report: SuperExpertReport, seconds: float) -> None:
    """Verdict and the largest maxima."""
    compared = [n for n, layer in report.layers.items() if layer.compared]
    print(
        f"{report.verdict}\n{report.tokens} tokens in {seconds:.0f} s; compared: layers {compared[0]} to "
        f"{compared[-1]}, P{report.rule.percentile:g} {report.percentile:.1f} (room for {report.room}), largest "
        f"{report.largest:.1f}; forming: {[n for n, layer in report.layers.items() if layer.forms] or 'none'}"
    )
    head = f"{'layer':>6}{'expert':>8}{'max |out|':>12}{'channel':>9}{'position':>9}{'/ P':>8}{'/ ratio':>9}"
    print(f"{'':6}{head}  forms")
    for mark, candidates in (("super", report.found), ("", report.others[:6])):
        for c in candidates:
            name = "shared" if c.expert == SHARED else str(c.expert)
            over = "".join(
                f"{'-' if x is None else format(x, '.2f'):>{w}}" for x, w in ((c.over_percentile, 8), (c.over_ratio, 9))
            )
            print(f"{mark:6}{c.layer:>6}{name:>8}{c.value:12.1f}{c.channel:>9}{c.position:>9}{over}  {c.forms}")


def print_streams(model: PreTrainedModel, ids_RS: Tensor, pairs: list[Pair]) -> None:
    """Max |H| by layer, and who carries the steps."""
    moe = {layer.index: layer for layer in find_moe_layers(model)}
    whole, without = largest(model, ids_RS, []), largest(model, ids_RS, pairs)
    print(f"\n{'layer':>6}{'':>7}{'max |H|':>11}{'channel':>9}{'position':>9}{'median':>9}{'without':>11}")
    for n, ((value, channel, position, median), after) in enumerate(zip(whole, without, strict=True)):
        kind = "moe" if n in moe else "dense"
        print(f"{n:>6}{kind:>7}{value:11.1f}{channel:>9}{position:>9}{median:9.2f}{after[0]:11.1f}")
    steps = [n for n in range(1, len(whole)) if whole[n][0] > max(2 * whole[n - 1][0], 100, 1000 * whole[n][3])]
    steps = [n for n in steps if n not in moe]
    for n in steps:
        print(f"layer {n}, dense: {'; '.join(carriers(model, ids_RS, n, None))}")


def others(model: PreTrainedModel, pairs: list[Pair], seed: int, how: str) -> list[Pair]:
    """As many others."""
    if how == "shared":
        rest = [layer.index for layer in find_moe_layers(model) if layer.shared and (layer.index, SHARED) not in pairs]
        return [(n, SHARED) for n in random.Random(seed).sample(rest, len(pairs))]
    experts = {layer.index: layer.geometry.experts for layer in find_moe_layers(model)}
    return random_experts(experts, pairs, seed=seed, same_layers=how == "same layers")


def print_perplexities(model: PreTrainedModel, ids_RS: Tensor, report: SuperExpertReport, seeds: int) -> None:
    """Whole, without super experts, without as many others."""
    pairs = report.pairs
    print(f"\n{'skipped':40}{'perplexity':>22}")
    print(f"{'nothing':40}{perplexity(model, ids_RS):22.2f}")
    if not pairs:
        # Nothing to skip: the experts of the largest outputs instead.
        pairs = [(c.layer, c.expert) for c in report.others[:3]]
        print("(no super experts: the three largest outputs in their place)")
    with without_experts(model, pairs):
        print(f"{', '.join(f'{n}:{e}' for n, e in pairs):40}{perplexity(model, ids_RS):22.2f}")
    kinds = ["anywhere", "same layers"] + (["shared"] if all(e == SHARED for _, e in pairs) else [])
    for how in kinds:
        found = []
        for seed in range(seeds):
            with without_experts(model, others(model, pairs, seed, how)):
                found.append(perplexity(model, ids_RS))
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        name = f"{len(pairs)} others at random, {how}"
        print(f"{name:40}{f'{statistics.fmean(found):.2f} +- {spread:.2f}':>22}   {min(found):.2f} to {max(found):.2f}")


def print_sinks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids_RS: Tensor, report: SuperExpertReport
) -> None:
    """Which tokens carry massive activations, and what of the attention to them is left."""
    sinks = find_sinks(model, ids_RS)
    print(f"\n{len(sinks)} sinks in {len(ids_RS)} rows (row, position, token, layer, channel, value):")
    for s in sinks[:12]:
        place = f"{s.row:>5}{s.position:>5}  {tokenizer.decode([s.token])!r:14}"
        print(f"{place}{s.layer:>4}{s.channel:>6}{s.value:12.1f}")
    for layer, expert in report.pairs:
        print(f"layer {layer}, {expert}: {'; '.join(carriers(model, ids_RS, layer, expert))}")
    if not sinks or not report.pairs:
        return
    mask = sinks_mask(sinks, ids_RS)
    for (layer, expert), (at, rest) in sink_router_scores(model, ids_RS, report.pairs, mask).items():
        print(f"router score of {expert} in layer {layer}: {at:.3f} at sinks, {rest:.3f} elsewhere")
    decay = measure_sink_decay(model, ids_RS, report.pairs, mask)
    print("sink decay by layer: " + " ".join(f"{n}:{value:.2f}" for n, value in decay.items()))
    print("max |H| after the layer when each of the largest is skipped alone:")
    whole = largest(model, ids_RS, [])
    for c in (*report.found, *report.others[:4]):
        alone = largest(model, ids_RS, [(c.layer, c.expert)])[c.layer][0]
        print(f"  layer {c.layer}, {c.expert}: {whole[c.layer][0]:.1f} -> {alone:.1f}")


def examine(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, given: argparse.Namespace) -> None:
    """All tables of one model."""
    print(f"\n=== {name}", flush=True)
    model.set_experts_implementation("eager")
    seen = rows_of(given.data, "train", tokenizer, given.rows, given.length)
    heldout = rows_of(given.data, "heldout", tokenizer, given.rows, given.length)
    start = time.perf_counter()
    shared = ("shared_peak",) if all(layer.shared for layer in find_moe_layers(model)) else ()
    trace = record(model, seen.split(2), statistics=(*NEEDS, *shared, "massive_tokens", "stream_ratio_peak"))
    assert trace.statistics is not None
    size = {"decoder_layers": model.config.num_hidden_layers}
    report = find_super_experts(trace.statistics, **size)
    print_report(report, time.perf_counter() - start)
    by_code = find_super_experts(trace.statistics, forming="first-75", **size).pairs
    by_text = find_super_experts(trace.statistics, scope="model", **size).pairs
    print(f"first 75 % of the layers for those that form: {by_code}; all maxima compared: {by_text}")
    told = ", ".join(f"{n}: {float(s['stream_ratio_peak'][0]):.0f}" for n, s in trace.statistics.items())
    tokens = sum(int(s["massive_tokens"]) for s in trace.statistics.values())
    print(f"largest |H| over the median of its own token, by layer: {told}\n(massive by that: {tokens} tokens)")
    some = heldout[:: max(len(heldout) // 2, 1)]
    print_streams(model, some, report.pairs)
    print_sinks(model, tokenizer, some, report)
    print_perplexities(model, heldout, report, given.seeds)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a MoE; SmolLM2-135M in two ways if left out")
    parser.add_argument("--way", choices=("both", "split", "shared"), default="both")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--data", default="news+stdlib")
    parser.add_argument("--rows", type=int, default=8, help="of text, for profiling and for perplexity")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if given.model:
        tokenizer = AutoTokenizer.from_pretrained(given.model)
        examine(str(given.model), moekit.load(given.model).float().eval(), tokenizer, given)
        return
    folder = fetch("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    calibration = rows_of(given.data, "train", tokenizer, 4, given.length)
    if given.way != "shared":
        split = ActivationSplit(experts=given.experts, top_k=given.experts, router="zero")
        examine(f"split into {given.experts}, all chosen", split.convert(dense, calibration), tokenizer, given)
    if given.way != "split":
        beside = Residual(experts=given.experts, top_k=4, width=64, router="random")
        examine("dense networks as shared experts", beside.convert(dense), tokenizer, given)


if __name__ == "__main__":
    main()
