"""What is measured: sizes, routing, and who takes part.

Legend: T tokens of a rank, H hidden size, E experts, K choices, I expert width, R ranks.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Routing = Literal["uniform", "skewed"]


class DispatchBenchSetting(BaseModel):
    """Sizes of the layer that is measured; those of a model's own layer where one is given.

    Attributes:
        ranks: R.
        nodes: they stand in.
        tokens: T.
        hidden: H.
        experts: E.
        width: I.
        top_k: K.
        routing: "uniform" draws distinct experts alike; in "skewed" most tokens choose the same `hot` ones.
        hot: how many experts are hot.
        seed: of weights, tokens and choices.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ranks: int = Field(4, ge=2, le=8)
    nodes: int = Field(2, ge=1)
    tokens: int = Field(512, ge=1)
    hidden: int = Field(256, ge=8)
    experts: int = Field(16, ge=2)
    width: int = Field(128, ge=8)
    top_k: int = Field(4, ge=1)
    routing: Routing = "uniform"
    hot: int = Field(2, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _possible(self) -> DispatchBenchSetting:
        if self.ranks % self.nodes:
            raise ValueError(f"{self.ranks} ranks do not stand in {self.nodes} nodes of equal size")
        if self.top_k > self.experts or self.hot > self.experts:
            raise ValueError(f"there are only {self.experts} experts")
        return self

    @property
    def per_node(self) -> int:
        """Ranks of a node."""
        return self.ranks // self.nodes


class Entry(BaseModel):
    """One way to send tokens, as it takes part.

    Attributes:
        peer: its module in `moekit.bench.dispatch.competitors`.
        variant: which of that module's ways: a dispatcher's name, a capacity.
        routing: name of the choices it gets.
        placement: name of the placement it gets; "" for contiguous blocks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    peer: str
    variant: str = ""
    routing: str = ""
    placement: str = ""

    @property
    def name(self) -> str:
        """What tables call it."""
        parts = [" ".join(part for part in (_TITLES.get(self.peer, self.peer), self.variant) if part)]
        return " + ".join([*parts, *(part for part in (self.placement, self.routing) if part)])


_TITLES = {"ours": "moekit", "transformers": "transformers", "deepspeed": "DeepSpeed"}
BASELINE = Entry(peer="transformers", variant="all_to_all")


class Job(BaseModel):
    """What a rank is told, as a file; tensors lie beside it.

    Attributes:
        setting: sizes, after a model's own were put in.
        layers: decoder layers, or 0 for a layer made up.
        entries: who takes part, in order.
        layouts: placement's name -> layer -> rank of each expert.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    setting: DispatchBenchSetting
    layers: tuple[int, ...]
    entries: tuple[Entry, ...]
    layouts: dict[str, dict[int, list[int]]] = Field(default_factory=dict)
