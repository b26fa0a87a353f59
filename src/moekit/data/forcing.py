"""What a text is to a model that reads before it writes: an encoder's input, and, teacher-forced, its decoder's.

Both are given the same row. A decoder begins with a token of its own, which takes the place of the row's first: so each
position predicts the token that follows it in the row, as in a model that only writes, and position and padding of a
token are the same on both sides. This is teacher forcing (Williams and Zipser, 1989) on the row without its first
token. The encoder sees the whole row, so likelihoods tell how well a model gives back what it reads; they compare
versions of one model, not models.

Legend: B rows, S positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moekit.errors import BadConfig, UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor

_READS = "is_encoder_decoder"
# Tokens that a decoder may begin with, by the keys of a config; transformers generates by the first two, and T5's kind
# begins with padding.
START_KEYS = ("decoder_start_token_id", "bos_token_id", "pad_token_id")


def start_token(config: Any) -> int:
    """The token that a decoder begins with.

    Args:
        config: of an encoder with a decoder: of transformers, or parsed config.json.

    Raises:
        BadConfig: it states none.
    """
    stated = (config.get(key) if isinstance(config, Mapping) else getattr(config, key, None) for key in START_KEYS)
    found = next((value for value in stated if isinstance(value, int)), None)
    if found is None:
        raise BadConfig(
            f"the config of this encoder with a decoder does not say which token its decoder begins with "
            f"({', '.join(START_KEYS)})",
            hint="add decoder_start_token_id to config.json",
        )
    return found


def reads_first(config: Any) -> bool:
    """Whether a model reads a text before it writes one: an encoder with a decoder.

    Args:
        config: of transformers, or parsed config.json; None for none.
    """
    found = config.get(_READS) if isinstance(config, Mapping) else getattr(config, _READS, False)
    return bool(found)


def reading_notes(config: Any) -> tuple[str, ...]:
    """What a reader of a result must know of how its text was read; nothing for a model that only writes.

    Args:
        config: of transformers, or parsed config.json; None for none.

    Raises:
        BadConfig: the config does not say which token a decoder begins with.
    """
    if not reads_first(config):
        return ()
    return (
        "an encoder with a decoder: each row of the text is what the encoder reads and, teacher-forced, what the "
        f"decoder writes (token {start_token(config)} stands in place of the row's first); a likelihood says how well "
        "it writes what it has read, and compares versions of this model alone",
    )


def refuse_reader(config: Any, what: str) -> None:
    """Refuse what is made for models that only write.

    Args:
        config: of transformers, or parsed config.json; None for none.
        what: is refused, as the beginning of a sentence.

    Raises:
        UnsupportedModel: the model reads a text before it writes one.
    """
    if reads_first(config):
        raise UnsupportedModel(
            f"{what}: this is for models that only write, and this one is an encoder with a decoder",
            hint="moekit profile, prune, check, and evaluate on text (--data) work on it",
        )


def _config_of(model: Any) -> Any:
    while not hasattr(model, "config") and hasattr(model, "module"):
        model = model.module
    return getattr(model, "config", None)


def decoder_inputs(model: Any, ids_BS: Tensor, mask_BS: Tensor) -> dict[str, Tensor]:
    """What a model's forward is given beside token ids and their mask, so that its decoder reads the text, too.

    Args:
        model: with its config, or wrapped by what has the model as `module`; without a config it only writes.
        ids_BS: token ids [B, S].
        mask_BS: 1 where a token is, 0 at padding on either side [B, S].

    Returns:
        `decoder_input_ids` and `decoder_attention_mask` [B, S]; nothing for a model without an encoder.

    Raises:
        BadConfig: the config does not say which token a decoder begins with.
    """
    config = _config_of(model)
    if not reads_first(config):
        return {}
    first_BS = (mask_BS != 0) & (mask_BS.cumsum(1) == 1)
    return {
        "decoder_input_ids": ids_BS.masked_fill(first_BS, start_token(config)),
        "decoder_attention_mask": mask_BS,
    }
