"""Rewrite the experts of one layer and bring them back into the layout that the source has on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moekit._memory import return_freed_memory
from moekit.checkpoint.fingerprint import TORCH_NAMES
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.reading import TensorReader
from moekit.compress.engine.kept import KeptTensor
from moekit.compress.engine.limits import check_made
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.resize import read_block, resized_block, resized_config
from moekit.compress.weights import LayerWeights
from moekit.errors import NumericFault, UnsupportedModel
from moekit.streaming.loader import LayerLoader
from moekit.streaming.walk import Walk

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Layer index, all experts' weights -> weights of what is kept, in the order of the outcome.
Rewrite = Callable[[int, LayerWeights], LayerWeights]


class Rewriter:
    """Reads one layer at a time, has it rewritten, and gives its tensors as the output wants them.

    Args:
        checkpoint: the source, not quantized.
        config: of the output, which may state another number of experts than a layer keeps.
        rewrite: makes the new weights.
        dtype: of the experts on disk, in which layers are read.

    Raises:
        UnsupportedModel: the source is quantized.
    """

    def __init__(self, checkpoint: Checkpoint, config: PreTrainedConfig, rewrite: Rewrite, dtype: torch.dtype) -> None:
        self._loader = LayerLoader(checkpoint, dtype=dtype, device="cpu")
        self._reader = TensorReader(checkpoint)
        self._config = config
        self._rewrite = rewrite

    def close(self) -> None:
        """Close the checkpoint's files."""
        self._loader.close()
        self._reader.close()

    def tensors(
        self, index: int, outcome: LayerOutcome, kept: Sequence[KeptTensor]
    ) -> Iterator[tuple[KeptTensor, Tensor]]:
        """The tensors of a layer that hold or count experts, in the source's layout and dtypes.

        Args:
            index: decoder layer.
            outcome: what it keeps.
            kept: those tensors.

        Raises:
            BadConfig: the rewriting gave another number of experts than the outcome keeps.
            NumericFault: it gave NaN or infinity.
            UnsupportedModel: the source lies in a layout that transformers reads but does not write.
        """
        found = self._on_disk(self._new_state(index, outcome), kept, index)
        for tensor in kept:
            new = found.pop(tensor.name)
            if tuple(new.shape) != tensor.shape:
                raise UnsupportedModel(
                    f"{tensor.name} would be {list(new.shape)} instead of {list(tensor.shape)}",
                    layer=index,
                    hint="a method that changes the width of experts must say so in its outcome (width)",
                )
            _refuse_non_finite(new, tensor)
            yield tensor, self._exact(new, tensor)
        del new
        return_freed_memory()

    def _new_state(self, index: int, outcome: LayerOutcome) -> dict[str, Tensor]:
        """The rewritten block's tensors by their live names; of the old layer nothing stays in memory."""
        with self._loader.loaded(index):
            layer = Walk(self._loader, []).moe(index)
            if layer is None:
                raise UnsupportedModel("the layer holds no experts that follow the contract", layer=index)
            new = self._rewrite(index, read_block(layer, self._config))
            check_made(new, outcome, layer.geometry.width, index)
            # The new config says already how tokens choose: only the number of experts is the layer's own.
            config = resized_config(self._config, new.experts, groups="equal")
            block = resized_block(layer, config, new, outcome)
            return {f"{layer.name}.{name}": tensor for name, tensor in block.state_dict().items()}

    def _on_disk(self, state: dict[str, Tensor], kept: Sequence[KeptTensor], index: int) -> dict[str, Tensor]:
        found = {k.name: state.pop(k.name) for k in kept if k.name in state and tuple(state[k.name].shape) == k.shape}
        if len(found) < len(kept):
            from transformers.core_model_loading import revert_weight_conversion

            found |= revert_weight_conversion(self._loader.model, state)
        missing = [k.name for k in kept if k.name not in found]
        if missing:
            raise UnsupportedModel(
                f"transformers writes this layer under other names than {missing[0]}",
                file=self._loader.checkpoint.path,
                layer=index,
                hint="load and save the model with transformers once, then prune what it saved",
            )
        return found

    def _exact(self, new: Tensor, kept: KeptTensor) -> Tensor:
        """In the dtype of the source; what was not changed, from the source, as reading may have rounded it."""
        if TORCH_NAMES[str(new.dtype)] == kept.source.dtype:
            return new
        old = self._reader.read(kept.source.name)
        if kept.cut is not None:
            pieces = kept.cut.pieces(old.shape[kept.cut.axis])
            rows = torch.cat([torch.arange(first, last) for first, last in pieces])
            old = old.index_select(kept.cut.axis, rows)
        return old if torch.equal(old.to(new.dtype), new) else new.to(old.dtype)


def _refuse_non_finite(tensor: Tensor, kept: KeptTensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise NumericFault(
            f"rewriting gave NaN or infinity in {kept.name}",
            layer=kept.layer,
            hint="the source's weights may be damaged (see `moekit check`), or the method's settings extreme",
        )
