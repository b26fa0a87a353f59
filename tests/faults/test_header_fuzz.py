"""Random damage to real shards: our parser answers with a typed error or agrees with safetensors, nothing else."""

import contextlib
import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from moekit.checkpoint.header import read_header
from moekit.errors import BadCheckpoint, UnsafeInput

GOOD = save({"a": torch.ones(3, 2), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.tensor(1, dtype=torch.int64)})
QUIET = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def verdicts(path):
    """(our tensors or None, safetensors' tensors or None)."""
    ours = None
    with contextlib.suppress(BadCheckpoint, UnsafeInput):
        ours = {name: (info.dtype, info.shape) for name, info in read_header(path).tensors.items()}
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            theirs = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError):
        theirs = None
    return ours, theirs


def agree(path, data):
    path.write_bytes(data)
    ours, theirs = verdicts(path)
    if ours is not None:  # what we let through, safetensors reads alike; we may refuse more than it does
        assert ours == theirs


@QUIET
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes(tmp_path, flips):
    data = bytearray(GOOD)
    for position, value in flips:
        data[position] = value
    agree(tmp_path / "x.safetensors", bytes(data))


@QUIET
@given(st.integers(0, len(GOOD)), st.binary(max_size=64))
def test_cut_and_continued_with_noise(tmp_path, cut, tail):
    agree(tmp_path / "x.safetensors", GOOD[:cut] + tail)


NUMBERS = st.one_of(st.integers(-2, 40), st.sampled_from([2**31, 2**53, 2**63, 2**64]))
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64", "BOOL", "F33", ""]),
        "shape": st.lists(NUMBERS, max_size=3),
        "data_offsets": st.lists(NUMBERS, min_size=2, max_size=2),
    }
)


@QUIET
@given(st.dictionaries(st.text(max_size=3), ENTRY, max_size=3), st.integers(0, 40))
def test_made_up_headers(tmp_path, entries, size):
    header = json.dumps(entries).encode()
    agree(tmp_path / "x.safetensors", len(header).to_bytes(8, "little") + header + bytes(size))


@pytest.mark.parametrize("cut", range(0, len(GOOD), 7))
def test_every_truncation_is_bad(tmp_path, cut):
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOOD[:cut])
    with pytest.raises(BadCheckpoint, match="truncated"):
        read_header(path)


def test_the_whole_file_is_good(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(GOOD)
    ours, theirs = verdicts(path)
    assert ours == theirs
    assert set(ours) == {"a", "b", "c"}
