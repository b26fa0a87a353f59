"""Conversations with pictures, written and prepared by the model's own processor.

Shapes: S positions; features as the processor gives them, such as pixels [patches, ...] of all pictures.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moekit._files import read_bytes
from moekit.data.formats import Picture
from moekit.data.text import Document
from moekit.errors import BadConfig, BadData, UnsafeInput, shortened

# A picture file of more bytes is none that a model is shown.
_MOST_BYTES = 256 << 20
# What the rows of a text hold already.
_OF_ROWS = ("input_ids", "attention_mask")


@dataclass(frozen=True, eq=False)
class Shown:
    """The pictures of a conversation, prepared each time they are asked for: those of a whole text need much memory.

    Attributes:
        reader: of the model's processor.
        document: the conversation.
    """

    reader: PictureReader
    document: Document

    def features(self) -> dict[str, torch.Tensor]:
        """What the model's forward takes beside ids and mask, by its argument, such as `pixel_values`."""
        made = self.reader.prepare(self.document)
        return {k: v for k, v in made.items() if k not in _OF_ROWS and isinstance(v, torch.Tensor)}

    @property
    def digest(self) -> str:
        """sha256 of the pictures' bytes."""
        found = hashlib.sha256()
        for picture in self.document.pictures:
            found.update(_bytes(picture, self.document.source))
        return found.hexdigest()


class PictureReader:
    """Reads conversations with pictures by a model's processor.

    Args:
        processor: of transformers, with a chat template and an image processor.
        location: the model's, for messages.

    Raises:
        BadConfig: it has no chat template, which says where in a conversation a picture belongs.
    """

    def __init__(self, processor: Any, location: str) -> None:
        if not getattr(processor, "chat_template", None):
            raise BadConfig(
                "the processor has no chat template, so nothing says where in a conversation a picture belongs",
                file=location,
                hint="put the original's chat_template.jinja into the folder, or give text without pictures",
            )
        self._processor = processor

    def ids(self, document: Document) -> list[int]:
        """Token ids of a conversation by the chat template, with those that stand for its pictures.

        Raises:
            BadData, BadConfig: see `prepare`.
        """
        return [int(i) for i in self.prepare(document)["input_ids"][0]]

    def prepare(self, document: Document) -> Mapping[str, Any]:
        """Write a conversation by the chat template, and prepare its pictures: what the processor gives, one row.

        Raises:
            BadData: a picture is not there, is no picture, or does not fit what the processor can do.
            BadConfig: the library that opens pictures is missing.
        """
        turns = [{"role": role, "content": _parts(content, document)} for role, content in document.messages]
        try:
            made: Mapping[str, Any] = self._processor.apply_chat_template(
                turns, tokenize=True, return_dict=True, return_tensors="pt"
            )
        except (ValueError, TypeError, RuntimeError, KeyError, IndexError) as error:
            raise BadData(
                f"the processor cannot prepare this conversation: {type(error).__name__}: {shortened(str(error))}",
                file=document.source,
                hint="see what the model's page says of picture sizes, and of how many pictures it takes",
            ) from error
        return made


def _parts(content: Any, document: Document) -> list[dict[str, Any]]:
    parts = (content,) if isinstance(content, str) else content
    return [
        {"type": "image", "image": open_picture(part, document.source)}
        if isinstance(part, Picture)
        else {"type": "text", "text": part}
        for part in parts
    ]


def open_picture(picture: Picture, named_by: str) -> Any:
    """A picture as RGB.

    Args:
        picture: where it lies.
        named_by: file and line that show it.

    Raises:
        BadData: it is not there, or no picture; names the file and who named it.
        BadConfig: the library that opens pictures is missing.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise BadConfig("pictures cannot be opened: Pillow is missing", hint="pip install 'moekit[images]'") from error
    shown = shortened(picture.source, 80)
    try:
        with Image.open(io.BytesIO(_bytes(picture, named_by))) as opened:
            return opened.convert("RGB")
    except (OSError, UnsafeInput) as error:
        missing = isinstance(error, FileNotFoundError)
        what = "there is no such picture" if missing else "this is no picture that can be read"
        # Pillow's own words name an object in memory.
        detail = "" if missing or isinstance(error, UnidentifiedImageError) else f": {error}"
        raise BadData(f"{named_by}: {what}{detail}", file=shown, hint="give a PNG, JPEG or WebP file") from error
    except (Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise BadData(f"{named_by}: this picture cannot be read: {error}", file=shown) from error


def _bytes(picture: Picture, named_by: str) -> bytes:
    """The file's, or those that the address itself holds.

    Raises:
        BadData: an address on the network, which is not fetched, or a damaged one.
    """
    if picture.source.startswith("data:"):
        try:
            return base64.b64decode(picture.source.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise BadData(f"{named_by}: a picture's data: address is damaged: {error}") from error
    if picture.source.startswith(("http:", "https:")):
        raise BadData(
            f"{named_by}: pictures are not fetched from the network",
            file=shortened(picture.source, 80),
            hint="download it, and name the file",
        )
    return read_bytes(Path(picture.source), limit=_MOST_BYTES)
