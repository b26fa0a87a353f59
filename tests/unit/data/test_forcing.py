"""What an encoder with a decoder is given of a text."""

from __future__ import annotations

import pytest
import torch
import transformers

from moekit.data.forcing import decoder_inputs, start_token
from moekit.errors import BadConfig


class Holds:
    """What has a config."""

    def __init__(self, config: transformers.PreTrainedConfig) -> None:
        self.config = config


IDS = torch.tensor([[11, 12, 13, 14], [21, 22, 0, 0], [0, 0, 31, 32]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1]])


def config(**values: object) -> transformers.SwitchTransformersConfig:
    made = transformers.SwitchTransformersConfig()
    for key, value in values.items():
        setattr(made, key, value)
    return made


def test_a_decoder_begins_with_its_own_token_in_place_of_the_first() -> None:
    given = decoder_inputs(Holds(config(decoder_start_token_id=7)), IDS, MASK)
    assert given["decoder_input_ids"].tolist() == [[7, 12, 13, 14], [7, 22, 0, 0], [0, 0, 7, 32]]
    assert torch.equal(given["decoder_attention_mask"], MASK)
    assert IDS[0, 0] == 11, "what the encoder reads stays"


def test_that_is_the_familys_own_teacher_forcing_of_the_row_without_its_first_token() -> None:
    made = config(decoder_start_token_id=5, pad_token_id=0, **{"num_experts": 2, "vocab_size": 40, "d_model": 8})
    made.d_kv, made.d_ff, made.num_heads = 4, 8, 2
    model = transformers.SwitchTransformersForConditionalGeneration(made)
    labels = IDS[:1, 1:]
    expected = model.prepare_decoder_input_ids_from_labels(labels)
    assert torch.equal(decoder_inputs(model, IDS[:1], MASK[:1])["decoder_input_ids"][:, :-1], expected)


def test_the_first_token_that_a_config_states_counts() -> None:
    assert start_token(config(decoder_start_token_id=0, bos_token_id=3)) == 0
    assert start_token(config(decoder_start_token_id=None, bos_token_id=3, pad_token_id=4)) == 3
    assert start_token(config(decoder_start_token_id=None, bos_token_id=None, pad_token_id=4)) == 4
    with pytest.raises(BadConfig, match="does not say which token its decoder begins with") as caught:
        start_token(config(decoder_start_token_id=None, bos_token_id=None, pad_token_id=None))
    assert "decoder_start_token_id" in str(caught.value.hint)


def test_a_model_that_only_writes_is_given_nothing_more() -> None:
    assert decoder_inputs(Holds(transformers.MixtralConfig()), IDS, MASK) == {}
    assert decoder_inputs(object(), IDS, MASK) == {}


def test_a_wrapped_model_is_given_what_the_model_needs() -> None:
    model = torch.nn.Module()
    model.module = Holds(config(decoder_start_token_id=7))  # as DistributedDataParallel has it
    assert decoder_inputs(model, IDS, MASK)["decoder_input_ids"][0, 0] == 7
