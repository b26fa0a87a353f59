"""Every outcome on every family and both layouts on disk: the folder that is written, as stock transformers opens it,
computes the plain formula of the experts that the outcome asks for, and so does the model changed in memory.

Nothing here goes through the engine's own layouts: experts are taken out of stock models and put together by hand.

Legend: E experts, H hidden, I expert width, T tokens, K choices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers import AutoModelForCausalLM, PreTrainedModel

from moekit.anatomy import find_moe_layers
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.record import Record
from moekit.compress.engine.apply import apply
from moekit.compress.engine.live import change_model
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.weights import LayerWeights
from moekit.errors import BadConfig, UnsupportedModel
from tests.checkpoints import plain
from tests.contracts import cases
from tests.families import EXPERTS, HIDDEN, WIDTH, build, logits

NARROW = 12
KEEP = (1, 3, 4, 6, 7)


@dataclass
class Expert:
    """One expert by hand: rows of gate and up, columns of down, biases or zeros."""

    gate: Tensor
    up: Tensor
    down: Tensor
    gate_bias: Tensor
    up_bias: Tensor
    down_bias: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Expert:
        return Expert(*(change(getattr(self, f.name)) for f in dataclasses.fields(self)))

    def __call__(self, x_TH: Tensor, family: str) -> Tensor:
        gate, up = linear(x_TH, self.gate, self.gate_bias), linear(x_TH, self.up, self.up_bias)
        if family == "gpt_oss":
            gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
            inner = (up + 1) * gate * (gate * 1.702).sigmoid()
        else:
            inner = silu(gate) * up
        return linear(inner, self.down, self.down_bias)


def experts_of(model: PreTrainedModel, name: str, family: str) -> list[Expert]:
    """The experts of a stock model's layer, by the layout of its family."""
    state = {key.removeprefix(f"{name}."): t for key, t in model.state_dict().items() if key.startswith(f"{name}.")}
    both, down = state["gate_up_proj"], state["down_proj"]
    found = []
    for e in range(both.shape[0]):
        if family == "gpt_oss":
            bias, columns = state["gate_up_proj_bias"][e], both[e]
            gate, up = columns[:, ::2].T, columns[:, 1::2].T
            found.append(Expert(gate, up, down[e].T, bias[::2], bias[1::2], state["down_proj_bias"][e]))
        else:
            width = both.shape[1] // 2
            zeros = torch.zeros(width)
            found.append(Expert(both[e, :width], both[e, width:], down[e], zeros, zeros, torch.zeros(HIDDEN)))
    return found


@dataclass(frozen=True)
class Case:
    """An outcome, the rewriting that a method would bring along, and what experts must come of it, by hand."""

    outcome: LayerOutcome
    expected: Callable[[list[Expert]], list[Expert]]
    rows: Callable[[Tensor], Tensor]
    rewrite: Callable[[int, LayerWeights], LayerWeights] | None = None


