"""What recording costs: time of a recorded forward pass over that of a plain one, and bytes of a trace per choice.

    python benchmarks/trace_overhead.py [--repeats 12] [--rows 4] [--length 256] [--device cpu] [--model FOLDER]

Without `--model` it makes a random Qwen2-MoE of the demo model's size (30 layers of width 576, 12 of them MoE with 32
experts, top-4 and a shared expert). Passes alternate plain, recorded, plain, recorded, ...; each recorded pass is
divided by the mean of the plain ones before and after it. The plain pass uses the faster of transformers' "eager" and
"grouped_mm" experts, and so does the recorded one. Intervals are 95 % bootstrap intervals of the median ratio. Since
the difference is smaller than the noise of a busy machine, the processor time spent inside the recorder's own functions
is measured too.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from moekit.trace import Recorder, record
from moekit.trace.layer_hook import LayerHook

MOE_LAYERS = list(range(2, 30, 2))[:12]


def demo_sized_model(seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Qwen2MoeConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=192,
        shared_expert_intermediate_size=1536,
        mlp_only_layers=[layer for layer in range(30) if layer not in MOE_LAYERS],
        tie_word_embeddings=True,
    )
    model = Qwen2MoeForCausalLM(config)
    with torch.no_grad():  # fresh routers are zero and would send every token to the same experts
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.normal_(std=0.05)
    return model.eval()


def clock(device: str) -> Callable[[], tuple[float, float]]:
    """Reads (wall, processor) seconds; the processor's share is what other programs on the machine disturb least."""

    def read() -> tuple[float, float]:
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    return read


def timed(run: Callable[[], object], device: str) -> np.ndarray:
    read = clock(device)
    before = read()
    run()
    return np.subtract(read(), before)


def interval(ratios: np.ndarray, seed: int = 0) -> dict[str, float]:
    draws = np.random.default_rng(seed).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    return {"ratio": float(np.median(ratios)), "low": float(low), "high": float(high)}


class Meter:
    """Processor seconds inside the recorder's own functions; nested calls count once."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0

    def watch(self, owner: type, *names: str) -> None:
        """Measure these methods from now on."""
        for name in names:
            setattr(owner, name, self._timed(getattr(owner, name)))

    def _timed(self, function: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(function)
        def wrapper(*args: object, **kwargs: object) -> object:
            self._depth += 1
            before = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if not self._depth:
                    self.seconds += time.process_time() - before

        return wrapper


METER = Meter()
METER.watch(Recorder, "_begin", "_end", "flush")
METER.watch(LayerHook, "_see", "_ask", "measure")


def alternate(plain: Callable[[], object], recorded: Callable[[], object], repeats: int, device: str) -> dict:
    plain()
    recorded()
    plains, recordeds = [timed(plain, device)], []
    METER.seconds = 0.0
    for _ in range(repeats):
        recordeds.append(timed(recorded, device))
        plains.append(timed(plain, device))
    around = (np.array(plains[:-1]) + np.array(plains[1:])) / 2
    ratios = np.array(recordeds) / around
    return {
        "plain_seconds": float(np.median(np.array(plains)[:, 0])),
        "wall": interval(ratios[:, 0]),
        "processor": interval(ratios[:, 1]),
        "inside": METER.seconds / repeats / float(np.median(np.array(plains)[:, 1])),
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="")
    parser.add_argument("--all", action="store_true", help="also the statistics that read more than choices")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    logging.getLogger("moekit").setLevel(logging.ERROR)
    if args.model:
        import moekit

        model = moekit.load(args.model, device=args.device).eval()
    else:
        model = demo_sized_model().to(args.device)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (args.rows, args.length), generator=torch.Generator().manual_seed(0))
    ids = ids.to(args.device)
    mask = torch.ones_like(ids)
    mask[-1, args.length - args.length // 8 :] = 0  # some padding, as in a real batch

    def plain() -> None:
        model(input_ids=ids, attention_mask=mask, use_cache=False)

    speeds = {}
    for name in ("eager", "grouped_mm"):
        model.set_experts_implementation(name)
        plain()
        speeds[name] = float(min(timed(plain, args.device)[1 if args.device == "cpu" else 0] for _ in range(3)))
    fastest = min(speeds, key=speeds.__getitem__)
    model.set_experts_implementation(fastest)

    settings: dict[str, dict] = {
        "choices, weights, load, coactivation": {"statistics": ("load", "coactivation"), "weights": True},
    }
    if args.all:
        for group in ("router", "inputs", "outputs", "residual"):
            settings[group] = {"statistics": (group,), "keep_choices": False}
        # Single experts' outputs are computed beside the model's own, or once.
        settings["outputs; once"] = {"statistics": ("outputs",), "keep_choices": False, "once": True}
    result: dict = {"tokens": int(mask.sum()), "plain": speeds, "experts": fastest, "recorded": {}}
    for name, options in settings.items():
        recorder = Recorder(model, fingerprint="", **options)

        def recorded(recorder: Recorder = recorder) -> None:
            with recorder:
                plain()
                recorder.flush()

        result["recorded"][name] = alternate(plain, recorded, args.repeats, args.device)
    result["bytes"] = sizes(model, ids, mask)
    print(json.dumps(result, indent=2) if args.json else readable(result))


def sizes(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, float]:
    """Bytes on disk per choice (everything in the folder), and of statistics, which do not grow with the text."""
    batches = [{"input_ids": ids, "attention_mask": mask}] * 8
    found: dict[str, float] = {}
    for name, weights, statistics in (
        ("indices", False, ()),
        ("indices and weights", True, ()),
        ("with load and coactivation", True, ("load", "coactivation")),
    ):
        trace = record(model, batches, statistics=statistics, weights=weights, fingerprint="")
        found["choices"] = trace.meta.tokens * sum(trace.meta.top_k)
        with tempfile.TemporaryDirectory() as folder:
            trace.save(Path(folder) / "trace")
            total = sum(file.stat().st_size for file in (Path(folder) / "trace").iterdir())
        found[name] = total / found["choices"]
    own = [tensor.nbytes for layer in (trace.statistics or {}).values() for tensor in layer.values()]
    found["statistics, bytes in all"] = sum(own)
    return found


def readable(result: dict) -> str:
    lines = [f"plain forward, {result['tokens']} tokens (seconds): " + str(result["plain"])]
    lines.append(f"experts: {result['experts']}")
    for name, found in result["recorded"].items():
        for kind in ("wall", "processor"):
            r = found[kind]
            lines.append(f"{name}: {kind} time x{r['ratio']:.3f} [{r['low']:.3f}, {r['high']:.3f}]")
        lines.append(f"{name}: processor time inside the recorder {found['inside']:.2%} of a plain pass")
    lines.append("bytes per choice on disk: " + ", ".join(f"{k} {v:.3f}" for k, v in result["bytes"].items()))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
