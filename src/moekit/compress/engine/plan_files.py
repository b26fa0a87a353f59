"""How plans lie on disk: a JSON file that a person can read, and a safetensors file of the same name beside it.

The second holds statistics, one tensor for each layer and name, so that a plan can be carried out without the text it
was made from. The first names the second by its digest: a kill between the two files of a plan that replaces another
leaves a pair that is refused, and never old outcomes with new statistics.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import safetensors.torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from moekit._validation import parse_file
from moekit.checkpoint.atomic import atomic_write
from moekit.checkpoint.safety import load_tensors, open_regular, read_header
from moekit.errors import BadCheckpoint, BadConfig, BadData, MoekitError

MAX_PLAN_BYTES = 256 << 20
_AGAIN = "make it again"
# In the header of statistics, so that no other file is taken for one and overwritten.
_MARK = {"moekit": "statistics of a plan"}


class ReadablePart(BaseModel):
    """What every plan's JSON file holds.

    Attributes:
        statistics_sha256: of the file beside it; filled in as both are written.
        text_sha256: of the files that the text was read from; "" where they are not known.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    statistics_sha256: str = ""
    text_sha256: str = ""


F = TypeVar("F", bound=ReadablePart)


def beside(path: Path) -> Path:
    """The file of a plan's statistics."""
    return path.with_suffix(".safetensors")


def flatten(statistics: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Statistics by names of tensors on disk; copies, as the format refuses tensors that share memory."""
    return {
        f"{layer}.{name}": tensor.contiguous().clone()
        for layer, named in statistics.items()
        for name, tensor in named.items()
    }


def write_plan(path: Path, file: ReadablePart, statistics: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Write both files; the JSON comes last and names a whole plan.

    Raises:
        BadConfig: the name does not end in .json, or weights lie where the statistics would.
    """
    if path.suffix != ".json":
        raise BadConfig(f"a plan is a .json file, not {path.name!r}", file=path, hint=f"write to {path.name}.json")
    if beside(path).exists() and not _is_ours(beside(path)):
        raise BadConfig(
            "a file that is no plan's statistics is in the way", file=beside(path), hint="give the plan another name"
        )
    written = safetensors.torch.save(flatten(statistics), metadata=_MARK)
    file = file.model_copy(update={"statistics_sha256": hashlib.sha256(written).hexdigest()})
    atomic_write(beside(path), written)
    atomic_write(path, file.model_dump_json(indent=1) + "\n")


def remove_plan(path: Path) -> None:
    """Take both files of a plan away, as far as they are there."""
    for file in (path, beside(path)):
        file.unlink(missing_ok=True)


def _is_ours(file: Path) -> bool:
    try:
        return read_header(file).metadata.get("moekit") == _MARK["moekit"]
    except MoekitError:
        return False


def read_plan(cls: type[F], path: Path, *, command: str, hint: str = _AGAIN) -> F:
    """The readable part of a plan.

    Args:
        cls: what it should be.
        path: of the JSON file.
        command: that writes such plans, for messages.
        hint: the way out of a damaged one.

    Raises:
        BadData: missing, too large, damaged, or another kind of plan.
    """
    missing = f"`{command} --plan FILE` writes one"
    return parse_file(cls, path, what=f"plan of `{command}`", missing=missing, hint=hint, limit=MAX_PLAN_BYTES)


def read_statistics(path: Path, layers: Iterable[int], sha256: str) -> dict[int, dict[str, Tensor]]:
    """Decoder layer -> statistics by name.

    Args:
        path: of the JSON file.
        layers: that the plan speaks of.
        sha256: of the statistics that it was written with.

    Raises:
        BadData: missing, damaged, of another plan, or of other layers.
        UnsafeInput: a header that lies.
    """
    file = beside(path)
    try:
        read_header(file)
    except (BadCheckpoint, OSError) as error:
        raise BadData(
            f"the statistics of the plan are missing or damaged: {error}",
            file=file,
            hint="keep the .safetensors file beside the .json file of a plan",
        ) from error
    with open_regular(file) as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != sha256:
            raise BadData(
                f"these are not the statistics that {path.name} was written with",
                file=file,
                hint="one of the two files was replaced, or writing them was interrupted; make the plan again",
            )
    named: dict[int, dict[str, Tensor]] = {layer: {} for layer in layers}
    for key, tensor in load_tensors(file).items():
        layer, _, name = key.partition(".")
        if not layer.isdigit() or int(layer) not in named:
            raise BadData(f"damaged plan: a tensor {key!r} that no layer of it has", file=file, hint=_AGAIN)
        named[int(layer)][name] = tensor
    return named


def check_model(made_for: str, fingerprint: str, actual: str, where: str | Path) -> None:
    """Refuse another model than the one that a plan was made for.

    Args:
        made_for: that model, for people.
        fingerprint: of that model.
        actual: fingerprint of the model at hand.
        where: the plan's file, or "".

    Raises:
        BadConfig: naming both fingerprints.
    """
    if fingerprint != actual:
        raise BadConfig(
            f"this plan was made for {made_for} ({fingerprint[:12]}), not for {actual[:12]}",
            file=where or None,
            hint="make a plan for this model: what one model's experts see says nothing of another's",
        )
