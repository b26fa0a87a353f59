"""What a recorder is asked to keep."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from pydantic import BaseModel, BeforeValidator, ConfigDict

from moekit.trace.loss import Loss, next_token_loss
from moekit.trace.sources.table import refuse_streaming
from moekit.trace.vocabulary import Statistic, resolve, sources_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RecordingOptions(TypedDict, total=False):
    """The fields of `Recording` as keyword arguments."""

    statistics: Iterable[str]
    keep_choices: bool
    weights: bool
    layers: Sequence[int] | None
    once: bool
    tokenizer: PreTrainedTokenizerBase | None
    source: str
    seed: int | None
    fingerprint: str | None
    loss: Loss


def _names(statistics: Any) -> tuple[str, ...]:
    return (statistics,) if isinstance(statistics, str) else tuple(statistics)


class Recording(BaseModel):
    """What a recorder is asked to keep, and what it notes in the trace.

    Attributes:
        statistics: names or groups of the vocabulary (`moekit.trace.known_statistics`).
        keep_choices: keep each token's choices; memory then grows by K bytes a token and layer.
        weights: keep their gate weights too, in fp16.
        layers: decoder layers to record; None for all MoE layers.
        once: where a statistic reads single experts' outputs, compute them once, and give their sum on: it differs from
            the model's own output by rounding. By default they are computed beside it, a second time.
        tokenizer: named in the trace by its hash.
        source: where the text came from, for people.
        seed: of what was drawn for this text, noted in the trace.
        fingerprint: the model's; None computes it.
        loss: what gradients are taken of, where a statistic reads any: (logits [B, S, V], ids [B, S], mask [B, S]) -> a
            sum over tokens.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    statistics: Annotated[tuple[str, ...], BeforeValidator(_names)] = ("basic",)
    keep_choices: bool = True
    weights: bool = False
    layers: tuple[int, ...] | None = None
    once: bool = False
    tokenizer: Any = None
    source: str = ""
    seed: int | None = None
    fingerprint: str | None = None
    loss: Loss = next_token_loss

    @cached_property
    def entries(self) -> tuple[Statistic, ...]:
        """The statistics asked for.

        Raises:
            BadConfig: an unknown name.
        """
        return resolve(self.statistics)

    @property
    def keeps_weights(self) -> bool:
        """Whether gate weights are kept token by token: asked for, or needed by name."""
        return self.weights or "weights" in self.statistics

    @property
    def keeps_choices(self) -> bool:
        """Whether choices are kept token by token: asked for, needed by name, or their weights are."""
        return self.keep_choices or "choices" in self.statistics or self.keeps_weights

    @property
    def routed(self) -> bool:
        """Whether anything asked for is of experts, so that dense layers cannot show it."""
        return self.keeps_choices or any(entry.routed for entry in self.entries)

    @property
    def early(self) -> list[Statistic]:
        """Statistics that are measured while a pass runs, because they read more than choices and weights."""
        return [entry for entry in self.entries if not entry.from_choices]

    @property
    def whole_model(self) -> str:
        """Why the model must be in memory as a whole; "" where layers may be streamed one at a time."""
        return refuse_streaming(sources_of(self.entries)) or ""
