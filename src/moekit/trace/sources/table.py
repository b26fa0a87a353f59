"""What statistics may look at, and what looking costs.

A statistic names its sources; the recorder fetches exactly those. Routed tokens (choices, weights, logits, inputs,
outputs) cost little. The others are open to any method, and each one's price is stated here, so that it can be printed
before a pass begins.

Besides the names in `SOURCES`, `module:PATH` is a source: input and output of the module at PATH below each decoder
layer, as in `module:self_attn` or `module:mlp.down_proj`. It works on dense models too.

Legend: E experts, K choices a token, H hidden, I expert width, S positions of a sequence, N tokens of a pass.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from moekit.errors import BadConfig

# Input and output of a module of the decoder layer, by its path below the layer.
MODULE = "module:"
# Outputs of all experts are held for so many bytes of tokens at a time.
CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class SourceSizes:
    """What the price of a source depends on.

    Attributes:
        layers: layers that are recorded.
        experts: E.
        top_k: K.
        hidden: H.
        width: I.
        heads: query heads.
        head_dim: width of one.
        tokens: N, of one forward pass.
        positions: S.
        matrices: of one expert, 3 with a gate projection.
        itemsize: bytes of one value in the model's type.
    """

    layers: int
    experts: int
    top_k: int
    hidden: int
    width: int
    heads: int = 1
    head_dim: int = 1
    tokens: int = 2048
    positions: int = 512
    matrices: int = 3
    itemsize: int = 4

    @property
    def expert_flops(self) -> int:
        """Of one expert on one token."""
        return 2 * self.matrices * self.hidden * self.width


@dataclass(frozen=True)
class Cost:
    """What looking at a source costs beyond the forward pass.

    Attributes:
        flops: a token, all recorded layers together.
        memory: bytes at the worst moment.
        passes: whole passes over the text that are added, a backward pass counting as one.
    """

    flops: float = 0.0
    memory: float = 0.0
    passes: int = 0


@dataclass(frozen=True)
class StatisticSource:
    """One thing that statistics may look at.

    Attributes:
        name: what statistics call it.
        shows: what it shows, one sentence.
        cost: its price.
        routed: whether there must be experts.
        live: why the model must be in memory as a whole; "" where layers may be streamed one at a time.
    """

    name: str
    shows: str
    cost: Callable[[SourceSizes], Cost] = field(default=lambda sizes: Cost())
    routed: bool = True
    live: str = ""


def _rows(count: int) -> Callable[[SourceSizes], Cost]:
    return lambda sizes: Cost(memory=count * sizes.tokens * sizes.hidden * sizes.itemsize)


def _chosen(sizes: SourceSizes) -> Cost:
    return Cost(flops=sizes.layers * sizes.top_k * sizes.expert_flops)


def _all(sizes: SourceSizes) -> Cost:
    memory = min(CHUNK_BYTES, sizes.tokens * sizes.experts * sizes.hidden * 4)
    return Cost(flops=sizes.layers * sizes.experts * sizes.expert_flops, memory=memory)


def _attention(sizes: SourceSizes) -> Cost:
    scores = 2 * sizes.heads * sizes.head_dim * sizes.positions
    # Queries and keys of a pass, and the probabilities of one sequence.
    memory = 2 * sizes.tokens * sizes.heads * sizes.head_dim * sizes.itemsize + sizes.heads * sizes.positions**2 * 4
    return Cost(flops=sizes.layers * scores, memory=memory)


def _gradients(sizes: SourceSizes) -> Cost:
    # What a layer keeps for its backward pass: its inputs, attention's three and the experts' inner values.
    kept = sizes.tokens * (6 * sizes.hidden + 3 * sizes.top_k * sizes.width) * sizes.itemsize
    return Cost(flops=2 * sizes.layers * sizes.top_k * sizes.expert_flops, memory=sizes.layers * kept, passes=1)


_BACKWARD = "a gradient comes down through all layers above at once, and streaming has only one of them in memory"

SOURCES: dict[str, StatisticSource] = {
    source.name: source
    for source in (
        StatisticSource("choices", "which experts each token chose"),
        StatisticSource("weights", "gate weights of the choices"),
        StatisticSource("logits", "router logits of all experts"),
        StatisticSource("inputs", "what the experts are given"),
        StatisticSource("inner", "inputs of the chosen experts' down projections", _chosen),
        StatisticSource("outputs", "outputs of the chosen experts before gating", _chosen),
        StatisticSource("all_outputs", "outputs of all experts on every token, a few tokens at a time", _all),
        StatisticSource("residual", "residual stream before the block, and what the routed experts add", _rows(2)),
        StatisticSource("shared", "output of the shared experts", _rows(1)),
        StatisticSource("stream", "residual stream after the decoder layer", _rows(1), routed=False),
        StatisticSource(
            "block_io", "input and output of the feed-forward block and of the decoder layer", _rows(4), routed=False
        ),
        StatisticSource(
            "attention", "queries, keys, and how much attention each token is paid", _attention, routed=False
        ),
        StatisticSource(
            "gradients",
            "gradients of the loss with respect to the chosen experts' activations",
            _gradients,
            live=_BACKWARD,
        ),
        StatisticSource(
            "weight_gradients",
            "gradients of the loss with respect to one expert's weights at a time",
            _gradients,
            live=_BACKWARD,
        ),
        StatisticSource(
            "stream_gradients", "gradients of the loss after block and layer", _gradients, routed=False, live=_BACKWARD
        ),
    )
}


def source_of(name: str) -> StatisticSource:
    """Look a source up.

    Raises:
        BadConfig: no such source; the message names near matches.
    """
    if name.startswith(MODULE) and len(name) > len(MODULE):
        return StatisticSource(
            name, f"input and output of {name.removeprefix(MODULE)} in each decoder layer", _rows(2), routed=False
        )
    if name in SOURCES:
        return SOURCES[name]
    near = difflib.get_close_matches(name, SOURCES, n=3)
    raise BadConfig(
        f"no source of statistics is called {name!r}",
        hint=f"did you mean {' or '.join(map(repr, near))}?"
        if near
        else f"there are: {', '.join(SOURCES)}, module:PATH",
    )


def refuse_streaming(names: Iterable[str]) -> str | None:
    """Why statistics of these sources cannot be taken layer by layer; None if they can."""
    return next((source.live for source in map(source_of, sorted(set(names))) if source.live), None)


def bill(names: Iterable[str], sizes: SourceSizes) -> Cost:
    """What looking at some sources costs together: experts that run once more run once for all of them."""
    costs = [source_of(name).cost(sizes) for name in sorted(set(names))]
    return Cost(
        flops=max((cost.flops for cost in costs), default=0.0),
        memory=sum(cost.memory for cost in costs),
        passes=max((cost.passes for cost in costs), default=0),
    )
