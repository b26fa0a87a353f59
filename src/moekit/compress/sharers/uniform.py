"""The same bits for every expert: what any other share must beat."""

from __future__ import annotations

from collections.abc import Mapping

from moekit.catalogue import register
from moekit.compress.engine.inputs import LayerInputs
from moekit.compress.engine.sharing import KIND, BitSharer, Room, Shares, WidthErrors
from moekit.errors import BadConfig


@register(name="uniform", kind=KIND, changes="weights", limits=("Whole numbers of bits only.",))
class Uniform(BitSharer):
    """Every expert gets the mean, which must be a whole number; the choices do not matter.

    The same as `--bits`, under the name that other shares of a mean are compared by. Choose it first: any engine that
    knows the width can hold it.
    """

    def share(self, seen: Mapping[int, LayerInputs], errors: Mapping[int, WidthErrors], room: Room) -> Shares:
        """The mean for all.

        Raises:
            BadConfig: it is no whole number.
        """
        if room.mean != int(room.mean):
            raise BadConfig(
                f"a mean of {room.mean:g} bits is not the same whole number for every expert",
                hint="share it by --share pmq, gemq, frequency or others (moekit methods sharer)",
            )
        return {layer: (int(room.mean),) * room.experts[layer] for layer in seen}
