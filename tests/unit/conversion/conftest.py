"""Dense models to convert, made once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from tests.dense import dense_model


@pytest.fixture(scope="session")
def build() -> Callable[..., PreTrainedModel]:
    return dense_model


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return dense_model("llama", tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 500.0})


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    return torch.randint(3, 97, (4, 32), generator=torch.Generator().manual_seed(1))
