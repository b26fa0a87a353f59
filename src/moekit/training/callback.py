"""What MoE training needs, as one callback for transformers' Trainer and everything built on it (trl's too).

The router losses do not pass through the trainer's loss, which every trainer computes in its own way: they enter the
backward pass where they arise. Each router's weights run through an identity whose backward also starts the gradient of
that layer's losses, exactly as if they had been added to the loss with their coefficients. So the logged loss stays the
language-modelling loss and can be compared between models, and activation checkpointing, accumulation and DDP work
unchanged: per optimizer step the gradient is that of

    loss + sum over layers (balance_coef * balance + importance_coef * CV^2(importance) + z_coef * z),

each averaged over micro-batches and ranks.

Legend: T tokens, K choices a token.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moekit.errors import BadConfig, NumericFault, UnsupportedModel
from moekit.runtime.losses import attach_loss
from moekit.runtime.tracker import tell_step
from moekit.training.balance import BiasBalancer
from moekit.training.collector import Routed, RouterCollector
from moekit.training.figures import RoutingFigures, RoutingMeter
from moekit.training.layers import trained_layers
from moekit.training.losses import balance_loss, cv_squared, expert_load, importance, z_loss

logger = logging.getLogger(__name__)


class MoECallback(TrainerCallback):  # type: ignore[misc]
    """Balance and z losses from the real selection, loss-free balancing, and routing figures in the log.

    >>> trainer = SFTTrainer(model, args=SFTConfig(router_aux_loss_coef=0.0, ...), ...)
    >>> MoECallback(balance_coef=0.01).install(trainer)

    Args:
        balance_coef: factor on each layer's `balance_loss`.
        z_coef: factor on each layer's `z_loss`.
        importance_coef: factor on each layer's squared coefficient of variation of gate weights (Shazeer).
        bias_rate: step of DeepSeek-style selection biases after each optimizer step; 0 leaves them alone.
        every: figures are logged at every so many steps (where the trainer logs), over all steps since; 1 for each.

    Attributes:
        figures: the latest routing figures logged, None before.
    """

    def __init__(
        self,
        *,
        balance_coef: float = 0.0,
        z_coef: float = 0.0,
        importance_coef: float = 0.0,
        bias_rate: float = 0.0,
        every: int = 1,
    ) -> None:
        for name, value in (
            ("balance_coef", balance_coef),
            ("z_coef", z_coef),
            ("importance_coef", importance_coef),
            ("bias_rate", bias_rate),
        ):
            if not value >= 0:
                raise BadConfig(f"{name} is {value}", hint="give 0 or more")
        if every < 1:
            raise BadConfig(f"every is {every}", hint="give at least 1")
        self.balance_coef = balance_coef
        self.z_coef = z_coef
        self.importance_coef = importance_coef
        self.bias_rate = bias_rate
        self.every = every
        self.figures: RoutingFigures | None = None
        self._collector: RouterCollector | None = None
        self._meter: RoutingMeter | None = None
        self._balancer: BiasBalancer | None = None
        self._share = 1.0

    def install(self, trainer: Trainer) -> MoECallback:
        """Add this callback to a trainer, in front of the trackers, so that they see its figures; checks at once.

        Raises:
            BadConfig: transformers' own balance loss is on as well, or the precision is fp16.
        """
        self._check(trainer.args, trainer.model)
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def detach(self) -> None:
        """Remove all hooks from the model."""
        if self._collector is not None:
            self._collector.close()
        self._collector = self._meter = self._balancer = None

    def _check(self, args: TrainingArguments, model: Any) -> None:
        config = model.config.get_text_config()
        if getattr(config, "output_router_logits", False):
            message = "transformers' own balance loss is on (output_router_logits): it pools all layers"
            hint = "set model.config.output_router_logits = False; with trl, SFTConfig(router_aux_loss_coef=0.0)"
            if self.balance_coef or self.importance_coef:
                raise BadConfig(f"{message}, and balance would count twice", hint=hint)
            logger.warning("%s; %s", message, hint)
        if args.fp16 and (self.balance_coef or self.z_coef or self.importance_coef):
            raise BadConfig("fp16 scales the loss, but not what routers add", hint="use bf16 or fp32")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find the routers and start observing them."""
        model = kwargs["model"]
        self.detach()
        self._check(args, model)
        layers = trained_layers(model)
        self._balancer = BiasBalancer(layers, self.bias_rate) if self.bias_rate else None
        device = next(layers[0].router.parameters()).device
        self._meter = RoutingMeter({layer.index: layer.experts for layer in layers}, device)
        self._collector = RouterCollector(model, self._consume, layers)

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
        self._share = 1.0 / count
        tell_step(kwargs["model"], step=state.global_step, steps=state.max_steps, share=self._share)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the selection biases; before a checkpoint is written, so that it holds them."""
        if self._balancer is not None:
            self._balancer.step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the routing figures to the log line and to the history."""
        if self._meter is None or not logs or "loss" not in logs or state.global_step % self.every:
            return
        figures = self._meter.read()
        if figures is not None:
            self.figures = figures
            logs.update(figures.scalars())
            state.log_history[-1].update(figures.scalars())

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
                hint="resume from the last checkpoint with a lower learning rate, or with z_coef",
            )

    def _consume(self, routed: Routed) -> Tensor | None:
        """Count an answer, and hang the losses on its weights."""
        layer, mask_T = routed.layer, routed.mask_T
        wanted = bool(self.balance_coef or self.z_coef or self.importance_coef) and torch.is_grad_enabled()
        with torch.set_grad_enabled(wanted):
            balance = balance_loss(routed.logits_TE, routed.indices_TK, mask_T, scores=layer.scores)
            z = z_loss(routed.logits_TE, mask_T)
            total = self.balance_coef * balance + self.z_coef * z
            if self.importance_coef:
                received_E = importance(routed.weights_TK, routed.indices_TK, layer.experts, mask_T)
                total = total + self.importance_coef * cv_squared(received_E)
        if not routed.repeated:
            self._count(routed, balance, z)
        if not total.requires_grad:
            return None
        if not routed.weights_TK.requires_grad:
            raise UnsupportedModel(
                "the router's weights carry no gradient, so its losses cannot enter the backward pass",
                layer=layer.index,
                hint="set the coefficients to 0, or add the losses yourself (moekit.training.collect)",
            )
        return attach_loss(routed.weights_TK, total * self._share)

    @torch.no_grad()
    def _count(self, routed: Routed, balance: Tensor, z: Tensor) -> None:
        load_E = expert_load(routed.indices_TK, routed.layer.experts, routed.mask_T)
        if self._meter is not None:
            self._meter.add(routed.layer.index, load_E, balance, z)
        if self._balancer is not None:
            self._balancer.add(routed.layer.index, load_E)
