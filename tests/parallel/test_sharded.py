"""Sharded checkpoints: any number of ranks, any placement, the optimizer's state, plain folders, and faults."""

from __future__ import annotations

import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

import moekit
from moekit.checkpoint import Checkpoint
from moekit.errors import BadCheckpoint, BadConfig, UnsafeInput
from moekit.parallel import load_sharded, save_sharded
from moekit.parallel.checkpoints import reshard
from moekit.parallel.checkpoints.index import INDEX_FILE, Index
from moekit.placement import Placement
from tests.checkpoints import edit_json, edit_shard
from tests.families import EXPERTS, FAMILIES, build, logits
from tests.parallel.jobs import tiny
from tests.parallel.pool import Pool
from tests.parallel.sharded_jobs import Run, die_while_saving, failure
from tests.processes import free_port, warm
from tests.tiny import tokenizer

JOBS = "tests.parallel.sharded_jobs"


def placed(size: int, seed: int, family: str = "qwen2_moe") -> Placement:
    """A random placement, uneven as a rule."""
    generator = torch.Generator().manual_seed(seed)
    layers = range(build(family).config.get_text_config().num_hidden_layers)
    groups = {n: torch.randint(size, (EXPERTS,), generator=generator).tolist() for n in layers}
    return Placement(devices=size, experts=EXPERTS, layers=groups, solver="random")


