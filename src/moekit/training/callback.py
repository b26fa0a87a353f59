"""What MoE training needs, as one callback for transformers' Trainer and everything built on it (trl's too).

The router losses do not pass through the trainer's loss, which every trainer computes in its own way: they enter the
backward pass where they arise. Each router's weights run through an identity whose backward also starts the gradient of
that layer's losses, exactly as if they had been added to the loss with their coefficients. So the logged loss stays the
language-modelling loss and can be compared between models, and activation checkpointing, accumulation and DDP work
unchanged: per optimizer step the gradient is that of

    loss + sum over layers and objectives of weight * value,

each value averaged over micro-batches and ranks.

Legend: T tokens, K choices a token.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moekit.errors import BadConfig, NumericFault, UnsupportedModel
from moekit.runtime.losses import attach_loss
from moekit.runtime.tracker import set_step
from moekit.training.balancers.base import Balancer, read_balancer
from moekit.training.balancing import SelectionBiases
from moekit.training.batch import MicroBatch
from moekit.training.collector import Routed
from moekit.training.figures import RoutingFigures, RoutingMeter, world_size
from moekit.training.layers import remembered_layers, trained_layers
from moekit.training.losses import expert_load
from moekit.training.objectives.balance import Balance
from moekit.training.objectives.base import Objective, RouterObjective, read_objectives
from moekit.training.objectives.z import RouterZ
from moekit.training.observed import answers_all, needs_logits, refuse_without_logits
from moekit.training.terms import Terms, weighted_sum
from moekit.training.watching import RoutingWatch

logger = logging.getLogger(__name__)

# Callbacks that observe a model: a run that fails never tells them that it has ended.
_observing: WeakSet[MoECallback] = WeakSet()


class MoECallback(TrainerCallback):  # type: ignore[misc]
    """Objectives on routers from the real selection, loss-free balancing, and routing figures in the log.

    >>> trainer = SFTTrainer(model, args=SFTConfig(router_aux_loss_coef=0.0, ...), ...)
    >>> MoECallback({"balance": 0.01, "z": 0.001}).install(trainer)

    Args:
        objectives: objectives on routers: name -> weight, or settings, or the objective itself.
        balancer: rule that moves selection biases after each optimizer step: its name, settings, or the rule itself;
            None leaves them alone.
        every: figures are logged at every so many steps (where the trainer logs), over all steps since; 1 for each.
        texts: how many texts share the micro-batches of a step.

    Attributes:
        terms: the objectives.
        biases: the selection biases, while a run with a balancer is on.
        remembered: what the balancer of a run that is continued remembered; put back when it begins.
        figures: the latest routing figures logged, None before.
        notes: what a reader of the figures must know, once a run has ended: layers whose figures are not whole.

    Raises:
        BadConfig: an objective on outputs: those need `moekit.training.train`.
    """

    def __init__(
        self,
        objectives: Mapping[str, Any] | Terms | None = None,
        *,
        balancer: str | Mapping[str, Any] | Balancer | None = None,
        every: int = 1,
        texts: int = 1,
    ) -> None:
        if every < 1:
            raise BadConfig(f"every is {every}", hint="give at least 1")
        if isinstance(objectives, Terms):
            self.terms = objectives
        else:
            self.terms = Terms(_read(objectives or {}))
            for name in self.terms.on_outputs():
                raise BadConfig(
                    f"{name!r} is an objective on outputs: the trainer's own loss stands in its place here",
                    hint="call moekit.training.train, or leave it out",
                )
        self.balancer = balancer if balancer is None or isinstance(balancer, Balancer) else read_balancer(balancer)
        self.every = every
        self._texts = texts
        self.biases: SelectionBiases | None = None
        self.remembered: dict[str, Tensor] = {}
        self.figures: RoutingFigures | None = None
        self.notes: list[str] = []
        self._watch: RoutingWatch | None = None
        self._run: tuple[Any, TrainerState] | None = None
        self._memory = ExitStack()
        self._now = MicroBatch()
        self._share = 1.0
        self._read_at = 0

    def install(self, trainer: Trainer) -> MoECallback:
        """Add this callback to a trainer, in front of the trackers, so that they see its figures; checks at once.

        Raises:
            BadConfig: transformers' own balance loss is on as well, or the precision is fp16.
            UnsupportedModel: objectives on routers, or a balancer, where routers give no logits.
        """
        self._check(trainer.args, trainer.model)
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def detach(self) -> None:
        """Remove all hooks from the model."""
        if self._watch is not None:
            self.notes = self._watch.notes
            self._watch.close()
        self._watch = self.biases = self._run = None
        self._memory.close()
        _observing.discard(self)

    @property
    def _meter(self) -> RoutingMeter | None:
        return None if self._watch is None else self._watch.meter

    def _asked(self) -> list[str]:
        return needs_logits(self.terms, self.balancer is not None)

    def _check(self, args: TrainingArguments, model: Any) -> None:
        refuse_without_logits(model, self._asked())
        config = model.config.get_text_config()
        if getattr(config, "output_router_logits", False):
            message = "transformers' own balance loss is on (output_router_logits): it pools all layers"
            hint = "set model.config.output_router_logits = False; with trl, SFTConfig(router_aux_loss_coef=0.0)"
            if self.terms.on_routers():
                raise BadConfig(f"{message}, and its term would be added to ours", hint=hint)
            if answers_all(model):  # elsewhere there is none of ours that could take its place
                logger.warning("%s; %s", message, hint)
        if args.fp16 and self.terms.on_routers():
            raise BadConfig("fp16 scales the loss, but not what routers add", hint="use bf16 or fp32")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the routers and start observing them."""
        model = kwargs["model"]
        self.detach()
        self._read_at = state.global_step
        self._check(args, model)
        self._follow(model, state)
        # Not earlier: what wraps the model for ranks may put other tensors in the place of its buffers.
        self._memory.enter_context(remembered_layers(model))
        layers = trained_layers(model)
        self.terms.check(layers)
        self.biases = None if self.balancer is None else SelectionBiases(layers, self.balancer)
        if self.biases is not None:
            self.biases.restore(self.remembered)
        # Figures may be left out where routers do not show what is asked; objectives may not.
        self._watch = RoutingWatch(model, layers, self._consume, self._batch, strict=bool(self._asked()))

    def _follow(self, model: Any, state: TrainerState) -> None:
        """Take this run's place on the model: what an earlier one that failed left there would add its losses, too."""
        for other in list(_observing):
            if other._run is not None and other._run[0] is model and other._run[1] is not state:
                other.detach()
        self._run = model, state
        _observing.add(self)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Learn of how many micro-batches this optimizer step will have: the last of an epoch may have fewer."""
        count = args.gradient_accumulation_steps
        loader = kwargs.get("train_dataloader")
        if count > 1 and loader is not None and hasattr(loader, "__len__"):
            rest = len(loader) % count
            updates = -(-len(loader) // count)
            if rest and state.global_step % updates == updates - 1:
                count = rest
        self._share = self._texts / count
        set_step(kwargs["model"], step=state.global_step, steps=state.max_steps, share=self._share)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the selection biases; before a checkpoint is written, so that it holds them."""
        if self.biases is not None:
            self.biases.step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the routing figures to the log line and to the history."""
        if self._run is None or not logs or "loss" not in logs or state.global_step % self.every:
            return
        figures = None if self._meter is None else self._meter.read()
        given = {
            f"objective/{name}": value for name, value in self.terms.take(state.global_step - self._read_at).items()
        }
        self._read_at = state.global_step
        if figures is not None:
            self.figures = figures
            given = {**figures.scalars(), **given}
        logs.update(given)
        state.log_history[-1].update(given)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop observing; a run too short for a log line of its own leaves its figures all the same."""
        if self._meter is not None and self.figures is None:
            self.figures = self._meter.read()
        self.detach()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop before NaN reaches the weights."""
        if self._meter is not None and (bad := self._meter.broken()) is not None:
            raise NumericFault(
                f"the router's logits are not finite in step {state.global_step + 1}",
                layer=bad,
                hint="resume from the last checkpoint with a lower learning rate, or with the objective z",
            )

    def meet(self, batch: MicroBatch) -> None:
        """Say which micro-batch comes next: its text, its place in the run, its teacher."""
        self._now = batch

    def _batch(self, ids_BS: Tensor | None, mask_BS: Tensor | None) -> MicroBatch:
        return replace(self._now, ids_BS=ids_BS, mask_BS=mask_BS)

    def _consume(self, routed: Routed) -> Tensor | None:
        """Count an answer, and hang the losses on its weights."""
        terms = self.terms.on_routers(routed.batch.text)
        with torch.set_grad_enabled(bool(terms) and torch.is_grad_enabled()):
            values = {name: term.loss(routed) for name, term in terms.items()}
        if not routed.repeated:
            self._count(routed, terms, values)
        total = weighted_sum(terms, values)
        if total is None or not total.requires_grad:
            return None
        if not routed.weights_TK.requires_grad:
            raise UnsupportedModel(
                "the router's weights carry no gradient, so its losses cannot enter the backward pass",
                layer=routed.layer.index,
                hint="leave the objectives on routers out, or add the losses yourself (moekit.training.collect)",
            )
        return attach_loss(routed.weights_TK, total * self._share)

    @torch.no_grad()
    def _count(self, routed: Routed, terms: Mapping[str, RouterObjective], values: Mapping[str, Tensor]) -> None:
        watch, layer = self._watch, routed.layer
        if watch is None or watch.meter is None:  # hooks of a watch that is closed
            return
        load_E = expert_load(routed.indices_TK, layer.experts, routed.mask_T)
        losses = [self._figure(plain, routed, terms, values) for plain in (Balance(), RouterZ())]
        watch.meter.add(layer.index, load_E, (losses[0], losses[1]))
        for name, value in values.items():
            self.terms.note(name, value * (self._share / (len(watch.routed) * world_size())))
        if self.biases is not None:
            self.biases.add(routed)

    @staticmethod
    def _figure(
        plain: RouterObjective,
        routed: Routed,
        terms: Mapping[str, RouterObjective],
        values: Mapping[str, Tensor],
    ) -> Tensor:
        """A figure that is logged always: what an objective has just computed, or the same once more."""
        alike = (n for n, t in terms.items() if type(t) is type(plain) and t.pool == plain.pool)
        same = (values[name] for name in alike)
        found = next(same, None)
        return plain.loss(routed) if found is None else found


def _read(stated: Mapping[str, Any]) -> dict[str, Objective]:
    made = {name: term for name, term in stated.items() if isinstance(term, Objective)}
    return {**made, **read_objectives({name: term for name, term in stated.items() if name not in made})}
