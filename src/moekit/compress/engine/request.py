"""What a plan is asked for, and the text that it is made on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moekit.compress.budget.bits import BitBudget
from moekit.compress.budget.sizes import Budget
from moekit.compress.budget.sparsity import SparsityBudget
from moekit.compress.budget.width import WidthBudget
from moekit.compress.engine.inputs import Protected
from moekit.compress.engine.method import WeightMethod
from moekit.compress.engine.plan import budget_as
from moekit.compress.engine.repairing import BlockRepair
from moekit.compress.engine.resize import Groups

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is asked for.

    Attributes:
        method: the method.
        budget: what may stay, in the form of the method's kind.
        top_k: choices a token makes afterwards; None as before.
        groups: "free" or "equal"; see `PlanFile`.
        seed: of everything random.
        protected: decoder layer -> experts that stay whatever their score.
        repair: how experts that stay make up for those that go; None leaves them.
    """

    method: WeightMethod[Any, Any]
    budget: Budget | SparsityBudget | BitBudget | WidthBudget
    top_k: int | None = None
    groups: Groups = "free"
    seed: int = 0
    protected: Protected | None = None
    repair: BlockRepair | None = None

    @property
    def keep_budget(self) -> Budget:
        """The budget of a request that drops experts.

        Raises:
            BadConfig: it is a budget of another kind.
        """
        return budget_as(Budget, self.budget)


@dataclass(frozen=True)
class CalibrationText:
    """A text, and how it passes through the model.

    Attributes:
        batches: as `moekit.trace.record` takes them; they are gone through once or twice.
        folder: where states and finished layers are kept, so that a run that was interrupted goes on; None for memory.
        dtype: of the weights in memory; None as stored, or float32 where the device would emulate that.
        device: where layers run; "auto" is a GPU if there is one.
        tokenizer: that made the batches.
        source: what to call the text.
    """

    batches: Sequence[Any]
    folder: Path | None = None
    dtype: torch.dtype | None = None
    device: str = "auto"
    tokenizer: PreTrainedTokenizerBase | None = None
    source: str = ""
