"""What budgets count, and requests that cannot be met, called as a library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import moekit
from moekit.checkpoint import Checkpoint, Record
from moekit.compress.budget.sizes import Budget, total_count
from moekit.compress.engine.apply import apply
from moekit.compress.engine.grouped import routing_groups
from moekit.compress.engine.layout import prepare
from moekit.compress.engine.measuring import geometries_of, sizes_of
from moekit.compress.engine.outcome import LayerOutcome
from moekit.compress.engine.planning import plan_weights, redecide
from moekit.compress.engine.request import CalibrationText, PlanRequest
from moekit.compress.engine.searching import plan_by_search
from moekit.compress.prune.frequency import Frequency
from moekit.compress.prune.naee import NAEE
from moekit.compress.prune.random import Random
from moekit.compress.prune.stun import Stun
from moekit.errors import BadConfig, BadData, NumericFault
from moekit.streaming.loader import LayerLoader
from moekit.trace import Trace, record
from moekit.trace.streamed import Streamed
from tests.checkpoints import edit_shard, plain
from tests.families import build, randomize, tokens

ROWS = [torch.randint(3, 128, (2, 8), generator=torch.Generator().manual_seed(0))]


def saved(folder: Path, family: str, **config: int) -> Checkpoint:
    build(family, **config).save_pretrained(folder)
    return Checkpoint.open(folder)


def qwen3_next() -> PreTrainedModel:
    """The family whose stack of multi-token prediction stands beside the decoder."""
    config = transformers.Qwen3NextConfig(
        vocab_size=128, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        intermediate_size=40, moe_intermediate_size=24, shared_expert_intermediate_size=20, num_experts=8,
        num_experts_per_tok=2, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=8, max_position_embeddings=128, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    config.dtype = torch.float32
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, 0)
    return model


def with_mtp(folder: Path, family: str, stack: tuple[str, str], **config: int) -> Checkpoint:
    """A model whose last layer stands a second time, as a layer of multi-token prediction."""
    (qwen3_next() if family == "qwen3_next" else build(family)).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {n.replace(*stack): t.clone() for n, t in tensors.items() if stack[0] in n}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | config))
    return Checkpoint.open(folder)


def keeping(checkpoint: Checkpoint, count: int) -> dict[int, LayerOutcome]:
    return {layer: LayerOutcome(keep=tuple(range(count))) for layer in geometries_of(checkpoint)}


@pytest.mark.parametrize(
    ("family", "stack", "config"),
    [
        ("deepseek_v3", ("model.layers.2.", "model.layers.3."), {"num_nextn_predict_layers": 1}),
        ("qwen3_next", ("model.layers.1.", "mtp.layers.0."), {}),
    ],
)
def test_bytes_leave_out_the_layers_that_are_left_out(
    family: str, stack: tuple[str, str], config: dict[str, int], tmp_path: Path
) -> None:
    checkpoint = with_mtp(tmp_path / "m", family, stack, **config)
    sizes = sizes_of(checkpoint, geometries_of(checkpoint))
    for count in (2, 4):
        written = sum(shard.nbytes for shard in prepare(checkpoint, keeping(checkpoint, count)).shards)
        counted = sizes.other_bytes + sum(count * each for each in sizes.expert_bytes.values())
        # Rows of routers, and entries of the header, which go with experts.
        assert 0 <= counted - written < 2 * min(sizes.expert_bytes.values())
        plan = plan_weights(checkpoint, None, PlanRequest(Random(), Budget(keep=f"{counted}B")))
        assert {len(outcome.keep) for outcome in plan.outcomes.values()} == {count}
        assert total_count(Budget(keep=f"{counted}B", scope="global"), sizes) == count * len(sizes.experts)


def test_a_stack_beside_the_decoder_is_no_decoder_layer(tmp_path: Path) -> None:
    checkpoint = with_mtp(tmp_path / "m", "qwen3_next", ("model.layers.1.", "mtp.layers.0."))
    loader = LayerLoader(checkpoint)
    decoder = {name: t.nbytes for name, t in checkpoint.tensors.items() if not name.startswith("mtp.")}
    assert sum(loader.nbytes(n) for n in (0, 1)) == sum(n for name, n in decoder.items() if ".layers." in name)
    outcomes = {0: LayerOutcome(keep=(0, 1, 2, 3)), 1: LayerOutcome(keep=tuple(range(8)))}
    made = apply(checkpoint, outcomes, tmp_path / "out", record=Record(command="a test"), mtp="keep")
    assert made.expectations is not None
    assert made.expectations.experts == {0: 4, 1: 8}
    moekit.load(tmp_path / "out")


def test_impossible_requests(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "m", "qwen3_moe")
    model = moekit.load(tmp_path / "m")
    part = record(model, ROWS, statistics=("load",), layers=[0])
    with pytest.raises(BadData, match="nothing of 1 of 2 MoE layers"):
        plan_weights(checkpoint, part, PlanRequest(Frequency(), Budget(keep=4)))
    whole = record(model, ROWS, statistics=("load",))
    for wrong in ({0: (99,)}, {0: (-1,)}, {5: (1,)}):
        with pytest.raises(BadConfig, match="a protected expert is not there"):
            plan_weights(checkpoint, whole, PlanRequest(Frequency(), Budget(keep=4), protected=wrong))
    plan = plan_weights(checkpoint, whole, PlanRequest(Frequency(), Budget(keep=4, scope="global")))
    with pytest.raises(BadConfig, match="8 experts of all layers cannot stay where each layer keeps 6 to 8"):
        redecide(plan, checkpoint, Budget(keep=4, scope="global", least=6))
    with pytest.raises(BadConfig, match="12 experts of all layers cannot stay where each layer keeps 2 to 4"):
        plan_weights(checkpoint, whole, PlanRequest(Frequency(), Budget(keep=6, scope="global", most=4)))


def test_stun_names_experts_never_routed(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "m", "qwen3_moe")
    few = record(moekit.load(tmp_path / "m"), [torch.tensor([[5, 6, 7]])], statistics=("load", "gated_output_norm"))
    stun, frequency = (plan_weights(checkpoint, few, PlanRequest(m, Budget(keep=4))) for m in (Stun(), Frequency()))
    assert frequency.file.layers[0].never_routed
    assert stun.file.layers[0].never_routed == frequency.file.layers[0].never_routed


def test_a_search_that_keeps_all_of_as_many_as_are_chosen(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "m", "mixtral", num_local_experts=2)
    streamed = Streamed(checkpoint, ROWS, statistics=("load",))
    streamed.run()
    trace: Trace = streamed.trace()
    plan = plan_by_search(checkpoint, trace, streamed, PlanRequest(NAEE(), Budget(keep=2)))
    assert {outcome.keep for outcome in plan.outcomes.values()} == {(0, 1)}


def test_groups_by_the_name_that_is_stored() -> None:
    assert routing_groups({"hidden_size": 8, "num_expert_group": 4, "topk_group": 2}) == 4
    assert routing_groups({"hidden_size": 8}) == 1


def test_a_budget_of_bytes_holds_the_file_with_its_header(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "m", "qwen3_moe")
    tensors = sum(tensor.spec.nbytes for tensor in prepare(checkpoint, keeping(checkpoint, 4)).kept)
    plan = plan_weights(checkpoint, None, PlanRequest(Random(), Budget(keep=f"{tensors + 100}B")))
    apply(checkpoint, plan.outcomes, tmp_path / "out", record=Record(command="a test"))
    assert sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")) <= tensors + 100


def test_a_tensor_without_numbers_is_written(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(plain(tmp_path / "m", "qwen2_moe", shared_expert_intermediate_size=0))
    empty = [name for name, info in checkpoint.tensors.items() if not info.nbytes]
    assert empty
    apply(checkpoint, keeping(checkpoint, 4), tmp_path / "out", record=Record(command="a test"))
    made = Checkpoint.open(tmp_path / "out")
    assert all(made.tensors[name].shape == checkpoint.tensors[name].shape for name in empty)


def test_a_damaged_expert_is_named_by_a_method_that_only_counts(tmp_path: Path) -> None:
    folder = plain(tmp_path / "m", "qwen3_moe")
    name = "model.layers.1.mlp.experts.5.down_proj.weight"
    edit_shard(folder / "model.safetensors", lambda tensors: tensors[name][0].fill_(float("nan")))
    with pytest.raises(NumericFault) as caught:
        plan_weights(
            Checkpoint.open(folder), CalibrationText([tokens(2, 20)]), PlanRequest(Frequency(), Budget(keep=4))
        )
    assert (caught.value.layer, caught.value.expert) == (1, 5)
