"""Give one decoder layer of an empty model its weights, and take them away again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from moekit._device import resolve_device
from moekit.checkpoint.decoder import besides_text, decoder_of, stack_of, stacks_of
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.layout import layout_of
from moekit.checkpoint.model import quiet_transformers
from moekit.checkpoint.names import in_mtp_stack
from moekit.checkpoint.precision import reading_dtype, unquantized_dtype
from moekit.checkpoint.quantized.weights import WeightReader
from moekit.checkpoint.skeleton import empty_model
from moekit.checkpoint.tying import tie
from moekit.checkpoint.uneven import fill
from moekit.errors import BadCheckpoint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class LayerLoader:
    """Loads decoder layers of a checkpoint one at a time, through transformers' own weight conversion.

    Quantized weights are loaded as floats, into the family's plain modules.

    Args:
        checkpoint: opened and verified.
        dtype: of the weights in memory; None as stored, or float32 where the device would only emulate that.
        device: where layers go; "auto" is a GPU if there is one.
        config: of the model, where it is not the checkpoint's own: class and numbers of experts are the checkpoint's.

    Attributes:
        stored: type in which the weights lie on disk; of quantized ones, that of those that are not.
        dtype: type in which they are in memory.
        device: where layers go.
        model: the model; parameters that are not loaded lie on the meta device.
        layers: number of decoder layers; an encoder's are numbered before them.
        begins: numbers of the layers that stacks begin with.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "auto",
        config: PreTrainedConfig | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = resolve_device(device)
        self.stored = unquantized_dtype(checkpoint.config, checkpoint.tensors) or torch.float32
        wanted = reading_dtype(checkpoint, dtype, self.device)
        self.model = empty_model(checkpoint, wanted, config=config)
        self.dtype: torch.dtype = wanted or self.model.config.dtype or torch.float32
        self.decoder = decoder_of(self.model)
        self._stacks = stacks_of(self.model)
        self.layers = sum(stack.layers for stack in self._stacks)
        self.begins = tuple(stack.first for stack in self._stacks)
        self._with_rest: set[int] = set()
        self._reader = WeightReader(checkpoint, self.dtype)
        self._layout = layout_of(self.model)
        self._aside = besides_text(self.model)
        self._names: dict[int | None, list[str]] = {}
        self._towers: list[str] = []
        for name in checkpoint.tensors:
            if in_mtp_stack(name):
                continue
            if self._is_aside(self._layout.live_name(name)):
                self._towers.append(name)
            else:
                self._names.setdefault(self._layout.layer(name), []).append(name)
        # Of towers, too: what is computed and in no checkpoint would stay where it was made when their weights come.
        within = {id(module) for index in range(self.layers) for module in self.layer(index).modules()}
        for module in (m for m in self.model.modules() if id(m) not in within):
            for name, buffer in list(module.named_buffers(recurse=False)):
                if not buffer.is_meta:
                    _set(module, name, buffer.to(self.device))

    def layer(self, index: int) -> nn.Module:
        """A decoder layer, with or without weights."""
        stack = next(stack for stack in reversed(self._stacks) if stack.first <= index)
        return stack_of(stack.owner)[index - stack.first]

    def _is_aside(self, name: str) -> bool:
        """Whether a live tensor belongs to what stands beside the language model."""
        return any(name.startswith(prefix) for prefix in self._aside)

    def names(self, index: int | None) -> list[str]:
        """Names on disk of a decoder layer's tensors; None for those of no layer, without those of towers."""
        return self._names.get(index, [])

    def nbytes(self, index: int) -> int:
        """Bytes of a decoder layer on disk."""
        return sum(self.checkpoint.tensors[name].nbytes for name in self.names(index))

    def load(self, index: int) -> nn.Module:
        """Load a decoder layer; it stays until it is released.

        With an encoder's last layer comes what stands between it and the decoder's first: its norm, the embedding.

        Raises:
            BadCheckpoint: tensors are missing or of a wrong shape.
        """
        layer = self.layer(index)
        if index + 1 in self.begins and not self._holds_rest():
            self.load_rest()
            self._with_rest.add(index)
        self._fill(self.names(index))
        for name, buffer in list(layer.named_buffers()):
            _set(layer, name, buffer.to(self.device))
        empty = [name for name, tensor in layer.state_dict().items() if tensor.is_meta]
        if empty:
            raise BadCheckpoint(
                f"{len(empty)} tensors of this layer did not get weights: {', '.join(empty[:8])}",
                file=self.checkpoint.path,
                layer=index,
                hint="see `moekit check`",
            )
        return layer

    def release(self, index: int) -> None:
        """Forget a decoder layer's weights, and what came with them."""
        layer = self.layer(index)
        if index in self._with_rest:
            self._with_rest.remove(index)
            self.release_rest()
        for name, parameter in list(layer.named_parameters()):
            empty = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
            _set(layer, name, empty)

    @contextlib.contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """A decoder layer, for as long as it is needed."""
        try:
            yield self.load(index)
        finally:
            self.release(index)

    def load_rest(self, *, towers: bool = False) -> None:
        """Load what text needs beside decoder layers: embedding, final norm, head (tied or not).

        Args:
            towers: load what stands beside the language model, too: vision and audio towers, projectors.
        """
        self._fill([*self.names(None), *(self._towers if towers else ())])
        tie(self.model)

    def release_rest(self) -> None:
        """Forget what is of no decoder layer: embedding, final norm, head, towers."""
        # A tied head is named too: forgetting the embedding alone would leave it in memory.
        for name, parameter in list(self.model.named_parameters(remove_duplicate=False)):
            if self._layout.layer(name) is None and not parameter.is_meta:
                _set(self.model, name, nn.Parameter(parameter.detach().to("meta"), requires_grad=False))

    def _holds_rest(self) -> bool:
        embedding: nn.Module = self.model.get_input_embeddings()
        return not any(parameter.is_meta for parameter in embedding.parameters())

    def _fill(self, names: Iterable[str]) -> None:
        tensors = {name: self._reader.weight(name) for name in self._reader.plain_names(names)}
        with quiet_transformers():
            fill(self.model, tensors, dtype=self.dtype, device=self.device, file=self.checkpoint.path)
        for parameter in self.model.parameters():
            if not parameter.is_meta and parameter.requires_grad:
                parameter.requires_grad_(False)

    def close(self) -> None:
        """Close the checkpoint's files."""
        self._reader.close()


def _set(root: nn.Module, name: str, tensor: torch.Tensor | nn.Parameter) -> None:
    """Put a tensor in place of a parameter or buffer, by its path."""
    path, _, last = name.rpartition(".")
    module = root.get_submodule(path) if path else root
    if last in module._parameters:
        module._parameters[last] = tensor  # type: ignore[assignment]
    else:
        module._buffers[last] = tensor
