import hashlib
import math
import os
import resource

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moekit.checking import scan as scan_module
from moekit.checking.scan import MatrixScan, scan
from moekit.checking.units import read_unit, unit_digests, unit_matrices, units_of
from moekit.checkpoint.folder import Checkpoint
from moekit.checkpoint.header import read_header
from moekit.errors import BadCheckpoint
from tests.checkpoints import plain


def write(path, tensors):
    save_file(tensors, path / "model.safetensors")
    return read_header(path / "model.safetensors").tensors


def figures(tensor):
    wide = tensor.double()
    return wide.min().item(), wide.max().item(), wide.square().mean().sqrt().item()


DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_figures_and_digests_against_a_plain_reference(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "model.layers.0.mlp.experts.3.up_proj.weight": torch.randn(12, 32, generator=generator).to(dtype),
        "model.layers.1.mlp.experts.gate_up_proj": torch.randn(4, 24, 32, generator=generator).to(dtype),
        "model.embed_tokens.weight": torch.randn(50, 32, generator=generator).to(dtype),
    }
    infos = write(tmp_path, tensors)
    found = scan(tmp_path, infos.values(), hidden=32)
    for name, tensor in tensors.items():
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        assert found[name].sha256 == hashlib.sha256(data).hexdigest()
        slices = tensor if tensor.dim() == 3 else tensor[None]
        assert len(found[name].matrices) == len(slices)
        for matrix, piece in zip(found[name].matrices, slices, strict=True):
            low, high, rms = figures(piece.float())
            assert (matrix.low, matrix.high) == (low, high)
            assert matrix.rms == pytest.approx(rms, rel=1e-5)
    stacked = tensors["model.layers.1.mlp.experts.gate_up_proj"]
    for expert, digest in enumerate(found["model.layers.1.mlp.experts.gate_up_proj"].slices):
        data = stacked[expert].contiguous().view(torch.uint8).numpy().tobytes()
        assert digest == hashlib.sha256(data).hexdigest()
    matrix = found["model.layers.1.mlp.experts.gate_up_proj"].matrices[2]
    expected = [figures(half.float())[2] for half in stacked[2].chunk(2)]
    assert matrix.halves == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(matrix.profile_H, stacked[2].float().norm(dim=0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 999, 4095])
def test_no_nan_is_lost_between_chunks(tmp_path, monkeypatch, bad, position):
    monkeypatch.setattr(scan_module, "_CHUNK", 1024)
    tensor = torch.randn(4096)
    tensor[position] = bad
    (found,) = scan(tmp_path, write(tmp_path, {"x": tensor, "y": torch.ones(3)}).values())["x"].matrices
    assert not found.finite


def test_chunks_add_up(tmp_path, monkeypatch):
    monkeypatch.setattr(scan_module, "_CHUNK", 1024)
    tensor = torch.randn(4096).double()
    found = scan(tmp_path, write(tmp_path, {"x": tensor}).values())["x"]
    assert found.sha256 == hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    assert (found.matrices[0].low, found.matrices[0].high) == (tensor.min().item(), tensor.max().item())
    assert found.matrices[0].rms == pytest.approx(tensor.square().mean().sqrt().item(), rel=1e-3)


def test_stacks_too_large_to_look_at_singly_are_still_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(scan_module, "_WHOLE", 10)
    tensor = torch.randn(4, 8, 8)
    tensor[2, 3, 3] = math.nan
    found = scan(tmp_path, write(tmp_path, {"model.layers.0.mlp.experts.down_proj": tensor}).values(), hidden=8)
    (matrix,) = unit_matrices(found["model.layers.0.mlp.experts.down_proj"]).values()
    assert not matrix.finite


def test_integers_and_bytes(tmp_path):
    tensors = {"i": torch.tensor([-3, 5]), "u": torch.tensor([7, 255], dtype=torch.uint8), "b": torch.tensor([True])}
    found = scan(tmp_path, write(tmp_path, tensors).values())
    assert (found["i"].matrices[0].low, found["u"].matrices[0].high) == (-3, 255)
    assert found["b"].matrices == ()


def test_empty_tensors(tmp_path):
    found = scan(tmp_path, write(tmp_path, {"e": torch.zeros(0, 4), "x": torch.ones(1)}).values())
    assert found["e"].matrices == ()


def test_zero_and_finite():
    assert MatrixScan(0.0, 0.0, 0.0).zero
    assert not MatrixScan(0.0, 1.0, 0.5).zero
    assert not MatrixScan(math.nan, math.nan, math.nan).zero


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    infos = write(tmp_path, {"x": torch.randn(4096)})
    os.truncate(tmp_path / "model.safetensors", 1000)
    with pytest.raises(BadCheckpoint, match="shorter"):
        scan(tmp_path, infos.values())


def test_progress_counts_bytes(tmp_path):
    class Bar:
        def start(self, label, total):
            self.total, self.done, self.finished = total, 0, False

        def advance(self, amount=1, note=""):
            self.done += amount

        def finish(self):
            self.finished = True

    bar = Bar()
    scan(tmp_path, write(tmp_path, {"x": torch.randn(64), "y": torch.randn(8)}).values(), progress=bar)
    assert bar.total == bar.done == 72 * 4
    assert bar.finished


@pytest.mark.parametrize("fused", [False, True], ids=["split", "fused"])
def test_units_read_the_same_matrix_from_both_layouts(tmp_path, fused):
    checkpoint = Checkpoint.open(plain(tmp_path / "model", "olmoe", fused=fused))
    found = scan(checkpoint.path, checkpoint.tensors.values())
    downs = {
        (unit.layer, unit.expert): read_unit(checkpoint, unit)
        for info in checkpoint.tensors.values()
        for unit in units_of(info)
        if unit.part == "down"
    }
    reference = Checkpoint.open(plain(tmp_path / "split", "olmoe"))
    assert len(downs) == 16
    for (layer, expert), matrix in downs.items():
        assert torch.equal(matrix, reference.read(f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight"))
    digests = {unit: digest for one in found.values() for unit, digest in unit_digests(one).items()}
    for unit, digest in digests.items():
        data = read_unit(checkpoint, unit).contiguous().numpy().tobytes()
        assert digest == hashlib.sha256(data).hexdigest()


def test_memory_does_not_grow_with_the_file(tmp_path):
    """200 MB are read in a child whose peak grows by far less."""
    infos = write(tmp_path, {f"t{i}": torch.from_numpy(np.ones(5_000_000, dtype=np.float32)) for i in range(10)})
    pid = os.fork()
    if pid == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        scan(tmp_path, [info for info in infos.values() for _ in range(3)])
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        os._exit(0 if grown < 250_000_000 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