def chosen(keep: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    return lambda rows_E: rows_E[list(keep)]


def _neurons(e: int) -> list[int]:
    return [(2 * n + e) % WIDTH for n in range(NARROW)]


def _narrowed(layer: int, w: LayerWeights) -> LayerWeights:
    def rows(t: Tensor | None, dim: int = 1) -> Any:
        return (
            None
            if t is None
            else torch.stack([t[e].index_select(dim - 1, torch.tensor(_neurons(e))) for e in range(EXPERTS)])
        )

    return dataclasses.replace(
        w,
        up_EIH=rows(w.up_EIH),
        gate_EIH=rows(w.gate_EIH),
        down_EHI=rows(w.down_EHI, 2),
        up_bias_EI=rows(w.up_bias_EI),
        gate_bias_EI=rows(w.gate_bias_EI),
    )


def _narrowed_by_hand(experts: list[Expert]) -> list[Expert]:
    return [
        Expert(x.gate[n], x.up[n], x.down[:, n], x.gate_bias[n], x.up_bias[n], x.down_bias)
        for e, x in enumerate(experts)
        for n in [_neurons(e)]
    ]


def _scaled(layer: int, w: LayerWeights) -> LayerWeights:
    kept = w.select(KEEP)
    factor = torch.arange(2.0, 2.0 + len(KEEP))
    return dataclasses.replace(kept, up_EIH=kept.up_EIH * factor[:, None, None], down_EHI=kept.down_EHI / 2)


def _zeroed(layer: int, w: LayerWeights) -> LayerWeights:
    return dataclasses.replace(w, up_EIH=w.up_EIH.masked_fill(w.up_EIH.abs() < 0.1, 0))


def _rounded(matrix: Tensor, bits: int) -> Tensor:
    rows = []
    for row in matrix.double():
        low, high = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
        step = float(np.float16((high - low) / (2**bits - 1)))
        zero = round(-low / step)
        points = [min(max(round(float(v) / step) + zero, 0), 2**bits - 1) for v in row]
        rows.append(torch.tensor([step * (point - zero) for point in points]))
    return torch.stack(rows).to(matrix.dtype)


MERGED = ((0, 1), (3,), (4, 5, 2), (6,), (7,))
SHARES = ((0.25, 0.75), (1.0,), (0.5, 0.3, 0.2), (1.0,), (1.0,))


def _merged(experts: list[Expert]) -> list[Expert]:
    def mean(parts: list[Tensor], share: tuple[float, ...]) -> Tensor:
        total = torch.zeros_like(parts[0])
        for part, s in zip(parts, share, strict=True):
            total = total + s * part
        return total

    names = [f.name for f in dataclasses.fields(Expert)]
    return [
        Expert(*(mean([getattr(experts[e], name) for e in members], share) for name in names))
        for members, share in zip(MERGED, SHARES, strict=True)
    ]


def _merged_rows(rows_E: Tensor) -> Tensor:
    made = []
    for members, share in zip(MERGED, SHARES, strict=True):
        made.append(torch.stack([s * rows_E[e] for e, s in zip(members, share, strict=True)]).sum(0))
    return torch.stack(made)


ALL = tuple(range(EXPERTS))
TWICE = tuple(e for e in ALL for _ in range(2))
BITS = (2, 3, 4, 5, 6, 8, 3, 4)
CASES = {
    "drop": Case(LayerOutcome(keep=KEEP), lambda x: [x[e] for e in KEEP], chosen(KEEP)),
    "merge": Case(
        LayerOutcome(keep=KEEP, sources=MERGED, shares=SHARES),
        _merged,
        _merged_rows,
    ),
    "rewrite": Case(
        LayerOutcome(keep=KEEP),
        lambda x: [dataclasses.replace(x[e], up=x[e].up * (2 + n), down=x[e].down / 2) for n, e in enumerate(KEEP)],
        chosen(KEEP),
        _scaled,
    ),
    "narrow": Case(LayerOutcome(keep=ALL, width=NARROW), _narrowed_by_hand, chosen(ALL), _narrowed),
    "grow": Case(LayerOutcome(keep=TWICE), lambda x: [x[e] for e in TWICE], chosen(TWICE)),
    "zero": Case(
        LayerOutcome(keep=ALL, sparsity=0.1),
        lambda x: [dataclasses.replace(e, up=torch.where(e.up.abs() < 0.1, 0.0, e.up)) for e in x],
        chosen(ALL),
        _zeroed,
    ),
    "bits": Case(
        LayerOutcome(keep=ALL, bits={"up": BITS, "down": BITS}),
        lambda x: [
            dataclasses.replace(e, up=_rounded(e.up, b), down=_rounded(e.down, b)) for e, b in zip(x, BITS, strict=True)
        ],
        chosen(ALL),
    ),
}


@cache
def stock(family: str) -> PreTrainedModel:
    return build(family)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, bool], Checkpoint]:
    """Tiny checkpoints, each written once; read-only."""
    root = tmp_path_factory.mktemp("engine")

    @cache
    def written(family: str, fused: bool) -> Checkpoint:
        return Checkpoint.open(plain(root / f"{family}-{fused}", family, fused=fused))

    return written


def router_rows(model: PreTrainedModel, name: str) -> Mapping[str, Tensor]:
    state = {key: t for key, t in model.state_dict().items() if key.startswith(f"{name}.")}
    return {key: t for key, t in state.items() if t.dim() and EXPERTS in t.shape}