def joined(answers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """States of all ranks as one."""
    return {key: tensor for answer in answers for key, tensor in answer.items()}


def close(one: dict[str, Tensor], two: dict[str, Tensor], limit: float) -> None:
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        assert (tensor.double() - two[key].double()).abs().max() <= limit, key


@pytest.fixture(scope="module")
def saved(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint of four ranks in a random placement, and what it must hold."""
    folder = tmp_path_factory.mktemp("sharded") / "four"
    answers = pool.run(4, f"{JOBS}.train_and_save", folder, "qwen2_moe", placed(4, 1))
    return folder, joined(answers)


@pytest.fixture
def copied(saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> Path:
    """The same, to be damaged."""
    import shutil

    return Path(shutil.copytree(saved[0], tmp_path / "copy"))


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "deepseek_v3", "granitemoe"])
def test_a_run_goes_from_four_ranks_to_two_to_one_as_if_unbroken(pool: Pool, tmp_path: Path, family: str) -> None:
    four, two = tmp_path / "four", tmp_path / "two"
    first = joined(pool.run(4, f"{JOBS}.train_and_save", four, family, placed(4, 1, family)))
    answers = pool.run(2, f"{JOBS}.resume", four, family, placed(2, 2, family), target=two)
    close(joined([found for found, _ in answers]), first, 0)
    second = joined([after for _, after in answers])
    [(found, after)] = pool.run(1, f"{JOBS}.resume", two, family, whole=True)
    close(found, second, 0)
    unbroken = Run(family)
    unbroken.steps(0, 3)
    # Sums in another order differ in the last digits; anything forgotten, by about the learning rate.
    close(after, unbroken.state(), 1e-6)
    assert any(key.startswith("optimizer/exp_avg_sq/") and ".experts.7." in key for key in after)


@pytest.mark.full
@pytest.mark.slow
def test_the_same_ranks_go_on_bit_for_bit(pool: Pool, tmp_path: Path, saved: tuple[Path, dict[str, Tensor]]) -> None:
    unbroken = joined(pool.run(4, f"{JOBS}.train_and_save", tmp_path / "two-steps", "qwen2_moe", placed(4, 1), 2))
    answers = pool.run(4, f"{JOBS}.resume", saved[0], "qwen2_moe", placed(4, 1))
    close(joined([after for _, after in answers]), unbroken, 0)


@pytest.mark.full
@pytest.mark.slow
def test_fewer_experts_than_fill_all_ranks_and_scalars_of_whole_models(pool: Pool, tmp_path: Path) -> None:
    lonely = Placement(devices=4, experts=EXPERTS, layers={0: [3] * 8, 1: [0] * 7 + [2]}, solver="random")
    first = joined(pool.run(4, f"{JOBS}.train_and_save", tmp_path / "a", "qwen2_moe", lonely))
    answers = pool.run(4, f"{JOBS}.resume", tmp_path / "a", "qwen2_moe", lonely, steps=0, target=tmp_path / "b")
    close(joined([found for found, _ in answers]), first, 0)
    run = Run("qwen2_moe", seed=1)
    assert load_sharded(run.model, tmp_path / "b", optimizer=run.optimizer).ranks == 4
    close(run.state(), first, 0)
    assert run.optimizer.param_groups[0]["lr"] == 1e-3
    assert run.optimizer.param_groups[1]["weight_decay"] == 0


@pytest.mark.full
@pytest.mark.slow
def test_dense_parameters_dealt_out_by_fsdp_are_written_in_parts(
    pool: Pool, tmp_path: Path, saved: tuple[Path, dict[str, Tensor]]
) -> None:
    folder, expected = saved
    answers = pool.run(4, f"{JOBS}.dense_dealt_out", folder, tmp_path / "fsdp", "qwen2_moe")
    close(joined(answers), expected, 0)
    index = Index.read(tmp_path / "fsdp")
    assert len(index.tensors["weights/model.embed_tokens.weight"].chunks) == 4
    run = Run("qwen2_moe", seed=1)
    load_sharded(run.model, tmp_path / "fsdp", optimizer=run.optimizer)
    close(run.state(), expected, 0)
    reshard.reshard(tmp_path / "fsdp", tmp_path / "two", ranks=2)
    close(joined([a for a, _ in pool.run(2, f"{JOBS}.resume", tmp_path / "two", "qwen2_moe", steps=0)]), expected, 0)


def test_everything_is_written_once_and_dealt_out(saved: tuple[Path, dict[str, Tensor]]) -> None:
    folder, expected = saved
    index = Index.read(folder)
    assert index.ranks == 4
    assert index.tensors.keys() == expected.keys()
    total = sum(tensor.numel() * tensor.element_size() for tensor in expected.values())
    on_disk = {shard: (folder / shard).stat().st_size for shard in index.shards}
    assert len(on_disk) == 4
    assert total < sum(on_disk.values()) < 1.2 * total
    dense = [
        len([k for k in index.of_shard(shard).values() if index.expert_of(k)[1] is None]) for shard in index.shards
    ]
    assert min(dense) > 0
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    owner = placed(4, 1).layers[1]
    for rank, shard in enumerate(index.shards):
        with safe_open(folder / shard, framework="pt") as file:
            names = [name for name in file.keys() if "layers.1.mlp.experts." in name]  # noqa: SIM118
        here = {int(name.split(".experts.")[1].split(".")[0]) for name in names}
        assert here == {expert for expert, owned_by in enumerate(owner) if owned_by == rank}


def test_pickles_in_the_folder_are_not_opened(copied: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (copied / "sprung",)

    (copied / ".metadata").write_bytes(pickle.dumps(Trap()))
    run = Run("qwen2_moe")
    load_sharded(run.model, copied, optimizer=run.optimizer)
    assert not (copied / "sprung").exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_folder_is_what_stock_transformers_opens(tmp_path: Path, family: str) -> None:
    model = build(family)
    save_sharded(model, tmp_path / "sharded", tokenizer=tokenizer())
    record = reshard.plain(tmp_path / "sharded", tmp_path / "plain", max_shard_bytes=100_000)
    stock, info = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    # Weights bit for bit; kernels may add up in another order where a file puts a matrix at another address.
    close(dict(stock.state_dict()), dict(model.state_dict()), 0)
    torch.testing.assert_close(logits(stock), logits(model), rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "by-transformers")
    assert record.fingerprint == Checkpoint.open(tmp_path / "by-transformers").fingerprint
    assert (tmp_path / "plain" / "tokenizer.json").exists()


def test_a_plain_folder_of_four_ranks_has_their_model(tmp_path: Path, saved: tuple[Path, dict[str, Tensor]]) -> None:
    run = Run("qwen2_moe")
    load_sharded(run.model, saved[0])
    reshard.plain(saved[0], tmp_path / "plain")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", experts_implementation="eager")
    assert stock.dtype == torch.float64
    assert torch.equal(logits(stock), logits(run.model))


def test_the_routing_policy_comes_along(pool: Pool, tmp_path: Path) -> None:
    pool.run(2, f"{JOBS}.train_and_save", tmp_path / "two", "olmoe", policy=True)
    reshard.plain(tmp_path / "two", tmp_path / "plain")
    run = Run("olmoe", seed=1, policy=True)
    load_sharded(run.model, tmp_path / "two")
    routed = moekit.load(tmp_path / "plain", device="cpu")
    routed.set_experts_implementation("eager")
    assert torch.equal(logits(routed), logits(run.model))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", experts_implementation="eager")
    assert not torch.equal(logits(stock), logits(run.model))


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.parametrize("with_placement", [False, True])
def test_resharded_files_hold_the_experts_of_their_rank(
    pool: Pool, tmp_path: Path, saved: tuple[Path, dict[str, Tensor]], with_placement: bool
) -> None:
    folder, expected = saved
    placement = placed(2, 7) if with_placement else None
    index = reshard.reshard(folder, tmp_path / "two", ranks=2, placement=placement)
    owner = placement.layers[0] if placement else [0] * 4 + [1] * 4
    for rank, shard in enumerate(index.shards):
        places = {index.expert_of(key) for key in index.of_shard(shard).values()}
        assert {e for layer, e in places if layer == 0} == {e for e, owned_by in enumerate(owner) if owned_by == rank}
    sizes = [(tmp_path / "two" / shard).stat().st_size for shard in index.shards]
    assert with_placement or max(sizes) < 1.1 * min(sizes)
    answers = pool.run(2, f"{JOBS}.resume", tmp_path / "two", "qwen2_moe", placement, steps=0)
    close(joined([found for found, _ in answers]), expected, 0)


class Counting(torch.optim.Optimizer):
    """Keeps a Python number, and nothing for what it has not updated."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1.0})

    def step(self, closure: Any = None) -> None:
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            state = self.state[parameter]
            state["count"] = state.get("count", 0) + 1
            state["ratio"] = 0.1 * state["count"]
            state["unused"] = None


def test_states_that_are_python_numbers_come_back_as_such(tmp_path: Path) -> None:
    run = Run("olmoe")
    optimizer = Counting(run.model.parameters())
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(3):
        optimizer.step()
    save_sharded(run.model, tmp_path / "x", optimizer=optimizer)
    other = Counting(run.model.parameters())
    load_sharded(run.model, tmp_path / "x", optimizer=other)
    states = [other.state[p] for p in run.model.parameters()]
    assert all(type(s["count"]) is int and s["count"] == 3 for s in states)
    assert all(type(s["ratio"]) is float and s["ratio"] == 0.1 * 3 for s in states)


def test_experts_that_never_had_a_gradient_begin_at_zero(
    pool: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = joined(pool.run(2, f"{JOBS}.train_some", tmp_path / "x", "olmoe"))
    assert "optimizer/exp_avg/model.layers.0.mlp.experts.7.down_proj" not in first
    run = Run("olmoe", seed=1)
    load_sharded(run.model, tmp_path / "x", optimizer=run.optimizer)
    assert "the largest counts" in caplog.text
    found = run.state()
    close({key: found[key] for key in first}, first, 0)
    for expert in range(4, 8):
        assert not found[f"optimizer/exp_avg/model.layers.0.mlp.experts.{expert}.down_proj"].any()


@pytest.mark.parametrize("full", [0, 2])
def test_a_full_disk_on_one_rank_is_told_by_all(pool: Pool, tmp_path: Path, full: int) -> None:
    answers = pool.run(4, f"{JOBS}.save_on_small_disk", tmp_path / "out", "qwen2_moe", full, 20_000)
    for kind, text in answers:
        assert kind == "OutOfBudget"
        assert f"rank {full}: the disk is full" in text
    assert list(tmp_path.iterdir()) == []
    assert {kind for kind, _ in pool.run(4, f"{JOBS}.save_over", tmp_path / "out", "qwen2_moe")} == {""}


def test_too_little_room_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moekit.parallel.checkpoints import storage as sharded_storage

    monkeypatch.setattr(sharded_storage.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    monkeypatch.setattr(sharded_storage, "write_shard", None)
    kind, text = failure(lambda: save_sharded(build("olmoe"), tmp_path / "out"))
    assert kind == "OutOfBudget"
    assert "1,000 bytes are free" in text
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_stays_one_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moekit.parallel.checkpoints import storage as sharded_storage

    def interrupt(*args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(sharded_storage, "write_shard", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_sharded(build("olmoe"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_stays(pool: Pool, saved: tuple[Path, dict[str, Tensor]]) -> None:
    before = (saved[0] / INDEX_FILE).read_bytes()
    for kind, text in pool.run(2, f"{JOBS}.save_over", saved[0], "qwen2_moe"):
        assert (kind, "the folder exists" in text, "rank 0" in text) == ("BadConfig", True, True)
    assert (saved[0] / INDEX_FILE).read_bytes() == before


def test_saving_from_some_of_the_ranks_is_refused(pool: Pool, tmp_path: Path) -> None:
    answers = pool.run(2, f"{JOBS}.save_partly", tmp_path / "out", "qwen2_moe")
    assert [(kind, "layer 0, expert" in text) for kind, text in answers] == [("BadConfig", True)] * 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dying", [0, 1])
def test_a_rank_killed_while_saving_leaves_nothing_and_ends_the_other(tmp_path: Path, dying: int) -> None:
    context = warm()
    port, target = free_port(), tmp_path / "out"
    pipes, processes = [], []
    for rank in range(2):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=die_while_saving, args=(rank, port, str(target), dying, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    started = time.monotonic()
    assert pipes[1 - dying].poll(60)
    kind, text = pipes[1 - dying].recv()
    assert time.monotonic() - started < 60
    for process in processes:
        process.join(120)
        process.kill()
    assert kind == "PeerLost"
    assert f"rank {dying} is gone" in text
    assert not target.exists()
    run = Run("qwen2_moe")
    save_sharded(run.model, target)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    load_sharded(run.model, target)


def load_fails(folder: Path, kind: type[Exception], *words: str) -> None:
    run = Run("qwen2_moe", seed=1)
    before = run.state()
    with pytest.raises(kind) as error:
        load_sharded(run.model, folder, optimizer=run.optimizer)
    for word in words:
        assert word in str(error.value)
    close(run.state(), before, 0)


def test_a_missing_shard_is_named_with_what_it_holds(pool: Pool, copied: Path) -> None:
    name = f"rank-{placed(4, 1).layers[0][0]:05d}-of-00004.safetensors"
    (copied / name).unlink()
    load_fails(copied, BadCheckpoint, name, "layer 0, expert 0", "the shard is missing", "of layers 0-1")
    for kind, text in pool.run(2, f"{JOBS}.load_and_fail", copied, "qwen2_moe"):
        assert kind == "BadCheckpoint"
        assert name in text


def test_a_truncated_shard_is_refused_before_loading(copied: Path) -> None:
    shard = copied / "rank-00001-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    load_fails(copied, BadCheckpoint, shard.name, "truncated")


def test_files_of_two_checkpoints_are_not_mixed(copied: Path) -> None:
    key = next(k for k in Index.read(copied).of_shard("rank-00000-of-00004.safetensors") if ".experts." in k)
    edit_shard(copied / "rank-00000-of-00004.safetensors", lambda tensors: tensors.pop(key))
    load_fails(copied, BadCheckpoint, "contradict", "layer ", "expert ")


def test_an_index_without_an_expert_names_it(copied: Path) -> None:
    path = "weights/model.layers.1.mlp.experts.5.down_proj"
    edit_json(copied / INDEX_FILE, lambda index: index["tensors"].pop(path))
    load_fails(copied, BadCheckpoint, "layer 1, expert 5", "down_proj")


@pytest.mark.parametrize("box", [([1, 0], [5, 32]), ([0, 0], [3, 32]), ([-1, 0], [8, 32])])
def test_boxes_that_do_not_fill_a_tensor_are_refused(copied: Path, box: tuple[list[int], list[int]]) -> None:
    def change(index: Any) -> None:
        chunk = index["tensors"]["weights/model.layers.0.mlp.gate.weight"]["chunks"][0]
        chunk["offset"], chunk["shape"] = box

    edit_json(copied / INDEX_FILE, change)
    load_fails(copied, BadCheckpoint, "do not make up the whole")


def test_names_that_leave_the_folder_are_refused(copied: Path) -> None:
    def change(index: Any) -> None:
        for entry in index["tensors"].values():
            for chunk in entry["chunks"]:
                chunk["shard"] = "../" + chunk["shard"]

    edit_json(copied / INDEX_FILE, change)
    load_fails(copied, UnsafeInput, "leads out of the folder")


def test_no_sharded_checkpoint_at_all(tmp_path: Path) -> None:
    load_fails(tmp_path, BadCheckpoint, "no sharded checkpoint")


@pytest.mark.parametrize(
    ("family", "overrides", "words"),
    [
        ("mixtral", {}, "qwen2_moe"),
        ("qwen2_moe", {"num_experts": 6}, "8 experts"),
        ("qwen2_moe", {"num_hidden_layers": 3}, "layers.2"),
        ("qwen2_moe", {"vocab_size": 64}, "[64, 32]"),
    ],
)
def test_another_model_is_refused(
    saved: tuple[Path, dict[str, Tensor]], family: str, overrides: dict[str, Any], words: str
) -> None:
    with pytest.raises(BadConfig, match=words.replace("[", r"\[").replace("]", r"\]")):
        load_sharded(tiny(family, overrides=overrides).double(), saved[0])


def test_optimizers_that_do_not_fit_are_refused(saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    run = Run("qwen2_moe")
    with pytest.raises(BadConfig, match="groups"):
        load_sharded(run.model, saved[0], optimizer=torch.optim.AdamW(run.model.parameters()))
    with pytest.raises(BadConfig, match="does not have"):
        save_sharded(run.model, tmp_path / "x", optimizer=Run("qwen2_moe").optimizer)
    save_sharded(run.model, tmp_path / "bare")
    with pytest.raises(BadConfig, match="no optimizer state"):
        load_sharded(run.model, tmp_path / "bare", optimizer=run.optimizer)
    with pytest.raises(BadConfig, match="plain numbers"):
        save_sharded(run.model, tmp_path / "x", extra={"tensor": torch.ones(1)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare"]


def test_impossible_rewrites_are_refused(saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="9 ranks"):
        reshard.reshard(saved[0], tmp_path / "nine", ranks=9)
    with pytest.raises(BadConfig, match="2 devices"):
        reshard.reshard(saved[0], tmp_path / "three", ranks=3, placement=placed(2, 0))
    model = build("olmoe")
    model.model.adapter = torch.nn.Linear(3, 3)
    save_sharded(model, tmp_path / "odd")
    with pytest.raises(BadConfig, match="adapter"):
        reshard.plain(tmp_path / "odd", tmp_path / "plain")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd"]
