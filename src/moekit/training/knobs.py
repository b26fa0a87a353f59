"""Settings that a schedule may move while a run is on, by name: refused before training where there is no such thing.

`lr`, `objective.NAME.SETTING`, `balancer.SETTING` and `routing.top_k`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moekit import catalogue
from moekit.checkpoint.names import TOP_K_KEYS
from moekit.errors import BadConfig
from moekit.runtime.attachment import attached
from moekit.training.callback import MoECallback
from moekit.training.layers import TrainedLayer, trained_layers
from moekit.training.schedules.base import Schedule

LR = "lr"
Setter = Callable[[float], None]


def _numbers(settings: Mapping[str, Any]) -> list[str]:
    return [name for name, value in settings.items() if isinstance(value, int | float) and not isinstance(value, bool)]


class Knobs:
    """What can be moved in one run.

    Args:
        model: the model that trains.
        callback: holds objectives and balancer.
    """

    def __init__(self, model: PreTrainedModel, callback: MoECallback) -> None:
        self._model = model
        self._callback = callback
        self._layers = trained_layers(model)
        self._setters: dict[str, Setter] = {LR: lambda _: None}  # the optimizer's own scheduler moves it
        for name in callback.terms.names:
            for setting in _numbers(callback.terms[name].model_dump()):
                self._setters[f"objective.{name}.{setting}"] = self._of_objective(name, setting)
        if callback.balancer is not None:
            for setting in _numbers(callback.balancer.model_dump()):
                self._setters[f"balancer.{setting}"] = self._of_balancer(setting)
        stock = not attached(model)  # parts have settings of their own
        routers = [layer.layer.router for layer in self._layers]
        if stock and routers and all(isinstance(getattr(router, "top_k", None), int) for router in routers):
            self._setters["routing.top_k"] = self._set_top_k

    def check(self, schedules: Mapping[str, Schedule], steps: int) -> None:
        """Refuse targets that do not exist, and values that they would not take.

        Raises:
            BadConfig: naming the target.
        """
        for target, schedule in schedules.items():
            if target not in self._setters:
                raise BadConfig(
                    f"no schedule can move {target!r}", hint=f"there are: {', '.join(sorted(self._setters))}"
                )
            for step in range(0, steps + 1, max(steps // 1000, 1)):
                value = schedule.value(step / steps)
                if target == LR and value < 0:
                    raise BadConfig(f"lr would be {value} in step {step + 1}", hint="give 0 or more")
                self._try(target, value)

    def _try(self, target: str, value: float) -> None:
        """Let the setting's own bounds judge."""
        head, _, rest = target.partition(".")
        if target == "routing.top_k":
            _legal_top_k(self._layers, value)
        elif head == "objective":
            name, _, setting = rest.partition(".")
            term = self._callback.terms[name]
            catalogue.make("objective", catalogue.of(type(term)).name, {**term.model_dump(), setting: value})
        elif head == "balancer":
            rule = self._callback.balancer
            catalogue.make("balancer", catalogue.of(type(rule)).name, {**_dumped(rule), rest: value})

    def set(self, target: str, value: float) -> None:
        """Move one setting."""
        self._setters[target](value)

    def _of_objective(self, name: str, setting: str) -> Setter:
        return lambda value: self._callback.terms.set(name, setting, value)

    def _of_balancer(self, setting: str) -> Setter:
        def move(value: float) -> None:
            biases = self._callback.biases
            if biases is not None:
                rule = biases.balancer
                knobs = {**rule.model_dump(), setting: value}
                biases.balancer = catalogue.make("balancer", catalogue.of(type(rule)).name, knobs)

        return move

    def _set_top_k(self, value: float) -> None:
        """Choices a token, in every router and in the config: the model ends with what it trained with last."""
        top_k = _legal_top_k(self._layers, value)
        for layer in self._layers:
            layer.router.top_k = top_k  # type: ignore[assignment]
        config = self._model.config.get_text_config()
        for key in TOP_K_KEYS:
            if isinstance(getattr(config, key, None), int):
                setattr(config, key, top_k)


def _dumped(rule: Any) -> dict[str, Any]:
    return dict(rule.model_dump())


def _legal_top_k(layers: Sequence[TrainedLayer], value: float) -> int:
    top_k = round(value)
    fewest = min(layers, key=lambda layer: layer.experts)
    if not 1 <= top_k <= fewest.experts:
        raise BadConfig(
            f"a token would choose {top_k} of {fewest.experts} experts",
            layer=fewest.index,
            hint=f"the schedule must stay between 1 and {fewest.experts}",
        )
    return top_k


class ScheduleCallback(TrainerCallback):  # type: ignore[misc]
    """Moves settings at the beginning of each step.

    Args:
        knobs: what can be moved.
        schedules: target -> schedule.
    """

    def __init__(self, knobs: Knobs, schedules: Mapping[str, Schedule]) -> None:
        self._knobs = knobs
        self._schedules = schedules

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set what this step trains with."""
        for target, schedule in self._schedules.items():
            self._knobs.set(target, schedule.value(state.global_step / state.max_steps))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave what is part of the model at its last value."""
        for target, schedule in self._schedules.items():
            if target.startswith("routing."):
                self._knobs.set(target, schedule.value(1.0))
