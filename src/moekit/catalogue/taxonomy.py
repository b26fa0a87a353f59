"""Where a method stands in the field (axes), and what it promises (traits).

A trait is a promise that a law holds: `tests/laws` chooses the methods it tries by their traits, so a trait too many or
too few fails a test. Some follow from a method's class, whose base says which (`implied_traits`); others are declared.
"""

from __future__ import annotations

from typing import Literal

Axis = Literal["gating", "experts", "training scheme", "computation", "communication", "storage", "compression"]

AXES: dict[Axis, str] = {
    "gating": "which experts a token goes to, and what keeps that balanced",
    "experts": "what an expert is: its kind of network, its size, shared ones",
    "training scheme": "how a model is trained or made: dense to sparse and back, merging of trained models",
    "computation": "which device holds which expert, and the kernels that compute them",
    "communication": "how tokens travel between devices",
    "storage": "where weights lie until they are needed",
    "compression": "fewer or smaller experts than were trained",
}
"""Axes of "A Survey on Mixture of Experts" (arXiv:2407.06204), and compression, which it leaves to other surveys."""

Trait = Literal[
    "variable_k",
    "learnable",
    "stateful",
    "attention",
    "sequence",
    "rewrites",
    "narrows",
    "grows",
    "stochastic",
    "stock",
]

TRAITS: dict[Trait, str] = {
    "variable_k": "tokens may get different numbers of experts; without it all get as many",
    "learnable": "learns tensors of its own: optimizers move them, checkpoints keep them",
    "stateful": "hands something from layer to layer within a forward pass",
    "attention": "looks at what the layer's attention looked at, whatever kernel computes it",
    "sequence": "a token's experts depend on earlier tokens of its sequence; without it on the token alone",
    "rewrites": "changes weights of experts that stay; without it they stay bit for bit",
    "narrows": "the result has fewer expert weights; without it (or `grows`) as many as before",
    "grows": "the result has more expert weights",
    "stochastic": "draws at random: equal seeds give equal results; without it the seed changes nothing",
    "stock": "stock transformers computes the result without moekit",
}
"""What each trait promises."""

DECLARED: tuple[Trait, ...] = ("variable_k", "stateful", "attention", "sequence", "grows", "stochastic")
"""Traits that a method declares; a class or `stock` says the others already."""
