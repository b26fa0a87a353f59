"""Read what tokens chose where a block does not hand it to its experts.

Most blocks call their experts with hidden states, indices and weights: this is the seam. Four other ways are known,
told by what the router answers:

- *scores*: the router gives a matrix [T, E] that is zero but for the K chosen; experts are given every token times each
  of its scores, [E * T, H] (Llama 4). A weight multiplies what an expert is given, not what it gives.
- *masks*: the router gives a matrix [T, E] that is one for the expert chosen, zero throughout where its capacity is
  used up, and the weight of each token [T, 1] (Switch Transformers).
- *gates*: the router gives a matrix [T, E] that is one for the first choice, and the weights of all experts [T, E],
  zero but for the K chosen, and throughout for what has no place (NLLB). Where experts are given both and run others
  than these, the way is *misread*: nothing that is said of such choices would hold.
- *sorted*: the router gives the tokens sorted by expert, with how many each expert gets (JetMoe).

Legend: T tokens, E experts, K choices a token, H hidden, P = T * K (token, choice) pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moekit.anatomy.asking import contract

# "experts": the contract. "unknown": called in another way. The others: see above.
Seam = Literal["experts", "scores", "masks", "gates", "misread", "sorted", "unknown"]


@dataclass(frozen=True)
class Answered:
    """What a router's answer shows.

    Attributes:
        seam: which way it follows; "experts" where it holds the contract's triple, and more.
        top_k: K.
        scored: what it scores: E, and more where it also scores what is no routed expert.
    """

    seam: Seam
    top_k: int
    scored: int


def read_answer(answer: Any, rows: int, experts: int) -> Answered | None:
    """Which of the other ways a router's answer follows; None for none of them."""
    if not isinstance(answer, tuple):
        return None
    if len(answer) == 2 and all(isinstance(a, Tensor) and tuple(a.shape) == (rows, experts) for a in answer):
        chosen = (answer[0] != 0).sum(1).unique()
        fits = len(chosen) == 1 and 0 < int(chosen[0]) < experts
        return Answered("scores", int(chosen[0]), experts) if fits else None
    if _masks(answer, experts) is not None:
        return Answered("masks", 1, experts)
    if len(answer) >= 3 and (triple := contract(answer[:3], rows)) is not None:
        return Answered("experts", triple[2].shape[1], triple[0].shape[1]) if triple[0].shape[1] >= experts else None
    if (gates_TE := gates_in(answer, experts)) is not None:
        return Answered("gates", int((gates_TE != 0).sum(1).max()), experts)
    found = _sorted_parts(answer, experts)
    return None if found is None or len(found[0]) % rows else Answered("sorted", len(found[0]) // rows, experts)


def only_routed(index_TK: Tensor, weights_TK: Tensor, experts: int) -> Tensor:
    """Choices with E, "no expert", for all that is no routed expert.

    For routers that also score skipping, or copies of the input: such a choice names a number beyond the experts, or
    any expert with weight zero.
    """
    none = torch.full_like(index_TK, experts)
    return torch.where((index_TK >= experts) | (weights_TK == 0), none, index_TK)


def _masks(answer: tuple[Any, ...], experts: int) -> tuple[Tensor, Tensor] | None:
    """(mask [T, E], weight [T, 1]) among what a router gave, sequences laid out behind each other."""
    tensors = [a.reshape(-1, a.shape[-1]) for a in answer if isinstance(a, Tensor) and a.dim() > 1]
    masks = [t for t in tensors if not t.is_floating_point() and t.shape[1] == experts]
    weights = [t for t in tensors if t.is_floating_point() and t.shape[1] == 1]
    if len(masks) != 1 or len(weights) != 1 or len(masks[0]) != len(weights[0]):
        return None
    fits = bool(((masks[0] == 0) | (masks[0] == 1)).all()) and bool((masks[0].sum(1) <= 1).all())
    return (masks[0], weights[0]) if fits else None


def gates_in(answer: tuple[Any, ...], experts: int) -> Tensor | None:
    """Weights of all experts [T, E] among what a router gave, beside a mask of the first choice; None without."""
    rows = [a.reshape(-1, experts) for a in answer if isinstance(a, Tensor) and a.dim() > 1 and a.shape[-1] == experts]
    masks = [t for t in rows if not t.is_floating_point()]
    gates = [t for t in rows if t.is_floating_point() and bool(((t == 0).sum(1) > 0).all()) and bool((t >= 0).all())]
    if len(masks) != 1 or len(gates) != 1 or masks[0].shape != gates[0].shape:
        return None
    mask_TE, gates_TE = masks[0], gates[0]
    fits = bool((mask_TE.sum(1) <= 1).all()) and bool((gates_TE[mask_TE == 1] > 0).all()) and bool(mask_TE.any())
    return gates_TE if fits else None


def _sorted_parts(answer: tuple[Any, ...], experts: int) -> tuple[Tensor, Tensor, Tensor, list[int]] | None:
    """(order [P], token [P], weight [P], size of each expert) among what a router gave."""
    sizes = next((a for a in answer if isinstance(a, list) and len(a) == experts), None)
    flat = [a for a in answer if isinstance(a, Tensor) and a.dim() == 1]
    whole = [a for a in flat if not a.is_floating_point()]
    weights = [a for a in flat if a.is_floating_point()]
    if sizes is None or len(whole) != 2 or len(weights) != 1 or len({len(a) for a in flat}) != 1:
        return None
    return (whole[0], whole[1], weights[0], sizes) if sum(sizes) == len(whole[0]) else None


def read_choices(seam: Seam, answer: Any, rows: int, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    """(indices [T, K], weights [T, K]) out of a router's answer."""
    if seam == "scores":
        scores_TE, logits_TE = answer
        # By logits, as a score may underflow to zero.
        index_TK = logits_TE.topk(top_k, dim=1).indices
        return index_TK, scores_TE.gather(1, index_TK)
    if seam == "masks":
        masks = _masks(answer, experts)
        assert masks is not None  # the seam was told by such an answer
        mask_TE, weight_T1 = masks
        index_T1 = mask_TE.argmax(1, keepdim=True)
        return index_T1.masked_fill(mask_TE.sum(1, keepdim=True) == 0, experts), weight_T1
    if seam == "gates":
        gates_TE = gates_in(answer, experts)
        assert gates_TE is not None  # the seam was told by such an answer
        weights_TK, index_TK = gates_TE.topk(top_k, dim=1)
        return index_TK.masked_fill(weights_TK == 0, experts), weights_TK
    found = _sorted_parts(answer, experts)
    assert found is not None  # the seam was told by such an answer
    order_P, _, weights_P, sizes = found
    numbers = torch.arange(experts, device=order_P.device)
    expert_P = numbers.repeat_interleave(torch.tensor(sizes, device=order_P.device))
    index_P, weight_P = torch.empty_like(order_P), torch.empty_like(weights_P)
    index_P[order_P], weight_P[order_P] = expert_P, weights_P
    return index_P.view(rows, -1), weight_P.view(rows, -1)
