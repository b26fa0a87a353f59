"""What pausing a forward pass at every decoder layer costs, beside running the forward anew for every layer.

    python benchmarks/streaming.py
    python benchmarks/streaming.py --hidden 512 --batches 4

All layers lie in memory, so that reading them from disk hides nothing. Four ways are timed in turns, and the least time
of each is told:

- plain: the model's own forward, batch by batch;
- anew: the forward is run for every layer and batch, with all layers before it passing their input on;
- paused: each batch is one forward that waits before every layer (`moekit.streaming`), all in memory;
- parked: the same, with nothing but the pass that is worked on in memory.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from moekit.streaming.walk import Inputs, Walk


class InMemory:
    """A loader whose layers are all there."""

    def __init__(self, model: Any) -> None:
        self.model, self.decoder = model, model.get_decoder()
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.layers = len(self.decoder.layers)

    def layer(self, index: int) -> Any:
        """One decoder layer."""
        return self.decoder.layers[index]


class _Reached(Exception):
    pass


@torch.no_grad()
def anew(loader: InMemory, batches: list[Inputs]) -> list[torch.Tensor]:
    """States behind the last layer, the forward being run for every layer."""
    states = [loader.model.get_input_embeddings()(batch.input_ids) for batch in batches]
    for index in range(loader.layers):
        layer = loader.layer(index)
        for number, batch in enumerate(batches):
            made: list[torch.Tensor] = []

            def reached(given: Any, *args: Any, own: Any = layer, n: int = number, **kwargs: Any) -> Any:
                del own.forward
                made.append(own(states[n], *args, **kwargs))  # noqa: B023
                raise _Reached

            for before in loader.decoder.layers[:index]:
                before.forward = lambda given, *args, **kwargs: given
            layer.forward = reached
            try:
                embeds = torch.zeros(()).expand(states[number].shape)
                loader.decoder(inputs_embeds=embeds, attention_mask=batch.attention_mask, use_cache=False)
            except _Reached:
                states[number] = made[0]
            for before in loader.decoder.layers[:index]:
                del before.forward
    return states


@torch.no_grad()
def plain(loader: InMemory, batches: list[Inputs]) -> list[torch.Tensor]:
    """States behind the final norm, batch by batch."""
    return [loader.decoder(input_ids=b.input_ids, attention_mask=b.attention_mask, use_cache=False)[0] for b in batches]


def paused(loader: Any, batches: list[Inputs], limit: int) -> tuple[list[torch.Tensor], int]:
    """States behind the last layer, and bytes that the passes held in memory at the first layer."""
    passes = Walk(loader, batches, limit=limit).passes("states")
    passes.begin()
    for index in range(loader.layers):
        for number in range(len(batches)):
            passes.run(index, number)
            passes.go_on(index, number)
    states = [passes.get(number) for number in range(len(batches))]
    held = passes.nbytes[0]
    passes.close()
    return states, held


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("hidden", 256), ("layers", 12), ("experts", 16), ("batches", 6), ("length", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=1024,
        hidden_size=asked.hidden,
        num_hidden_layers=asked.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=asked.hidden // 8,
        moe_intermediate_size=asked.hidden // 2,
        num_experts=asked.experts,
        num_experts_per_tok=2,
    )
    loader = InMemory(transformers.Qwen3MoeForCausalLM(config).eval())
    shape = (asked.batches, asked.rows, asked.length)
    batches = [Inputs(ids, torch.ones_like(ids)) for ids in torch.randint(0, 1024, shape)]
    ways: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain(loader, batches),
        "anew": lambda: anew(loader, batches),
        "paused": lambda: paused(loader, batches, 1 << 40),
        "parked": lambda: paused(loader, batches, 0),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(asked.repeats):
        for name, way in ways.items():
            start = time.process_time()
            way()
            seconds[name].append(time.process_time() - start)
    states, held = paused(loader, batches, 1 << 40)
    same = all(torch.equal(mine, theirs) for mine, theirs in zip(states, anew(loader, batches), strict=True))
    print(
        f"the same states to the bit: {same}; passes hold {held / sum(s.nbytes for s in states):.2f} times the states"
    )
    for name, all_of in seconds.items():
        least = min(all_of)
        ratio = least / min(seconds["anew"])
        print(f"{name:8} {least:8.3f} s of processor time   {ratio:6.3f} of anew")


if __name__ == "__main__":
    main()
