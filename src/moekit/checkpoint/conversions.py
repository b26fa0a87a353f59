"""Let a model that was not loaded by `from_pretrained` be saved under the names of the checkpoint it was made from."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key


def follow_names(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Note on a model which conversions lead from names on disk to its own; saving goes the same way back.

    Args:
        model: of the checkpoint's config.
        names: of the tensors on disk.
    """
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    live = model.state_dict()
    for name in names:
        rename_source_key(name, renamings, converters, model.base_model_prefix, live)
    # As transformers does at the end of loading: what no name needed is not undone in saving.
    model._weight_conversions = [entry for entry in mapping if entry.was_used()]
