"""Do the two extra files hold what the record says: the policy, its layers, its tensors?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from moekit.anatomy.probe import MoELayer, decoder_index
from moekit.catalogue import get
from moekit.checking.report import Finding, from_error
from moekit.checkpoint.digest import tensor_digests
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.model import read_extra_tensors
from moekit.checkpoint.record import TENSORS_FILE, Record, TensorExpectation
from moekit.checkpoint.safety import check_name, read_header
from moekit.errors import MoekitError

_HINT = "restore both extra files from a copy, or make the change again"


def check_extras(checkpoint: Checkpoint, layers: list[MoELayer]) -> Iterator[Finding]:
    """Compare moekit.safetensors with the record's digests, and the policy with the layers it governs."""
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
    yield from _check_policy(checkpoint, record, layers)


def _finding(checkpoint: Checkpoint, code: str, message: str, layer: int | None = None) -> Finding:
    file = str(checkpoint.path / TENSORS_FILE)
    return Finding(severity="error", code=code, message=message, file=file, layer=layer, hint=_HINT)


def _layer(name: str) -> int:
    """The layer in "routing.<layer>.<what>" or "layers.<layer>.<what>"."""
    return decoder_index(f".{name}")


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


def _check_policy(checkpoint: Checkpoint, record: Record, layers: list[MoELayer]) -> Iterator[Finding]:
    policy = record.policy
    if policy is None:
        return
    try:
        get("routing", policy.name)
    except MoekitError as error:
        yield from_error(error, "policy-unknown")
    experts = {layer.index: layer.geometry.experts for layer in layers}
    for layer in sorted(set(policy.layers) - experts.keys()):
        yield _finding(checkpoint, "policy-layer", "the record routes this layer, but it is no MoE layer", layer)
    for name, tensor in read_extra_tensors(checkpoint.path).items():
        layer = _layer(name)
        if name.startswith("routing.") and layer in experts and experts[layer] not in tensor.shape:
            message = f"{name} of shape {list(tensor.shape)} is not made for {experts[layer]} experts"
            yield _finding(checkpoint, "policy-layer", message, layer)
