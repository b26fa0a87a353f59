"""The objectives of one run: which are on, what each gave, and their settings, which schedules may move."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from moekit import catalogue
from moekit.errors import BadConfig
from moekit.training.figures import sum_over_ranks
from moekit.training.head import OutputInputs
from moekit.training.layers import TrainedLayer
from moekit.training.objectives.base import Objective, OutputObjective, RouterObjective


class Terms:
    """Objectives by name, and the sums of what each gave since it was last asked.

    Args:
        stated: name -> objective.
        moved: names whose settings a schedule moves: they are on even while their weight is 0.
    """

    def __init__(self, stated: Mapping[str, Objective], moved: Iterable[str] = ()) -> None:
        moved = set(moved)
        self._terms = {name: term for name, term in stated.items() if term.weight > 0 or name in moved}
        self._sums: dict[str, list[Tensor]] = {}

    def __getitem__(self, name: str) -> Objective:
        return self._terms[name]

    @property
    def names(self) -> list[str]:
        """Names of the objectives, in order."""
        return list(self._terms)

    @property
    def texts(self) -> set[str]:
        """Names of the texts that are read."""
        return {term.text for term in self._terms.values()}

    @property
    def need_teacher(self) -> list[str]:
        """Names of the objectives that read a teacher."""
        return [name for name, term in self._terms.items() if term.needs_teacher]

    def on_routers(self, text: str | None = None) -> dict[str, RouterObjective]:
        """The objectives on routers that read a text; without a name, any text."""
        found = {name: term for name, term in self._terms.items() if isinstance(term, RouterObjective)}
        return {name: term for name, term in found.items() if text in (None, term.text)}

    def on_outputs(self, text: str | None = None) -> dict[str, OutputObjective]:
        """The objectives on outputs that read a text; without a name, any text."""
        found = {name: term for name, term in self._terms.items() if isinstance(term, OutputObjective)}
        return {name: term for name, term in found.items() if text in (None, term.text)}

    def check(self, layers: Iterable[TrainedLayer]) -> None:
        """Refuse objectives that do not fit a model.

        Raises:
            BadConfig: naming the objective.
        """
        known = list(layers)
        for name, term in self._terms.items():
            try:
                term.check(known)
            except BadConfig as error:
                raise BadConfig(f"objective {name}: {error.message}", layer=error.layer, hint=error.hint) from error

    def set(self, name: str, setting: str, value: float) -> None:
        """Move one setting of an objective.

        Raises:
            BadConfig: the objective does not take this value.
        """
        term = self._terms[name]
        if getattr(term, setting) != value:
            knobs = {**term.model_dump(), setting: value}
            self._terms[name] = catalogue.make("objective", catalogue.of(type(term)).name, knobs)

    def note(self, name: str, value: Tensor) -> None:
        """Add to what an objective gave, without its weight; notes of micro-batches and ranks add up."""
        self._sums.setdefault(name, []).append(value.detach().float())

    def take(self, steps: int) -> dict[str, float]:
        """What each objective gave in the mean of so many steps, over all ranks; begins anew."""
        sums = {name: torch.stack(self._sums[name]).sum() for name in sorted(self._sums)}
        sum_over_ranks(list(sums.values()))
        self._sums.clear()
        return {name: float(total) / max(steps, 1) for name, total in sums.items()}

    def output_loss(self, inputs: OutputInputs) -> Tensor:
        """The weighted sum of the objectives on outputs that read this micro-batch's text: scalar fp32.

        Without any it is 0, with a gradient of 0, so that ranks still meet in the backward pass.
        """
        terms = {name: t for name, t in self.on_outputs(inputs.batch.text).items() if t.weight > 0}
        values = {name: term.loss(inputs) for name, term in terms.items()}
        for name, value in values.items():
            self.note(name, value)
        total = weighted_sum(terms, values)
        if total is None:
            part = inputs.hidden_NH if inputs.hidden_NH is not None else inputs.stock_NV
            assert part is not None
            return part[:1].float().sum() * 0.0
        return total


def weighted_sum(terms: Mapping[str, Objective], values: Mapping[str, Tensor]) -> Tensor | None:
    """Sum of weight times value; None without any objective."""
    total: Tensor | None = None
    for name, term in terms.items():
        part = term.weight * values[name]
        total = part if total is None else total + part
    return total


def moved_objectives(targets: Iterable[str]) -> set[str]:
    """Names of the objectives whose settings schedules move (`objective.NAME.SETTING`)."""
    parts = [target.split(".") for target in targets]
    return {part[1] for part in parts if len(part) == 3 and part[0] == "objective"}
