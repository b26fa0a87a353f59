"""Units that an interval can be made of: documents, or passages of them where a domain has too few."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from moekit.data.split import excerpts
from moekit.data.text import Document

logger = logging.getLogger(__name__)

# Fewer documents than this in a domain tell no interval: they are cut into passages, which are then the units.
FEW = 16
PASSAGE_CHARACTERS = 2000


def passages(document: Document) -> list[Document]:
    """A document in consecutive pieces of some 2,000 characters; a conversation as it is."""
    if document.messages:
        return [document]
    return [dataclasses.replace(document, text=piece) for piece in excerpts(document.text, PASSAGE_CHARACTERS)]


def units(documents: Sequence[Document]) -> list[Document]:
    """Documents as they are, but those of domains with few of them cut into passages, which is said.

    Passages of one document resemble each other, so that intervals over them are too narrow: they say how certain the
    figure is for this document, not for others like it.
    """
    by_domain: dict[str, list[Document]] = {}
    for document in documents:
        by_domain.setdefault(document.domain, []).append(document)
    found: list[Document] = []
    for domain, own in by_domain.items():
        pieces = [piece for document in own for piece in passages(document)] if len(own) < FEW else own
        if len(pieces) > len(own):
            logger.warning(
                "%s: %d document%s cut into %d passages; intervals over passages of one text are too narrow",
                domain,
                len(own),
                "" if len(own) == 1 else "s",
                len(pieces),
            )
        found += pieces
    return found
