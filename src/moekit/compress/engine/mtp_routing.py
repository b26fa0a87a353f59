"""What the routers of multi-token-prediction layers choose on a text: which of their experts stay is decided by it.

No trace holds these layers, so they are run here. A layer is given, at each position t, the state that the unchanged
decoder ends with (behind its final norm, as inference engines hand it on) and the embedding of token t + 1, each behind
a norm of its own, side by side through one projection (arXiv:2412.19437, equation 21); then it is a decoder layer like
any other, attention included. A second layer is given the first one's output and token t + 2, and so on. Two things
differ from what such a head meets when it guesses: the next tokens are the text's, not the model's own, and the decoder
below is the one before pruning.

Legend: B rows, S positions, H hidden, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moekit.checkpoint.experts import mtp_tensors
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.meta import model_config
from moekit.checkpoint.quantized.weights import WeightReader
from moekit.compress.engine.mtp import MtpBlock, longer_config, mtp_blocks
from moekit.errors import BadCheckpoint, BadData, UnsupportedModel
from moekit.streaming.passes import Passes
from moekit.streaming.states import States
from moekit.streaming.walk import Inputs, layer_of
from moekit.trace.streamed import Streamed

# Norm of the embedding, norm of the state, projection of both: of DeepSeek-V3 and GLM-4.5, and of Qwen3-Next.
_MIXING = (
    ("enorm.weight", "hnorm.weight", "eh_proj.weight"),
    ("pre_fc_norm_embedding.weight", "pre_fc_norm_hidden.weight", "fc.weight"),
)
_DROP = "leave these layers out (--mtp drop)"


def mtp_scores(streamed: Streamed, last: Passes) -> dict[str, tuple[float, ...]]:
    """How much each expert of each multi-token-prediction layer is used: the sum of its gate weights, [E].

    Args:
        streamed: the text, having passed through all decoder layers.
        last: the passes behind the last one.

    Returns:
        Beginning of a layer's names ("model.layers.61.") -> scores.

    Raises:
        UnsupportedModel: nothing says how such a layer mixes state and embedding, or transformers builds no decoder
            layer out of its tensors.
        BadData: no row of the text is long enough.
    """
    blocks, rows, found = mtp_blocks(streamed.checkpoint), streamed.walk.batches, {}
    states: Passes | States = last
    like, mixers = last.answer(0), [_mixing(streamed.checkpoint, block) for block in blocks]
    for depth, (block, names) in enumerate(zip(blocks, mixers, strict=True)):
        with _Ahead(streamed, blocks, rows, states, like) as ahead:
            ahead.mix(names, behind_decoder=depth == 0)
            found[block.prefix] = tuple(ahead.route(block).double().tolist())
            rows, states = ahead.run.walk.batches, ahead.states
    return found


class _Ahead:
    """A text on its way through one multi-token-prediction layer, each state beside the token that follows.

    Args:
        streamed: the text behind the decoder.
        blocks: all such layers of the checkpoint.
        rows: the text, as the states stand for it.
        below: the states that the layer stands on.
        like: what a decoder layer answers.

    Attributes:
        run: a decoder that goes on through the layers, on the text without each row's first token.
        states: of that text; what the layer is given, then what it gives.
    """

    def __init__(
        self,
        streamed: Streamed,
        blocks: Sequence[MtpBlock],
        rows: Sequence[Inputs],
        below: Passes | States,
        like: Any,
    ) -> None:
        self._loader = streamed.loader
        self._like = like
        self._below = below
        self._numbers = [n for n, row in enumerate(rows) if bool(row.attention_mask[:, 1:].any())]
        if not self._numbers:
            raise BadData(
                "no row of the text holds a token to look ahead to", hint="give longer documents, or " + _DROP
            )
        self.run = Streamed(
            _longer(streamed.checkpoint, blocks),
            [_without_first(rows[number]) for number in self._numbers],
            statistics=("load", "gate_mass"),
            dtype=streamed.loader.dtype,
            device=str(streamed.loader.device),
            config=longer_config(model_config(streamed.checkpoint), blocks),
        )
        self.states = self.run.walk.new_states("ahead")

    def __enter__(self) -> _Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self.run.loader.close()

    @torch.no_grad()
    def mix(self, names: Sequence[str], *, behind_decoder: bool) -> None:
        """Bring each state and the embedding of the token that follows together.

        Args:
            names: of the embedding's norm, the state's norm and the projection.
            behind_decoder: whether the states still have the decoder's final norm before them.
        """
        loader = self._loader
        with WeightReader(loader.checkpoint, loader.dtype) as reader:
            ahead, state, projection_HX = (
                reader.weight(name).to(device=loader.device, dtype=loader.dtype) for name in names
            )
        loader.load_rest()
        try:
            final, embed = _final_norm(loader.decoder), loader.model.get_input_embeddings()
            norms = [_with_weight(final, weight_H) for weight_H in (ahead, state)]
            for number, before in enumerate(self._numbers):
                given_BSH = self._below.get(before)[:, :-1].to(loader.device)
                given_BSH = final(given_BSH) if behind_decoder else given_BSH
                next_BSH = embed(self.run.walk.batches[number].input_ids.to(loader.device))
                both = torch.cat([norms[0](next_BSH), norms[1](given_BSH)], dim=-1)
                self.states.put(number, both @ projection_HX.T)
        finally:
            loader.release_rest()

    @torch.no_grad()
    def route(self, block: MtpBlock) -> Tensor:
        """Let the text pass through the layer, and count the gate weights of each expert, [E]."""
        run = self.run
        try:
            run.loader.load(block.layer)
        except BadCheckpoint as error:
            raise UnsupportedModel(
                f"{block.prefix}* is no decoder layer of this family: {error.message}",
                file=run.checkpoint.path,
                layer=block.layer,
                hint=_DROP,
            ) from error
        with run.recording(layer_of(run.loader, block.layer)) as layer:
            for number, current in enumerate(run.passes):
                layer.hook.begin(current)
                made_BSH = run.walk.alone(block.layer, number, self.states.get(number), self._like)
                self.states.put(number, made_BSH)
                layer.take(current, run.domains)
        run.loader.release(block.layer)
        return layer.accumulator.record(run.domains).statistics["gate_mass"]


def _without_first(row: Inputs) -> dict[str, Tensor]:
    return {"input_ids": row.input_ids[:, 1:], "attention_mask": row.attention_mask[:, 1:]}


def _mixing(checkpoint: Checkpoint, block: MtpBlock) -> tuple[str, ...]:
    """Names of the tensors that bring state and embedding together."""
    stack = block.prefix.partition("layers.")[0]
    for known in _MIXING:
        for place in (block.prefix, stack):
            names = tuple(place + name for name in known)
            if all(name in checkpoint.tensors for name in names):
                return names
    raise UnsupportedModel(
        f"nothing known says how {block.prefix}* mixes a state with the token that follows (looked for "
        f"{' and '.join(known[-1] for known in _MIXING)})",
        file=checkpoint.path,
        layer=block.layer,
        hint=_DROP,
    )


def _longer(checkpoint: Checkpoint, blocks: Sequence[MtpBlock]) -> Checkpoint:
    """The checkpoint whose decoder goes on through these layers."""
    tensors = {}
    beyond = mtp_tensors(checkpoint)
    for name, info in checkpoint.tensors.items():
        block = next((block for block in blocks if name.startswith(block.prefix)), None)
        if block is not None:
            info = block.as_decoder(info)
        if block is not None or name not in beyond:
            tensors[info.name] = info
    return Checkpoint(checkpoint.path, checkpoint.config, tensors, None, checkpoint.remote_code)


def _final_norm(decoder: nn.Module) -> nn.Module:
    norm = getattr(decoder, "norm", None)
    if not isinstance(norm, nn.Module):
        raise UnsupportedModel(f"{type(decoder).__name__} has no final norm that is called so", hint=_DROP)
    return norm


def _with_weight(norm: nn.Module, weight_H: Tensor) -> nn.Module:
    """A norm of the same kind with another weight."""
    made = copy.deepcopy(norm)
    made.weight = nn.Parameter(weight_H, requires_grad=False)
    return made
