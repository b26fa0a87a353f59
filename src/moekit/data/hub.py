"""Text of a data set on the Hugging Face hub, through the extra `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from moekit.errors import BadData

# Names that people use for data sets that live elsewhere or need a configuration.
ALIASES = {
    "wikitext": "Salesforce/wikitext:wikitext-2-raw-v1",
    "wikitext2": "Salesforce/wikitext:wikitext-2-raw-v1",
}
TEXT_FIELDS = ("text", "content", "document")
# One-line rows (as in wikitext) are joined to documents of about this many characters.
JOIN_CHARACTERS = 8_000
MAX_CHARACTERS = 50_000_000


def load_hub(spec: str) -> Iterator[tuple[str, str]]:
    """Stream the train split of a hub data set.

    Args:
        spec: `name` or `name:config`.

    Yields:
        Text and where it is from; at most 50 million characters.

    Raises:
        BadData: `datasets` is not installed, the set cannot be had, or has no text field.
    """
    hint = "or give a file, a folder, or a source of `moekit data list`"
    if find_spec("datasets") is None:
        raise BadData(
            f"{spec!r} is no file and no source; to look for it on the hub the package `datasets` is needed",
            hint=f'pip install "moekit[data]", {hint}',
        )
    import datasets

    name, _, config = ALIASES.get(spec, spec).partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split="train", streaming=True)
        columns = rows.column_names or list(next(iter(rows)))
    except Exception as error:  # the library raises dozens of kinds, of several packages
        raise BadData(
            f"{spec!r} is no file or folder here, and as a data set of the hub it cannot be had: "
            f"{type(error).__name__}: {error}",
            hint=hint,
        ) from error
    field = next((f for f in TEXT_FIELDS if f in columns), None)
    if field is None:
        raise BadData(f"{spec!r} has no field {' / '.join(TEXT_FIELDS)}; it has {', '.join(columns)}", hint=hint)
    yield from _join((str(row[field]) for row in rows), name)


def _join(texts: Iterator[str], name: str) -> Iterator[tuple[str, str]]:
    total, start, parts = 0, 0, list[str]()
    length = 0
    for number, text in enumerate(texts):
        parts.append(text)
        length += len(text)
        if length >= JOIN_CHARACTERS:
            yield "".join(parts), f"{name}:{start}"
            total, start, parts, length = total + length, number + 1, [], 0
            if total >= MAX_CHARACTERS:
                return
    if parts:
        yield "".join(parts), f"{name}:{start}"
