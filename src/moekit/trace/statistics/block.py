"""How much a layer, its block and its attention change what passes through them; dense layers too.

Legend: N tokens, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moekit.trace.batch import TokenBatch, accumulate
from moekit.trace.vocabulary import statistic


def _cosine(first_NH: Tensor, second_NH: Tensor) -> Tensor:
    return accumulate(torch.nn.functional.cosine_similarity(first_NH, second_NH, dim=-1))


@statistic(shape="", sources=("block_io",))
def layer_cosine(seen: TokenBatch) -> Tensor:
    """Sum over tokens of the cosine between the residual stream before and after the decoder layer."""
    return _cosine(seen.layer_input_NH, seen.stream_NH)


@statistic(shape="", sources=("block_io",))
def block_cosine(seen: TokenBatch) -> Tensor:
    """Sum over tokens of the cosine between what the feed-forward block is given (normed) and what it gives."""
    return _cosine(seen.block_input_NH, seen.block_output_NH)


@statistic(shape="", sources=("block_io",))
def block_residual_cosine(seen: TokenBatch) -> Tensor:
    """Sum over tokens of the cosine between the residual stream after the layer and the same without the block's part.

    Only where the block is added to the stream as it is (no scale, no norm after it).
    """
    return _cosine(seen.stream_NH - seen.block_output_NH, seen.stream_NH)


@statistic(shape="", sources=("block_io",))
def block_output_norm(seen: TokenBatch) -> Tensor:
    """Sum over tokens of the norm of the feed-forward block's output."""
    return accumulate(torch.linalg.vector_norm(seen.block_output_NH, dim=-1))


@statistic(shape="", sources=("module:self_attn", "block_io"))
def attention_cosine(seen: TokenBatch) -> Tensor:
    """Sum over tokens of the cosine between the residual stream before the layer and with attention's part added."""
    _, made_NH = seen.module("self_attn")
    return _cosine(seen.layer_input_NH, seen.layer_input_NH + made_NH)


@statistic(shape="I", sources=("module:mlp.down_proj",))
def neuron_magnitude(seen: TokenBatch) -> Tensor:
    """Sum over tokens of |h_j|, h what the down projection of a dense feed-forward network is given, by neuron."""
    given_NI, _ = seen.module("mlp.down_proj")
    return accumulate(given_NI.abs(), 0)
