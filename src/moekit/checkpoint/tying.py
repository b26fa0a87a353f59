"""Tie weights as transformers does when it loads a folder: what is stored with values of its own is not tied."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def tie(model: PreTrainedModel) -> None:
    """Tie what the config ties, after weights were put into a model that was built without any.

    A config may say that the head is the embedding while the file holds a head that differs, written by a tool that
    untied and trained it; `from_pretrained` keeps both apart then, and so does this. Where only one of the two is
    stored, the other becomes the same tensor.

    Args:
        model: parameters that were not stored still lie on the meta device.
    """
    missing = {name for name, tensor in model.state_dict().items() if tensor.is_meta}
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
