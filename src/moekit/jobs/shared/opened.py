"""The model that a step makes smaller, opened; no weight has been read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moekit.anatomy.probe import Geometry, find_moe_layers
from moekit.checkpoint import Checkpoint
from moekit.checkpoint.expected import verify
from moekit.checkpoint.names import text_config
from moekit.checkpoint.quantized.weights import quantized_weights
from moekit.checkpoint.skeleton import empty_model
from moekit.compress.engine.measuring import geometries_of
from moekit.data import Document, vocabulary
from moekit.data.pictures import PictureReader
from moekit.errors import UnsupportedModel
from moekit.jobs.shared.inputs import load_tokenizer, model_location
from moekit.jobs.shared.pictures import picture_reader
from moekit.jobs.shared.rehearsal import refuse_broken
from moekit.runtime.watching import refuse_unseen


@dataclass(frozen=True)
class OpenedModel:
    """A model that is to be pruned, opened and verified; no weight has been read.

    Attributes:
        checkpoint: the folder.
        geometries: decoder layer -> sizes of its MoE block.
        parent: what the record of the result names.
    """

    checkpoint: Checkpoint
    geometries: dict[int, Geometry]
    parent: str

    @property
    def location(self) -> str:
        """Where the tokenizer lies."""
        return str(self.checkpoint.path)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return int(self.checkpoint.nbytes)

    def tokenizer(self) -> Any:
        """Its tokenizer.

        Raises:
            BadCheckpoint: it cannot be loaded.
            BadConfig: it has ids that the model does not embed.
        """
        tokenizer = load_tokenizer(self.location)
        vocabulary.check(tokenizer, int(text_config(self.checkpoint.config).get("vocab_size") or 0))
        return tokenizer

    def pictures(self, documents: Sequence[Document]) -> PictureReader | None:
        """What reads the pictures of a text; see `picture_reader`."""
        return picture_reader(documents, self.location, self.checkpoint.config, lambda: empty_model(self.checkpoint))

    @property
    def longest(self) -> int:
        """Positions the model knows; a large number where it does not say."""
        known = text_config(self.checkpoint.config).get("max_position_embeddings")
        return known if isinstance(known, int) and known > 1 else 1 << 20


def open_source(reference: str, progress: Any = None) -> OpenedModel:
    """Open a model and find its MoE layers.

    Raises:
        BadCheckpoint: damaged, or not what its config says.
        UnsupportedModel: no Mixture of Experts.
    """
    location = model_location(reference, progress)
    local = Path(location).expanduser()
    # Plans and records name it: they are read from other working folders too.
    parent = str(local.resolve()) if local.is_dir() else location
    checkpoint = Checkpoint.open(parent)
    verify(checkpoint)
    return OpenedModel(checkpoint, geometries_of(checkpoint), parent)


def check_runnable(
    source: OpenedModel, hint: str = "prove the same plan on the unquantized model, and say --no-proof here"
) -> None:
    """Refuse what runs layers where they cannot be run.

    Args:
        source: the model.
        hint: the way out.

    Raises:
        UnsupportedModel: the weights are quantized in a way that is not read as floats here; or nothing tells what
            tokens choose, or the installed transformers runs other experts than these, or breaks off.
    """
    refuse_broken(source.checkpoint.config)
    for layer in find_moe_layers(empty_model(source.checkpoint)):
        refuse_unseen(layer, source.checkpoint.path)
    try:
        quantized_weights(source.checkpoint)
    except UnsupportedModel as error:
        raise UnsupportedModel(
            f"{error.message}, and layers have to be run",
            file=error.file,
            hint=hint,
        ) from error
