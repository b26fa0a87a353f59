"""What an engine loads: which sizes must agree between layers, and how many bytes a rounded weight takes in its files.

Legend: H hidden, I expert width.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from moekit.compress.budget.bits import packed_bits
from moekit.errors import BadConfig

ProfileName = Literal["stock", "vllm", "llama.cpp", "moekit"]

# Bits of a weight in llama.cpp's plain blocks of 32 weights with one scale: Q4_0, Q5_0 and Q8_0. Its super-blocks round
# by rules of their own, so that what was measured here would not be what they compute.
_BLOCK = 32
# Bytes of a header for one tensor: its name, twice as long as most, type, shape and place.
_NAME = 160
_BLOCK_BITS = {4: Fraction(18 * 8, 32), 5: Fraction(22 * 8, 32), 8: Fraction(34 * 8, 32)}


@dataclass(frozen=True)
class Profile:
    """What one engine holds.

    Attributes:
        name: of the engine.
        even: whether all layers keep equally many experts.
        bits: widths of weights that its packed files hold; none where rounding saves no bytes.
        packed: form of its packed files, for messages; "" where the folder is what the engine loads.
        names: tensors that stand for one rounded matrix there; 0 where a layer's experts are one tensor.
    """

    name: ProfileName
    even: bool = True
    bits: tuple[int, ...] = ()
    packed: str = ""
    names: int = 0

    def bits_of(self, hidden: int, width: int) -> tuple[int, ...]:
        """Widths of weights that experts of this size can have, descending.

        Args:
            hidden: H.
            width: narrowest I on the menu.
        """
        if self.name != "llama.cpp":
            return self.bits
        return self.bits if hidden % _BLOCK == width % _BLOCK == 0 else ()

    def holds_group(self, group: int) -> bool:
        """Whether its packed files hold scales of groups of so many weights; 0 is one of a whole row."""
        return self.name != "llama.cpp" or group % _BLOCK == 0

    def header_bytes(self, matrices: int) -> int:
        """Bytes, at most, by which names and shapes of so many rounded matrices make the headers of files longer."""
        return matrices * self.names * _NAME

    def packed_bytes(self, weights: int, bits: int, group: int) -> int:
        """Bytes of so many weights on symmetric grids in this engine's files, scales with them.

        Args:
            weights: how many.
            bits: of each.
            group: weights that share a scale, where the format lets that be chosen.
        """
        if self.name == "llama.cpp":
            return -(-weights * _BLOCK_BITS[bits] // 8)
        return -(-packed_bits(weights, bits, group, symmetric=True) // 8)


PROFILES: dict[ProfileName, Profile] = {
    "stock": Profile("stock"),
    "vllm": Profile("vllm", bits=(8, 4), packed="compressed-tensors", names=3),
    "llama.cpp": Profile("llama.cpp", bits=(8, 5, 4), packed="GGUF"),
    "moekit": Profile("moekit", even=False, bits=(8, 7, 6, 5, 4, 3, 2), packed="moekit's packed form", names=2),
}


def profile_of(name: str) -> Profile:
    """The profile of this name.

    Raises:
        BadConfig: there is none.
    """
    found = next((profile for profile in PROFILES.values() if profile.name == name), None)
    if found is None:
        raise BadConfig(f"there is no engine {name!r}", hint=f"choose {', '.join(PROFILES)}")
    return found
