"""Sources of statistics beyond routed tokens: dense models, one expert's inputs at a time, gradients, attention."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moekit.anatomy import MoELayer, find_moe_layers
from moekit.checkpoint.folder import Checkpoint
from moekit.errors import BadConfig, UnsupportedModel
from moekit.jobs.context import JobContext
from moekit.jobs.estimates import ByteSizes
from moekit.jobs.options.profile import ProfileOptions
from moekit.trace import Recorder, Trace, record, record_generation
from moekit.trace.attention_batch import AttentionBatch
from moekit.trace.batch import TokenBatch
from moekit.trace.cost import cost_of, notes_on, sizes_of
from moekit.trace.expert_inputs import Moments
from moekit.trace.loss import next_token_loss
from moekit.trace.recording import Recording
from moekit.trace.sources.table import SOURCES, SourceSizes, bill, source_of
from moekit.trace.statistics import LayerStatistics
from moekit.trace.streamed import Streamed, record_streamed
from moekit.trace.vocabulary import known_statistics, statistic
from tests.checkpoints import plain
from tests.families import build, logits, tokens
from tests.tiny import tokenizer

IDS = tokens(2, 8, seed=4)
DENSE_NAMES = ("layer_cosine", "block_cosine", "attention_cosine", "neuron_magnitude", "attention_peak", "stream_peak")


def llama() -> PreTrainedModel:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


# Dense models


def test_neurons_and_layers_of_a_dense_model() -> None:
    model = llama()
    trace = record(model, [{"input_ids": IDS}], statistics=DENSE_NAMES, keep_choices=False)
    assert trace.statistics is not None
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True, use_cache=False).hidden_states
        for index, layer in enumerate(model.model.layers):
            attended = layer.self_attn(
                hidden_states=layer.input_layernorm(states[index]),
                position_embeddings=model.model.rotary_emb(states[index], torch.arange(8)[None]),
                attention_mask=None,
            )[0]
            between = states[index] + attended
            given = layer.post_attention_layernorm(between)
            inner = nn.functional.silu(layer.mlp.gate_proj(given)) * layer.mlp.up_proj(given)
            made = layer.mlp.down_proj(inner)
            stats = trace.statistics[index]
            torch.testing.assert_close(stats["neuron_magnitude"].float(), inner.abs().sum((0, 1)), rtol=1e-4, atol=1e-4)
            for name, first, second in [
                ("layer_cosine", states[index], between + made),
                ("block_cosine", given, made),
                ("attention_cosine", states[index], between),
            ]:
                expected = nn.functional.cosine_similarity(first, second, dim=-1).sum()
                assert float(stats[name]) == pytest.approx(float(expected), abs=1e-4)
    assert trace.meta.experts == [0, 0]


def test_a_dense_model_is_streamed_saved_and_read_as_it_is_recorded(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "m")
    batches = [{"input_ids": IDS}]
    live = record(model, batches, statistics=DENSE_NAMES, keep_choices=False)
    streamed = record_streamed(Checkpoint.open(tmp_path / "m"), batches, statistics=DENSE_NAMES)
    live.save(tmp_path / "trace")
    again = Trace.load(tmp_path / "trace")
    assert live.statistics is not None
    assert streamed.statistics is not None
    assert again.statistics is not None
    for index, stats in live.statistics.items():
        for name, value in stats.items():
            assert torch.equal(again.statistics[index][name], value)
            torch.testing.assert_close(streamed.statistics[index][name], value, rtol=1e-5, atol=1e-6)


def test_profile_of_a_dense_model(tmp_path: Path) -> None:
    model, folder = llama(), tmp_path / "m"
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("the river runs down to the sea and the old mill turns all day. " * 4)
    step = ProfileOptions(model=str(folder), data=str(text), statistics=DENSE_NAMES, choices=False, device="cpu")
    step.check()
    results = step.run(JobContext(out=tmp_path / "out", scratch=tmp_path / "scratch"))
    assert results["summary"] is None
    trace = Trace.load(tmp_path / "out")
    assert trace.statistics is not None
    for layer, named in results["figures"].items():
        stats = trace.statistics[int(layer)]
        assert set(named) == set(DENSE_NAMES) - {"neuron_magnitude", "stream_peak"}
        assert named["layer_cosine"] == pytest.approx(float(stats["layer_cosine"]) / trace.meta.tokens)
        assert named["attention_peak"] == float(stats["attention_peak"])


def test_experts_are_not_looked_for_in_a_dense_model() -> None:
    with pytest.raises(UnsupportedModel, match="not a Mixture of Experts"):
        record(llama(), [{"input_ids": IDS}], statistics=("layer_cosine",))  # keeps choices, which need experts
    with pytest.raises(UnsupportedModel, match="not a Mixture of Experts"):
        record(llama(), [{"input_ids": IDS}], statistics=("load",), keep_choices=False)


def test_dense_layers_of_a_moe_are_recorded_where_nothing_is_of_experts() -> None:
    model = build("deepseek_v3")  # its first layer is dense
    trace = record(model, [{"input_ids": IDS}], statistics=("layer_cosine",), keep_choices=False)
    assert trace.meta.layers == [0, 1, 2]
    assert trace.meta.experts == [0, 8, 8]
    some = record(model, [{"input_ids": IDS}], statistics=("layer_cosine",), keep_choices=False, layers=[0])
    assert trace.statistics is not None
    assert some.statistics is not None
    assert torch.equal(some.statistics[0]["layer_cosine"], trace.statistics[0]["layer_cosine"])
    with pytest.raises(BadConfig, match="no such decoder layer"):
        Recorder(model, statistics=("layer_cosine",), keep_choices=False, layers=[3])


# One expert's inputs at a time


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_second_moments_one_expert_at_a_time(limit: int, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(plain(tmp_path / "m", "gpt_oss"))
    batches = [
        {"input_ids": IDS, "attention_mask": torch.tensor([[1] * 8, [1] * 5 + [0] * 3])},
        {"input_ids": IDS[:1]},
    ]
    expected = record(build("gpt_oss"), batches, statistics=("load", "input_moment", "inner_moment")).statistics
    found: dict[int, list[Moments]] = {}
    with Streamed(checkpoint, batches, statistics=("load",), keep_inputs=True, limit=limit) as streamed:

        def consume(moe: MoELayer, stats: LayerStatistics) -> None:
            assert streamed.inputs is not None
            found[moe.index] = list(streamed.inputs.second_moments())

        streamed.run(change=consume)
    assert expected is not None
    for index, stats in expected.items():
        for moments in found[index]:
            assert moments.tokens == int(stats["load"][moments.expert])
            expected_HH, expected_II = (stats[name][moments.expert] for name in ("input_moment", "inner_moment"))
            torch.testing.assert_close(moments.inputs_HH, expected_HH, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(moments.inner_II, expected_II, rtol=1e-4, atol=1e-5)


def test_a_statistic_of_inputs_alone_is_measured_expert_by_expert() -> None:
    both = record(build("mixtral"), [IDS], statistics=("gated_input_square", "gated_inner_square")).statistics
    alone = record(build("mixtral"), [IDS], statistics=("gated_input_square",)).statistics
    assert both is not None
    assert alone is not None
    assert bool(alone[0]["gated_input_square"].any())
    assert torch.equal(alone[0]["gated_input_square"], both[0]["gated_input_square"])


# Gradients


def test_the_loss_counts_pairs_of_tokens_only() -> None:
    logits_BSV = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    ids_BS = torch.tensor([[1, 2, 3, 0], [0, 4, 5, 6]])
    mask_BS = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]]).bool()
    pairs = [(0, 0, 2), (0, 1, 3), (1, 1, 5), (1, 2, 6)]
    expected = -sum(float(logits_BSV[row, at].log_softmax(-1)[token]) for row, at, token in pairs)
    assert float(next_token_loss(logits_BSV, ids_BS, mask_BS)) == pytest.approx(expected, rel=1e-5)


def test_another_loss_and_passes_of_ones_own() -> None:
    def doubled(logits_BSV: Tensor, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        return 2 * next_token_loss(logits_BSV, ids_BS, mask_BS)

    model = build("qwen3_moe")
    plain_one = record(model, [IDS], statistics=("neuron_taylor",)).statistics
    twice = record(model, [IDS], statistics=("neuron_taylor",), loss=doubled).statistics
    with Recorder(model, statistics=("neuron_taylor",)) as recorder:
        output = model(input_ids=IDS, use_cache=False)
        recorder.backward(next_token_loss(output.logits, IDS, torch.ones_like(IDS).bool()))
    own = recorder.trace().statistics
    assert plain_one is not None
    assert twice is not None
    assert own is not None
    for index, stats in plain_one.items():
        torch.testing.assert_close(twice[index]["neuron_taylor"], 2 * stats["neuron_taylor"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(own[index]["neuron_taylor"], stats["neuron_taylor"], rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_that_cannot_be_taken_are_refused() -> None:
    model = build("qwen3_moe")
    with Recorder(model, statistics=("neuron_taylor",)) as recorder:
        with pytest.raises(BadConfig, match="no forward pass waits"):
            recorder.backward(torch.zeros(()))
        with torch.no_grad():
            model(input_ids=IDS, use_cache=False)
        with pytest.raises(BadConfig, match="waits for its gradients"):
            model(input_ids=IDS, use_cache=False)
        with pytest.raises(UnsupportedModel, match="no way back"):
            recorder.backward(torch.zeros(()))
        logits(model)  # what failed is forgotten
    with pytest.raises(BadConfig, match="no loss"):
        record_generation(model, [[5, 6]], max_new_tokens=1, statistics=("neuron_taylor",))


# Attention


def test_column_sums_by_hand() -> None:
    # Two queries of one head: the first sees itself only, the second pays 3 : 1 to the first.
    query_BhSd = torch.tensor([[[[0.0], [1.0]]]])
    key_BgSd = torch.tensor([[[[3.0], [1.0]]]]).log()
    seen = AttentionBatch(query_BhSd, key_BgSd, None, 1.0, torch.ones(1, 2).bool())
    assert seen.received_N.tolist() == pytest.approx([1.75, 0.25])
    # Half of what the second query pays goes to a sink of logit log 4; the padding query pays nothing.
    sunk = AttentionBatch(query_BhSd, key_BgSd, None, 1.0, torch.ones(1, 2).bool(), sinks_h=torch.tensor([4.0]).log())
    assert sunk.received_N.tolist() == pytest.approx([0.2 + 0.375, 0.125])
    alone = AttentionBatch(query_BhSd, key_BgSd, None, 1.0, torch.tensor([[True, False]]))
    assert alone.received_N.tolist() == [1.0]


def test_attention_functions_are_the_same_afterwards() -> None:
    before = {name: ALL_ATTENTION_FUNCTIONS.get(name) for name in ("sdpa", "eager")}
    model = build("mixtral")
    stock = logits(model)
    with Recorder(model, statistics=("attention_peak",), keep_choices=False):
        assert torch.equal(logits(model), stock)
        with pytest.raises(UnsupportedModel, match="earlier pass"):
            model.generate(IDS[:1], max_new_tokens=2, use_cache=True)
    assert {name: ALL_ATTENTION_FUNCTIONS.get(name) for name in before} == before
    assert torch.equal(logits(model), stock)


def test_attention_without_a_mask_that_can_be_read_is_refused() -> None:
    model = build("mixtral")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UnsupportedModel, match="flash_attention_2"):
        Recorder(model, statistics=("attention_peak",))


# What sources are and cost


def test_sources_are_named_and_unknown_ones_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moekit.trace.vocabulary._statistics", dict(known_statistics()))
    with pytest.raises(BadConfig, match="'outptus'") as caught:

        @statistic(shape="E", sources=("outptus",))
        def wrong(seen: TokenBatch) -> Tensor:
            """Never measured."""
            return seen.chosen_NE

    assert "outputs" in str(caught.value.hint)

    @statistic(shape="", sources=("module:mlp.nothing",))
    def missing(seen: TokenBatch) -> Tensor:
        """Never measured."""
        return seen.chosen_NE

    with pytest.raises(UnsupportedModel, match=r"mlp\.nothing") as unsupported:
        record(llama(), [IDS], statistics=("missing",), keep_choices=False)
    assert "mlp.down_proj" in str(unsupported.value.hint)


def test_what_a_source_costs_by_hand() -> None:
    sizes = SourceSizes(layers=3, experts=8, top_k=2, hidden=4, width=5, tokens=10, itemsize=2)
    expert = 2 * 3 * 4 * 5  # multiply-adds of three matrices
    assert bill(("choices", "weights"), sizes).flops == 0
    assert bill(("outputs", "inner"), sizes).flops == 3 * 2 * expert
    assert bill(("outputs", "all_outputs"), sizes).flops == 3 * 8 * expert
    assert bill(("all_outputs",), sizes).memory == 10 * 8 * 4 * 4
    assert bill(("block_io",), sizes).memory == 4 * 10 * 4 * 2
    assert bill(("gradients",), sizes).passes == 1
    assert {name for name in SOURCES if source_of(name).live} == {"gradients", "weight_gradients", "stream_gradients"}


def test_a_recording_says_what_it_costs(tmp_path: Path) -> None:
    config = {
        "num_hidden_layers": 4,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "hidden_size": 2048,
        "moe_intermediate_size": 1024,
        "num_attention_heads": 16,
    }
    sizes = sizes_of(config, rows=4, positions=512)
    assert sizes is not None
    assert notes_on(Recording(statistics="basic"), sizes) == ()
    cost, nbytes = cost_of(Recording(statistics=("input_moment", "all_output_sum")), sizes)
    assert cost.flops == 4 * 64 * 6 * 2048 * 1024
    assert nbytes == 8 * 4 * (64 * 2048 * 2048 + 64 * 2048)
    (looking, keeping) = notes_on(Recording(statistics=("input_moment", "all_output_sum")), sizes)
    assert "3.22 GFLOP a token" in looking
    assert "64 MiB" in looking
    assert "8,196 MiB in memory and on disk" in keeping
    (told,) = notes_on(Recording(statistics="stream_gradient_square"), sizes)
    assert "backward pass" in told
    assert sizes_of({"hidden_size": 4}, rows=1, positions=1) is None
    (tmp_path / "config.json").write_text(json.dumps(config))
    step = ProfileOptions(model=str(tmp_path), data="none", statistics=("all_output_sum",))
    assert any("GFLOP a token" in note for note in step.estimate(tmp_path / "out", ByteSizes()).notes)


def test_layers_are_named_where_experts_do_not_follow_the_plain_formula() -> None:
    model = build("qwen3_moe")
    for layer in find_moe_layers(model):
        layer.experts.config._experts_implementation = "own"
    with pytest.raises(UnsupportedModel, match="plain formula") as caught:
        Recorder(model, statistics=("neuron_taylor",))
    assert caught.value.layer == 0
