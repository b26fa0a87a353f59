"""Do the two extra files hold what the record says: the parts, their layers, their tensors?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from torch import Tensor

from moekit.anatomy.probe import MoELayer, decoder_index
from moekit.checking.report import Finding, from_error
from moekit.checkpoint.digest import tensor_digests
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.model import read_extra_tensors
from moekit.checkpoint.parts import PartTensor
from moekit.checkpoint.record import TENSORS_FILE, Record, TensorExpectation
from moekit.checkpoint.safety import check_name, read_header
from moekit.errors import MoekitError
from moekit.runtime.axes import check_axes
from moekit.runtime.saved import make_part

_HINT = "restore both extra files from a copy, or make the change again"


def check_extras(checkpoint: Checkpoint, layers: list[MoELayer]) -> Iterator[Finding]:
    """Compare moekit.safetensors with the record's digests, and the parts with the layers they are attached to."""
    record = checkpoint.record
    if record is None:
        return
    path = check_name(checkpoint.path, TENSORS_FILE)
    expected = record.expectations.extra
    if not path.exists():
        if expected:
            yield _finding(checkpoint, "policy-missing", f"{TENSORS_FILE} is missing: the policy cannot be restored")
        return
    try:
        header = read_header(path)
        found = tensor_digests(checkpoint.path, header.tensors.values())
    except MoekitError as error:
        yield from_error(error, "policy-unreadable")
        return
    yield from _compare(checkpoint, expected, found)
    yield from _check_parts(checkpoint, record, layers)


def _finding(checkpoint: Checkpoint, code: str, message: str, layer: int | None = None) -> Finding:
    file = str(checkpoint.path / TENSORS_FILE)
    return Finding(severity="error", code=code, message=message, file=file, layer=layer, hint=_HINT)


def _layer(name: str) -> int:
    """The layer of a part's tensor, or the one in "layers.<layer>.<what>"."""
    key = PartTensor.parse(name)
    return decoder_index(f".{name}") if key is None or key.layer is None else key.layer


def _compare(
    checkpoint: Checkpoint, expected: dict[str, TensorExpectation], found: dict[str, TensorExpectation]
) -> Iterator[Finding]:
    homes: dict[str, list[str]] = defaultdict(list)
    for name, expectation in expected.items():
        homes[expectation.sha256].append(name)
    for name in sorted(expected.keys() - found.keys()):
        yield _finding(checkpoint, "policy-tensor-missing", f"{name} is missing", _layer(name))
    for name in sorted(found.keys() - expected.keys()):
        yield _finding(checkpoint, "policy-tensor-surplus", f"{name} is not in the record", _layer(name))
    for name in sorted(expected.keys() & found.keys()):
        if found[name] == expected[name]:
            continue
        others = [other for other in homes[found[name].sha256] if other != name]
        if others:
            message = f"{name} holds what the record has for layer {_layer(others[0])} ({others[0]})"
            yield _finding(checkpoint, "policy-of-another-layer", message, _layer(name))
        else:
            yield _finding(checkpoint, "policy-tensor-changed", f"{name} is not what was recorded", _layer(name))


def _check_parts(checkpoint: Checkpoint, record: Record, layers: list[MoELayer]) -> Iterator[Finding]:
    geometry = {layer.index: layer.geometry for layer in layers}
    named: dict[tuple[int, int], dict[str, Tensor]] = defaultdict(dict)
    for text, tensor in read_extra_tensors(checkpoint.path).items():
        key = PartTensor.parse(text)
        if key is not None and key.layer is not None:
            named[key.part, key.layer][key.name] = tensor
    for number, entry in enumerate(record.parts):
        try:
            part = make_part(entry)
        except MoekitError as error:
            yield from_error(error, "policy-unknown")
            continue
        for layer in entry.layers:
            if layer not in geometry:
                message = f"the record has {entry.kind} {entry.name!r} in this layer, but it is no MoE layer"
                yield _finding(checkpoint, "policy-layer", message, layer)
                continue
            try:
                check_axes(named[number, layer], part.axes, geometry[layer], layer)
            except MoekitError as error:
                yield _finding(checkpoint, "policy-layer", str(error), layer)
