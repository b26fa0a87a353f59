"""Traces in memory and on disk."""

from __future__ import annotations

import errno
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moekit.errors import BadConfig, BadData, MoekitError, OutOfBudget, UnsafeInput
from moekit.trace import Trace, TraceMeta
from moekit.trace.meta import index_dtype, tokenizer_hash
from moekit.trace.tokens import RUN_DTYPES, TokenLabels
from tests.unit.trace.samples import labels_of, random_trace, same_statistics, same_trace


@pytest.mark.parametrize("weights", [False, True])
def test_what_is_saved_comes_back(tmp_path: Path, weights: bool) -> None:
    trace = random_trace(weights=weights)
    trace.save(tmp_path / "trace")
    assert sorted(p.name for p in (tmp_path / "trace").iterdir()) == ["trace.json", "trace.safetensors"]
    back = Trace.load(tmp_path / "trace")
    same_trace(trace, back)
    same_statistics(trace.statistics, back.statistics)
    assert back.digest == trace.digest
    assert back.meta == trace.meta
    assert torch.equal(back.indices(3), trace.indices(3))
    assert back.indices(3).dtype == torch.int64
    if weights:
        assert back.weights(1) is not None
        assert back.weights(1).dtype == torch.float32  # type: ignore[union-attr]
    else:
        assert back.weights(1) is None
    for name in ("sequence_N", "document_N", "domain_N", "position_N", "phase_N"):
        assert torch.equal(getattr(back, name), getattr(trace, name))
        assert getattr(back, name).dtype == TokenLabels.DTYPES[name]


@pytest.mark.parametrize(("experts", "size"), [(8, 1), (255, 1), (256, 2), (512, 2)])
def test_a_choice_takes_one_byte_up_to_255_experts(tmp_path: Path, experts: int, size: int) -> None:
    trace = random_trace(experts=experts, top_k=4, layers=[0], lengths=[5000], statistics=(), weights=False)
    trace._indices[0][0] = experts  # no expert, still in the same type
    assert index_dtype(experts).itemsize == size
    trace.save(tmp_path / "trace")
    assert Trace.load(tmp_path / "trace").indices(0)[0].tolist() == [experts] * 4
    total = sum(file.stat().st_size for file in (tmp_path / "trace").iterdir())
    assert size <= total / (5000 * 4) < size + 0.1, "labels and description must cost next to nothing"


def test_statistics_alone_are_a_trace(tmp_path: Path) -> None:
    trace = random_trace(keep=False)
    trace.save(tmp_path / "trace")
    back = Trace.load(tmp_path / "trace")
    same_statistics(back.statistics, trace.statistics)
    with pytest.raises(BadData, match="statistics only"):
        back.indices(1)
    with pytest.raises(BadData, match="statistics only"):
        _ = back.document_N


def test_an_empty_trace_comes_back(tmp_path: Path) -> None:
    trace = random_trace(lengths=[])
    trace.save(tmp_path / "trace")
    back = Trace.load(tmp_path / "trace")
    assert back.meta.tokens == 0
    assert back.indices(1).shape == (0, 2)
    assert back.warnings == ["layer 1: no tokens", "layer 3: no tokens"]


