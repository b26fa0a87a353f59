"""What reads the pictures of a text: the model's own processor."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import AutoProcessor

from moekit.anatomy.probe import iterate_moe_layers
from moekit.checkpoint.names import text_config
from moekit.data import Document
from moekit.data.pictures import PictureReader
from moekit.errors import BadConfig, BadData

logger = logging.getLogger(__name__)


def picture_reader(
    documents: Sequence[Document], location: str, config: Mapping[str, Any], model: Callable[[], nn.Module]
) -> PictureReader | None:
    """What reads the pictures of a text by the model's own processor; None where there are none.

    Args:
        documents: the text.
        location: of the model.
        config: its parsed config.json.
        model: gives it, with or without weights; asked where there are pictures.

    Raises:
        BadData: pictures go through experts of their own, beside those of text.
        BadConfig: the model takes pictures, and its processor is not there, or needs a library that is not.
    """
    shown = [document for document in documents if document.pictures]
    if not shown:
        return None
    if text_config(config) is config:
        logger.warning(
            "%d conversations show pictures, which this model does not take: their words alone are read", len(shown)
        )
        return None
    try:
        processor = AutoProcessor.from_pretrained(location, trust_remote_code=False)
    except ImportError as error:
        raise BadConfig(
            f"the model's processor needs a library that is not installed: {str(error).strip().splitlines()[0]}",
            file=location,
            hint="install it beside torch, or give text without pictures",
        ) from error
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise BadConfig(
            f"{len(shown)} conversations show pictures, and the model's processor cannot be loaded: {error}",
            file=location,
            hint="put the original's preprocessor_config.json beside its tokenizer, or give text without pictures",
        ) from error
    if getattr(processor, "image_processor", None) is None:
        raise BadConfig(
            f"{len(shown)} conversations show pictures, and the folder has no image processor",
            file=location,
            hint="put the original's preprocessor_config.json beside its tokenizer, or give text without pictures",
        )
    _refuse_other_experts(model())
    return PictureReader(processor, location)


def _refuse_other_experts(model: nn.Module) -> None:
    """Figures of a layer are of one block of experts: what goes through another one is not seen."""
    other = next((layer for layer in iterate_moe_layers(model) if layer.siblings), None)
    if other is not None:
        raise BadData(
            f"the text shows pictures, which go through experts of their own ({other.siblings[0]}), while those of "
            f"text ({other.name}) are looked at",
            layer=other.index,
            hint="give text without pictures",
        )
