"""What a training run must at least allocate, so that what cannot fit is refused before it is tried."""

from __future__ import annotations

from transformers import PreTrainedModel

from moekit._memory import require_memory
from moekit.training.config import TrainConfig

# What a layer keeps for its backward pass of each token, at the very least: its input and its attention's output.
_KEPT_OF_A_LAYER = 2
# Half precision, if it comes to that.
_BYTES_OF_A_NUMBER = 2
# Ids, mask and labels of a token; the number of a row in the run's order.
_INPUT_BYTES, _ORDER_BYTES = 24, 8


def least_bytes(model: PreTrainedModel, config: TrainConfig, steps: int, world: int) -> int:
    """A lower bound of what a run allocates: one micro-batch with what layers keep of it, and the order of rows."""
    text = model.config.get_text_config()
    tokens = config.batch * config.seq_len
    kept = 1 if config.activation_checkpointing else _KEPT_OF_A_LAYER * int(getattr(text, "num_hidden_layers", 1))
    activations = tokens * int(getattr(text, "hidden_size", 1)) * kept * _BYTES_OF_A_NUMBER
    order = steps * config.batch * config.accumulation * world * _ORDER_BYTES
    return activations + tokens * _INPUT_BYTES + order


def check_memory(model: PreTrainedModel, config: TrainConfig, steps: int, world: int) -> None:
    """Refuse a run whose lower bound exceeds the memory that there is.

    Raises:
        OutOfBudget: naming needed and existing bytes.
    """
    require_memory(
        least_bytes(model, config, steps, world),
        f"training with {config.batch:,} rows of {config.seq_len:,} tokens a micro-batch, {config.accumulation:,} of "
        f"them a step, for {steps:,} steps",
        hint="give a smaller batch, seq_len or accumulation, or fewer steps",
    )
