"""Do a few experts carry a model's massive activations, and what happens without them, and without as many others?

    python benchmarks/super_experts.py                    # SmolLM2-135M as a MoE, in two ways
    python benchmarks/super_experts.py --model FOLDER     # any MoE

SmolLM2 has massive activations of its own. As a MoE whose experts are cut from the dense networks ("split") they must
lie in routed experts, as one whose dense networks stay beside new experts ("shared") in shared ones; both compute
exactly what the dense model does. Prints what `moekit super-experts` prints, then what other rules find, largest |H| by
layer with and without the super experts, the tokens that are sinks, the neurons that carry them, and the decay of
attention sinks. Minutes on two cores.

Legend: R rows, S positions, H hidden, I width of an expert.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import moekit
from moekit.anatomy import find_moe_layers
from moekit.cli._terminal import Terminal
from moekit.cli.views.super_experts import show
from moekit.conversion import ActivationSplit, Residual
from moekit.data import TokenBatches, TokenizedDocument, fetch, load_text, pack
from moekit.diagnose.super_experts.ablation import Pair, without_experts
from moekit.diagnose.super_experts.attention_sinks import find_sinks, measure_sink_decay, sink_router_scores, sinks_mask
from moekit.diagnose.super_experts.massive_activations import StreamedProfile, layer_streams
from moekit.diagnose.super_experts.report import SHARED
from moekit.evaluation.super_expert_study import SuperExpertStudy
from moekit.evaluation.super_experts import check_super_experts
from moekit.jobs.shared.opened import OpenedModel, open_source
from moekit.jobs.super_experts import summary_of
from moekit.jobs.weights.protection import find_in_trace, protection_needs
from moekit.trace import Trace
from moekit.trace.each_expert import plain_expert
from moekit.trace.seam import read_arguments

# The paper's code, and its text.
RULES: tuple[dict[str, Any], ...] = ({"forming": "first-75"}, {"scope": "model"})


def rows_of(data: str, split: str, tokenizer: PreTrainedTokenizerBase, rows: int, length: int) -> TokenBatches:
    """Rows of each domain in equal numbers."""
    documents = load_text(data, split=split, limit_bytes=400_000)
    whole = pack(documents, tokenizer, length)
    each = max(rows // len(whole.domains), 1)
    full_R = (whole.document_RS >= 0).all(dim=1)
    chosen: list[int] = []
    for domain in range(len(whole.domains)):
        chosen += (full_R & (whole.domain_RS[:, 0] == domain)).nonzero().flatten()[:each].tolist()
    return TokenBatches(whole.input_ids[chosen], whole.document_RS[chosen], whole.domain_RS[chosen], whole.domains)


def look(source: OpenedModel, rows: TokenBatches) -> tuple[Trace, StreamedProfile]:
    """One pass over the text, layer by layer from disk."""
    names = (*protection_needs(source), "massive_tokens", "stream_ratio_peak")
    streamed = StreamedProfile(source.checkpoint, rows.batches(2), moe_layers=source.geometries, statistics=names)
    with streamed:
        streamed.run()
        return streamed.trace(), streamed


def documents_of(rows: TokenBatches) -> list[TokenizedDocument]:
    """Each row as a document of its own, to measure likelihood on."""
    domains = [rows.domains[int(number)] for number in rows.domain_RS[:, 0]]
    return [
        TokenizedDocument(ids.tolist(), name, n)
        for n, (ids, name) in enumerate(zip(rows.input_ids, domains, strict=True))
    ]


def study(source: OpenedModel, seen: TokenBatches, heldout: TokenBatches, seeds: int) -> SuperExpertStudy:
    """What `moekit super-experts` does; where none is found the experts of the largest outputs are skipped instead."""
    start = time.perf_counter()
    trace, streamed = look(source, seen)
    report = find_in_trace(source, trace)
    print(f"{report.tokens} tokens in {time.perf_counter() - start:.0f} s")
    by_code, by_text = (find_in_trace(source, trace, **rule).pairs for rule in RULES)
    print(f"first 75 % of the layers for those that form: {by_code}; all maxima compared: {by_text}")
    found = trace.require(("massive_tokens", "stream_ratio_peak"))
    told = ", ".join(f"{n}: {float(s['stream_ratio_peak'][0]):.0f}" for n, s in found.items())
    tokens = sum(int(s["massive_tokens"]) for s in found.values())
    print(f"largest |H| over the median of its own token, by layer: {told}\n(massive by that: {tokens} tokens)")
    pairs = report.pairs or [(c.layer, c.expert) for c in report.others[:3]]
    if not report.pairs:
        print("no super experts: the three largest outputs are skipped in their place")
    documents, geometries = documents_of(heldout), source.geometries
    length = heldout.input_ids.shape[1]
    check = check_super_experts(
        source.checkpoint, documents, pairs, geometries=geometries, draws=seeds, window=length, source="held-out rows"
    )
    streams = layer_streams(trace.require(protection_needs(source)), streamed.dense, streamed.apart)
    return SuperExpertStudy.of(report, streams, check=check)


def examine(name: str, folder: Path, given: argparse.Namespace) -> None:
    """All tables of one model."""
    print(f"\n=== {name}", flush=True)
    source = open_source(str(folder))
    tokenizer = source.tokenizer()
    seen = rows_of(given.data, "train", tokenizer, given.rows, given.length)
    heldout = rows_of(given.data, "heldout", tokenizer, given.rows, given.length)
    found = study(source, seen, heldout, given.seeds)
    # No file was written that prune could be told of.
    show(Terminal(), summary_of(found, folder) | {"protect": {}})
    assert found.check is not None
    print("\nlargest |H| after each layer, held-out rows: " + ", ".join(found.check.largest))
    for n, values in enumerate(zip(*(part.values() for part in found.check.largest.values()), strict=True)):
        print(f"{n:>6}" + "".join(f"{value:11.1f}" for value in values))
    model = moekit.load(folder).float().eval()
    model.set_experts_implementation("eager")
    some = heldout.input_ids[:: max(len(heldout) // 2, 1)].long()
    for told in found.streams:
        if told.origin in ("dense", "layer"):
            print(f"layer {told.layer}, dense: {'; '.join(carriers(model, some, told.layer, None))}")
    print_sinks(model, tokenizer, some, found)


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


def print_sinks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids_RS: Tensor, study: SuperExpertStudy
) -> None:
    """Which tokens carry massive activations, and what of the attention to them is left."""
    sinks = find_sinks(model, ids_RS)
    print(f"\n{len(sinks)} sinks in {len(ids_RS)} rows (row, position, token, layer, channel, value):")
    for s in sinks[:12]:
        place = f"{s.row:>5}{s.position:>5}  {tokenizer.decode([s.token])!r:14}"
        print(f"{place}{s.layer:>4}{s.channel:>6}{s.value:12.1f}")
    report = study.report
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
    for c in (*report.found, *report.others[:4]):
        whole, alone = (largest_after(model, ids_RS, c.layer, gone) for gone in ([], [(c.layer, c.expert)]))
        print(f"  layer {c.layer}, {c.expert}: {whole:.1f} -> {alone:.1f}")


@torch.no_grad()
def largest_after(model: PreTrainedModel, ids_RS: Tensor, layer: int, gone: list[Pair]) -> float:
    """Largest |value| after a decoder layer without some experts."""
    found: list[float] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found.append(float((output[0] if isinstance(output, tuple) else output).abs().max()))

    hook = model.get_decoder().layers[layer].register_forward_hook(keep)
    with without_experts(model, gone):
        model(ids_RS, use_cache=False)
    hook.remove()
    return max(found)


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
        examine(str(given.model), given.model, given)
        return
    folder = fetch("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as made:
        if given.way != "shared":
            split = ActivationSplit(experts=given.experts, top_k=given.experts, router="zero")
            calibration = rows_of(given.data, "train", tokenizer, 4, given.length).calibration
            moekit.save(split.convert(dense, calibration), Path(made) / "split", tokenizer=tokenizer)
            examine(f"split into {given.experts}, all chosen", Path(made) / "split", given)
        if given.way != "split":
            beside = Residual(experts=given.experts, top_k=4, width=64, router="random")
            moekit.save(beside.convert(dense), Path(made) / "shared", tokenizer=tokenizer)
            examine("dense networks as shared experts", Path(made) / "shared", given)


if __name__ == "__main__":
    main()