def test_an_existing_folder_is_not_overwritten_unasked(tmp_path: Path) -> None:
    random_trace(0).save(tmp_path / "trace")
    with pytest.raises(BadConfig):
        random_trace(1).save(tmp_path / "trace")
    assert Trace.load(tmp_path / "trace").digest == random_trace(0).digest
    random_trace(1).save(tmp_path / "trace", overwrite=True)
    assert Trace.load(tmp_path / "trace").digest == random_trace(1).digest


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    random_trace(0).save(tmp_path / "trace")
    monkeypatch.setattr("safetensors.torch.save_file", full)
    for target in ("trace", "new"):
        with pytest.raises(OutOfBudget):
            random_trace(1).save(tmp_path / target, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["trace"]
    assert Trace.load(tmp_path / "trace").digest == random_trace(0).digest


def test_another_model_is_refused() -> None:
    trace = random_trace()
    trace.check_model("model-a")
    trace.check_model("")
    with pytest.raises(BadData, match="model-b"):
        trace.check_model("model-b")


def edit(folder: Path, **changes: object) -> None:
    file = folder / "trace.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_damaged_descriptions_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "trace"
    with pytest.raises(BadData, match="no trace here"):
        Trace.load(folder)
    random_trace().save(folder)
    for changes, complaint in [
        ({"tokens": 13}, "layers.1.indices"),
        ({"top_k": [1, 2]}, "layers.1.indices"),
        ({"top_k": [2, 9]}, "choices"),
        ({"experts": [300, 6]}, "layers.1.indices"),
        ({"layers": [1, 4]}, "missing"),
        ({"layers": [3, 1]}, "ascending"),
        ({"has_weights": False}, "nobody described"),
        ({"statistics": ["load"]}, "nobody described"),
        ({"domains": ["a"]}, "statistics.1.domain_load"),
        ({"hidden": -1}, "hidden"),
        ({"surprise": 1}, "surprise"),
        ({"format": 2}, "format"),
    ]:
        random_trace().save(folder, overwrite=True)
        edit(folder, **changes)
        with pytest.raises(BadData, match=complaint) as caught:
            Trace.load(folder)
        assert caught.value.file is not None
        assert caught.value.hint
    (folder / "trace.json").write_text("[" * 100_000)
    with pytest.raises(BadData, match="damaged"):
        Trace.load(folder)


def test_damaged_tensors_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "trace"
    random_trace().save(folder)
    file = folder / "trace.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5])
    with pytest.raises(BadData, match="truncated"):
        Trace.load(folder)
    file.write_bytes(struct.pack("<Q", 1 << 63) + whole[8:])
    with pytest.raises(UnsafeInput):
        Trace.load(folder)
    file.unlink()
    with pytest.raises(BadData):
        Trace.load(folder)


def change(folder: Path, name: str, value: torch.Tensor) -> None:
    tensors = load_file(folder / "trace.safetensors")
    save_file({**tensors, name: value}, folder / "trace.safetensors")


def test_impossible_numbers_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "trace"
    trace = random_trace()

    def refused(name: str, value: torch.Tensor, complaint: str) -> None:
        trace.save(folder, overwrite=True)
        change(folder, name, value)
        with pytest.raises(MoekitError, match=complaint):
            Trace.load(folder)

    refused(
        "layers.3.indices", torch.full((12, 2), 7, dtype=torch.uint8), "layer 3: damaged trace: experts outside 0..6"
    )
    refused("run_length", torch.tensor([4, 1, 8], dtype=torch.int32), "runs hold 13 tokens")
    refused("run_length", torch.tensor([4, -1, 9], dtype=torch.int32), "runs hold 12 tokens")
    refused("run_domain", torch.tensor([0, 1, 2], dtype=torch.int16), "domains outside 0..1")
    refused("run_domain", torch.tensor([0, 1], dtype=torch.int16), "different lengths")
    refused("run_phase", torch.zeros(3, 1, dtype=torch.uint8), r"not U8 \[number of runs\]")
    # Whatever reads the file converts silently: 4-bit floats, halves and wide integers are labels of nothing.
    refused("run_phase", torch.zeros(3, dtype=torch.float4_e2m1fn_x2), "run_phase is F4")
    refused("run_domain", torch.zeros(3, dtype=torch.bfloat16), "run_domain is BF16")
    refused("run_length", torch.tensor([4, 1, 7]), "run_length is I64")
    refused("layers.1.weights", torch.zeros(12, 2), "F32")


def test_labels_as_runs() -> None:
    labels = labels_of([3, 1, 2], [0, 0, 1])
    runs = labels.encode()
    assert runs["run_length"].tolist() == [3, 1, 2]
    assert runs["run_position"].tolist() == [0, 0, 0]
    assert set(runs) == {f"run_{name}" for name in RUN_DTYPES}
    odd = labels[torch.tensor([2, 0, 1, 5])]  # any order survives
    for case in (labels, odd, TokenLabels.empty()):
        back = TokenLabels.decode(case.encode(), len(case))
        for name in TokenLabels.DTYPES:
            assert torch.equal(getattr(back, name), getattr(case, name)), name


def test_select_keeps_what_choices_tell() -> None:
    trace = random_trace(statistics=("basic", "gate_mass"))
    part = trace.select(domain="a")
    assert part.meta.tokens == 11
    assert part.document_N.unique().tolist() == [0, 2]
    assert torch.equal(part.indices(1), trace.indices(1)[trace.domain_N == 0])
    same_statistics(part.statistics, part.require(trace.meta.statistics))
    assert part.statistics is not None
    assert int(part.statistics[1]["load"].sum()) == 22
    assert [(e.domain, e.documents, e.tokens) for e in part.meta.data] == [("a", 2, 11)]
    assert trace.select(document=1).meta.tokens == 1
    assert trace.select(phase=1).meta.tokens == 0
    with pytest.raises(BadData, match="no domain 'c'"):
        trace.select(domain="c")


def test_statistics_are_computed_from_kept_choices() -> None:
    bare = random_trace(statistics=())
    known = random_trace(statistics=("basic", "gate_mass"))
    same_statistics(bare.require(("basic", "gate_mass")), known.statistics)
    assert bare.statistics is None
    assert list(bare.require(["choices", "load"])[1]) == ["load"]


def test_what_a_trace_cannot_tell_is_named() -> None:
    with pytest.raises(BadData, match="'output_norm'"):
        random_trace().require(("load", "output_norm"))
    with pytest.raises(BadData, match="'gate_mass'"):
        random_trace(weights=False, statistics=("load",)).require("gate_mass")
    with pytest.raises(BadData, match="statistics only"):
        random_trace(keep=False).require(("choices",))
    with pytest.raises(BadData, match="no gate weights"):
        random_trace(weights=False).require(("weights",))
    with pytest.raises(BadConfig, match="lod"):
        random_trace().require(("lod",))
    assert random_trace(keep=False).require(("load",))[1]["load"].sum() == 24
    with pytest.raises(BadData, match="layer 2"):
        random_trace().indices(2)


def test_merge_renumbers_and_refuses_strangers() -> None:
    first, second = random_trace(0), random_trace(1, domains=("b", "c"), lengths=(2, 3))
    both = Trace.merge([first, second])
    assert both.meta.tokens == 17
    assert both.meta.domains == ["a", "b", "c"]
    assert both.document_N.unique().tolist() == [0, 1, 2, 3, 4]
    assert both.sequence_N.unique().tolist() == [0, 1, 2, 3, 4]
    assert both.domain_N[-5:].tolist() == [1, 1, 2, 2, 2]
    assert both.meta.seed is None
    assert {(e.domain, e.documents, e.tokens) for e in both.meta.data} == {("a", 2, 11), ("b", 2, 3), ("c", 1, 3)}
    same_statistics(both.statistics, both.require(both.meta.statistics))
    for other, complaint in [
        (random_trace(fingerprint="model-b"), "fingerprint"),
        (random_trace(experts=7), "experts"),
        (random_trace(layers=(1, 2)), "layers"),
        (random_trace(weights=False), "has_weights"),
        (random_trace(statistics=("load",)), "statistics"),
    ]:
        with pytest.raises(BadData, match=complaint):
            Trace.merge([first, other])
    with pytest.raises(BadData, match="no trace"):
        Trace.merge([])


def test_ranks_that_share_a_text_keep_its_document_numbers() -> None:
    both = Trace.merge([random_trace(0), random_trace(1)], documents="shared")
    assert both.document_N.unique().tolist() == [0, 1, 2]
    assert both.sequence_N.unique().tolist() == [0, 1, 2, 3, 4, 5]
    assert {(e.domain, e.documents) for e in both.meta.data} == {("a", 2), ("b", 1)}


def test_digest_changes_with_what_was_recorded() -> None:
    trace = random_trace()
    changed = random_trace()
    changed._indices[1][0, 0] = (changed._indices[1][0, 0] + 1) % 6
    assert trace.digest == random_trace().digest != changed.digest


def test_a_description_must_be_consistent() -> None:
    good = random_trace().meta.model_dump()
    for change_ in ({"layers": []}, {"experts": [6]}, {"domains": ["a", "a"]}, {"has_choices": False}):
        with pytest.raises(ValueError, match=r"layers|domains|weights"):
            TraceMeta(**good | change_)


class Vocabulary:
    """Stands for a tokenizer: only its vocabulary is read."""

    def __init__(self, pieces: dict[str, int]) -> None:
        self.pieces = pieces

    def get_vocab(self) -> dict[str, int]:
        return self.pieces


def test_tokenizers_are_told_apart() -> None:
    first, same = Vocabulary({"a": 0, "b": 1}), Vocabulary({"b": 1, "a": 0})
    assert tokenizer_hash(first) == tokenizer_hash(same)  # type: ignore[arg-type]
    assert tokenizer_hash(first) != tokenizer_hash(Vocabulary({"a": 1, "b": 0}))  # type: ignore[arg-type]
