"""Bytes of a layer under each recipe: what the writer will store, told by the layout of the output itself.

Bytes of the routed experts and of whatever counts them (router rows, selection biases) are the layer's; attention,
shared experts, dense layers, embeddings and the headers of the files are constants.

Legend: E experts, H hidden, I expert width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from moekit.anatomy.probe import Geometry
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.names import config_top_k
from moekit.checkpoint.precision import stored_dtype
from moekit.compress.engine.layout import OutputLayout, prepare
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.joint.profiles import Profile
from moekit.compress.joint.recipe import AS_IT_IS, LayerRecipe
from moekit.errors import BadConfig, UnsupportedModel


class RecipeSize(NamedTuple):
    """What a recipe leaves of a layer.

    Attributes:
        stored: bytes of the layer in the folder that is written.
        first: weights of its experts' gate and up projections.
        down: weights of their down projections.
        hidden: inputs of the former.
        width: inputs of the latter.
        matrices: of all experts.
    """

    stored: int
    first: int
    down: int
    hidden: int
    width: int
    matrices: int

    @property
    def weights(self) -> int:
        """Weights that rounding would touch."""
        return self.first + self.down


class ModelSizes:
    """Bytes of a model under any recipes; it is laid out once for each number of experts and width, no weight is read.

    Args:
        checkpoint: the source, not quantized.
        geometries: decoder layer -> sizes as they are.
        group: weights that share a scale where rounded.

    Attributes:
        constant: bytes of all that belongs to no routed expert, headers of the files with them.
        refused: recipes that this family cannot hold, and why.
    """

    def __init__(self, checkpoint: Checkpoint, geometries: Mapping[int, Geometry], group: int) -> None:
        stored = stored_dtype(checkpoint.config, checkpoint.tensors)
        self.geometries = dict(geometries)
        self.group = group
        self.refused: dict[LayerRecipe, str] = {}
        self._checkpoint = checkpoint
        self._itemsize = 4 if stored is None else stored.itemsize
        self._layers: dict[tuple[int, int], dict[int, int]] = {}
        work = prepare(checkpoint, self._uniform(self.experts, 0))
        self.constant = sum(shard.nbytes for shard in work.shards) - sum(self._take(work, self.experts, 0).values())

    @property
    def experts(self) -> int:
        """Experts of the largest layer."""
        return max(geometry.experts for geometry in self.geometries.values())

    @property
    def width(self) -> int:
        """Neurons of an expert; 0 where layers differ, which no config could narrow to one width."""
        found = {geometry.width for geometry in self.geometries.values()}
        return found.pop() if len(found) == 1 else 0

    @property
    def top_k(self) -> int:
        """Choices a token makes, which is the fewest experts that a layer can keep."""
        return config_top_k(self._checkpoint.config) or max(g.top_k for g in self.geometries.values()) or 1

    def holds(self, recipe: LayerRecipe) -> bool:
        """Whether this family's config and files can hold the recipe in all layers."""
        if recipe in self.refused:
            return False
        try:
            self._laid_out(recipe)
        except (BadConfig, UnsupportedModel) as error:
            self.refused[recipe] = error.message
            return False
        return True

    def of(self, recipe: LayerRecipe, layer: int) -> RecipeSize:
        """What a recipe leaves of a layer.

        Raises:
            BadConfig, UnsupportedModel: the family cannot hold it.
        """
        geometry = self.geometries[layer]
        experts, width = recipe.experts(geometry.experts), recipe.width or geometry.width
        down = experts * width * geometry.hidden
        return RecipeSize(
            stored=self._laid_out(recipe)[layer],
            first=down * (1 + geometry.has_gate),
            down=down,
            hidden=geometry.hidden,
            width=width,
            matrices=experts * (2 + geometry.has_gate),
        )

    def counted(self, size: RecipeSize, bits: int | None, profile: Profile) -> int:
        """Bytes that a budget counts: packed ones where the engine's files hold so many bits, else those of the folder.

        Args:
            size: of the recipe.
            bits: of the recipe.
            profile: of the engine.
        """
        if bits is None or bits not in profile.bits:
            return size.stored
        packed = profile.packed_bytes(size.first, bits, self.group or size.hidden)
        packed += profile.packed_bytes(size.down, bits, self.group or size.width)
        return size.stored - size.weights * self._itemsize + packed + profile.header_bytes(size.matrices)

    def total(self, recipe: LayerRecipe, profile: Profile) -> int:
        """Bytes that a budget counts of the whole model with one recipe in all layers."""
        fitted = {layer: recipe.fitted(g.experts, g.width) for layer, g in self.geometries.items()}
        return self.constant + sum(self.counted(self.of(r, n), r.bits, profile) for n, r in fitted.items())

    def full(self) -> int:
        """Bytes of the model as it is written unchanged."""
        return self.constant + sum(self._laid_out(AS_IT_IS).values())

    def _laid_out(self, recipe: LayerRecipe) -> dict[int, int]:
        key = recipe.keep or self.experts, recipe.width or 0
        if key not in self._layers:
            self._take(prepare(self._checkpoint, self._uniform(*key)), *key)
        return self._layers[key]

    def _take(self, work: OutputLayout, experts: int, width: int) -> dict[int, int]:
        found = self._layers[experts, width] = dict.fromkeys(self.geometries, 0)
        for tensor in work.kept:
            if tensor.layer is not None:
                found[tensor.layer] += tensor.spec.nbytes
        return found

    def _uniform(self, experts: int, width: int) -> dict[int, LayerOutcome]:
        return {
            layer: LayerOutcome(keep=tuple(range(min(experts, geometry.experts))), width=width or None)
            for layer, geometry in self.geometries.items()
        }