def outcomes_of(model: PreTrainedModel, outcome: LayerOutcome) -> dict[int, LayerOutcome]:
    return {layer.index: outcome for layer in find_moe_layers(model)}


def check_experts(opened: PreTrainedModel, family: str, case: Case) -> None:
    """Experts and router of a stock model are those that the outcome asks for."""
    before = stock(family)
    g = torch.Generator().manual_seed(3)
    for old, new in zip(find_moe_layers(before), find_moe_layers(opened), strict=True):
        wanted = case.expected(experts_of(before, old.experts_name, family))
        x_TH = torch.randn(17, HIDDEN, generator=g)
        index_TK = torch.stack([torch.randperm(len(wanted), generator=g)[:2] for _ in range(17)])
        weight_TK = torch.rand(17, 2, generator=g)
        expected_TH = torch.stack(
            [
                sum(weight_TK[t, k] * wanted[int(index_TK[t, k])](x_TH[t : t + 1], family)[0] for k in range(2))
                for t in range(17)
            ]
        )
        with torch.no_grad():
            made_TH = new.experts(x_TH, index_TK, weight_TK)
        torch.testing.assert_close(made_TH, expected_TH, rtol=2e-4, atol=2e-5)
        after = opened.state_dict()
        for name, rows in router_rows(before, old.router_name).items():
            axis = list(rows.shape).index(EXPERTS)
            torch.testing.assert_close(after[name].movedim(axis, 0), case.rows(rows.movedim(axis, 0)))


@pytest.mark.parametrize(("kind", "family", "fused"), cases(list(CASES), [False, True]))
def test_a_folder_is_what_the_outcome_says(
    kind: str, family: str, fused: bool, folders: Callable[[str, bool], Checkpoint], tmp_path: Path
) -> None:
    case, source = CASES[kind], folders(family, fused)
    outcomes = outcomes_of(stock(family), case.outcome)
    apply(source, outcomes, tmp_path / "out", rewrite=case.rewrite, record=Record(command="a test"))
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    check_experts(opened, family, case)
    if not fused:
        changed = change_model(build(family), outcomes, case.rewrite)
        check_experts(changed, family, case)
        torch.testing.assert_close(logits(opened), logits(changed), rtol=1e-4, atol=1e-5)


def test_widths_that_a_family_cannot_say_are_refused_with_the_nearest() -> None:
    outcomes = outcomes_of(stock("deepseek_v3"), LayerOutcome(keep=ALL, width=10))
    with pytest.raises(BadConfig) as caught:
        change_model(build("deepseek_v3"), outcomes, _narrowed)
    assert "narrow to 8" in str(caught.value.hint) or "narrow to 12" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("outcome", "rewrite", "kind", "said"),
    [
        (LayerOutcome(keep=ALL, sparsity=0.5), _narrowed, BadConfig, "12 neurons, the outcome says 24"),
        (LayerOutcome(keep=ALL, width=16), _narrowed, BadConfig, "12 neurons, the outcome says 16"),
        (LayerOutcome(keep=ALL, width=NARROW), None, UnsupportedModel, "nothing says which weights"),
        (LayerOutcome(keep=ALL, width=30), _narrowed, BadConfig, "cannot become 30 wide"),
        (LayerOutcome(keep=ALL, shared_width=4), None, UnsupportedModel, "narrows shared experts"),
        (LayerOutcome(keep=(0, 1), redirect=(0, 1)), None, BadConfig, "tokens of 2 experts go, and there are 8"),
    ],
)
def test_what_is_not_said_or_not_carried_out_is_refused(
    outcome: LayerOutcome, rewrite: Any, kind: type[Exception], said: str, folders: Any, tmp_path: Path
) -> None:
    outcomes = outcomes_of(stock("qwen3_moe"), outcome)
    with pytest.raises(kind, match=said):
        change_model(build("qwen3_moe"), outcomes, rewrite)
    with pytest.raises(kind, match=said):
        apply(folders("qwen3_moe", False), outcomes, tmp_path / "out", rewrite=rewrite, record=Record(command="x"))
    assert not (tmp_path / "out").exists()
