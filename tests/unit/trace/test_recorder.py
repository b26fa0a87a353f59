"""What is recorded equals what the experts are called with, on every family, whatever the batches."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from moekit.anatomy import find_moe_layers
from moekit.data.batches import Batch
from moekit.errors import BadConfig, BadData, NumericFault, UnsupportedModel
from moekit.trace import Recorder, record
from tests.families import EXPERTS, FAMILIES, TOP_K, VOCAB, build, logits, tokens
from tests.parts import leftovers
from tests.unit.trace.samples import Spy, same_trace

LENGTHS = (9, 1, 12, 5)


def sequences() -> list[torch.Tensor]:
    return [tokens(1, n, seed=i)[0] for i, n in enumerate(LENGTHS)]


def padded(rows: list[torch.Tensor], *, left: bool = False, extra: int = 2) -> dict[str, torch.Tensor]:
    """One batch of all rows, padded beyond the longest, with ids at padding that would be noticed."""
    width = max(map(len, rows)) + extra
    ids = torch.full((len(rows), width), 99)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for row, sequence in enumerate(rows):
        here = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[row, here], mask[row, here] = sequence, 1
    return {"input_ids": ids, "attention_mask": mask}


def exact(family: str) -> PreTrainedModel:
    """In fp64, where neither padding nor the number of rows can tip the choice between two experts."""
    model = build(family).double()
    model.set_experts_implementation("eager")  # transformers' grouped_mm has no fp64
    return model


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_choices_equal_what_experts_are_called_with(family: str, once: bool) -> None:
    model = exact(family)
    seen = Spy(model).run(sequences())
    trace = record(model, [padded(sequences())], weights=True, once=once, statistics=("basic", "gate_mass"))
    assert trace.meta.tokens == sum(LENGTHS)
    assert trace.meta.layers == [layer.index for layer in find_moe_layers(model)] == sorted(seen)
    assert trace.meta.top_k == [TOP_K] * len(seen)
    assert trace.meta.experts == [EXPERTS] * len(seen)
    assert trace.statistics is not None
    for layer, (_, chosen_NK, weights_NK) in seen.items():
        assert torch.equal(trace.indices(layer), chosen_NK.long())
        kept_NK = trace.weights(layer)
        assert kept_NK is not None
        torch.testing.assert_close(kept_NK, weights_NK.float(), rtol=2e-3, atol=1e-5)
        mass_E = torch.zeros(EXPERTS).double().index_add_(0, chosen_NK.flatten(), weights_NK.flatten().double())
        torch.testing.assert_close(trace.statistics[layer]["gate_mass"], mass_E, rtol=1e-5, atol=1e-5)
        assert int(trace.statistics[layer]["load"].sum()) == TOP_K * sum(LENGTHS)


@pytest.mark.parametrize("once", [False, True])
def test_recording_leaves_the_model_as_it_was(once: bool) -> None:
    model = build("qwen2_moe").train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    implementation, before = model.config._experts_implementation, hooks_of(model)
    record(model, [tokens()], once=once)
    assert [m.training for m in model.modules()] == modes
    assert (model.config._experts_implementation, hooks_of(model)) == (implementation, before)
    assert leftovers(model) == []
    model.eval()
    stock = logits(model)
    with Recorder(model, once=once, weights=True):
        assert torch.equal(logits(model), stock), "recording choices must not change a bit of the output"
    assert torch.equal(logits(model), stock)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_the_chosen_implementation_still_computes(implementation: str) -> None:
    model = build("mixtral")
    model.set_experts_implementation(implementation)
    stock = logits(model)
    with Recorder(model, once=True) as recorder:
        assert torch.equal(logits(model), stock)
    assert recorder.trace().meta.tokens == tokens().numel()
    assert model.config._experts_implementation == implementation


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_batches_do_not_change_the_trace(family: str) -> None:
    model = exact(family)
    names = ("basic", "gates", "router", "inputs", "outputs", "residual")
    alone = record(model, [s[None] for s in sequences()], weights=True, statistics=names)
    together = record(model, [padded(sequences())], weights=True, statistics=names)
    left = record(model, [padded(sequences(), left=True)], weights=True, statistics=names)
    for other in (together, left):
        assert other.meta == alone.meta
        for name, value in alone.tensors().items():
            # A peak's channel and position are exact; everything real is fp32 inside, added in another order.
            torch.testing.assert_close(
                other.tensors()[name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_labels_follow_the_batch() -> None:
    ids = tokens(2, 6)
    batch = Batch(
        input_ids=ids,
        attention_mask=torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]),
        document_BS=torch.tensor([[4, 4, 7, 7, 7, 7], [9, 9, 9, -1, -1, -1]], dtype=torch.int32),
        domain_BS=torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, -1, -1, -1]], dtype=torch.int16),
        domains=("code", "prose"),
    )
    other = Batch(ids[:1], torch.ones(1, 6).long(), torch.full((1, 6), 2), torch.zeros(1, 6).long(), ("verse",))
    trace = record(build("olmoe"), [batch, other], source="made", seed=3)
    assert trace.document_N.tolist() == [4, 4, 7, 7, 7, 7, 9, 9, 9] + [2] * 6
    assert trace.meta.domains == ["code", "prose", "verse"]
    assert trace.domain_N.tolist() == [1, 1, 0, 0, 0, 0, 1, 1, 1] + [2] * 6
    assert trace.position_N.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1, 2, 3, 4, 5]
    assert trace.sequence_N.tolist() == [0] * 6 + [1] * 3 + [2] * 6
    assert [(e.domain, e.documents, e.tokens, e.source) for e in trace.meta.data] == [
        ("code", 1, 4, "made"),
        ("prose", 2, 5, "made"),
        ("verse", 1, 6, "made"),
    ]
    assert trace.meta.seed == 3
    assert trace.statistics is not None
    by_domain_DE = trace.statistics[0]["domain_load"]
    assert by_domain_DE.sum(1).tolist() == [8, 10, 12]
    assert torch.equal(by_domain_DE.sum(0), trace.statistics[0]["load"])


def test_rows_without_labels_are_documents() -> None:
    trace = record(build("olmoe"), [tokens(2, 3), {"input_ids": tokens(1, 2)}])
    assert trace.document_N.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert trace.meta.domains == ["text"]


def test_counting_in_many_small_steps_is_counting_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("qwen3_moe")
    batches = [tokens(2, 5, seed=i) for i in range(6)]
    at_once = record(model, batches, statistics=("basic", "gates"))
    monkeypatch.setattr("moekit.trace.accumulator.FLUSH_TOKENS", 1)
    same_trace(record(model, batches, statistics=("basic", "gates")), at_once)


def test_memory_of_statistics_does_not_grow_with_tokens() -> None:
    model = build("mixtral")
    recorder = Recorder(model, statistics=("basic", "outputs"), keep_choices=False)
    sizes = []
    with recorder, torch.no_grad():
        for rows in (1, 40):
            for _ in range(rows):
                model(input_ids=tokens(4, 40), use_cache=False)
            recorder.flush()
            held = [t for accumulator in recorder._accumulators for t in (*accumulator.indices, *accumulator.weights)]
            assert held == []
            trace = recorder.trace()
            sizes.append({name: t.numel() for name, t in trace.tensors().items()})
    assert sizes[0] == sizes[1]
    assert trace.meta.tokens == 41 * 160
    assert not trace.meta.has_choices


def test_empty_text_and_padding() -> None:
    model = build("mixtral")
    nothing = {"input_ids": torch.ones(2, 4).long(), "attention_mask": torch.zeros(2, 4).long()}
    for empty in ([], [nothing], [torch.zeros(2, 0).long()], [torch.zeros(0, 4).long()]):
        with pytest.raises(BadData, match="no tokens but padding"):
            record(model, empty)
    one = record(model, [nothing, tokens(1, 1), nothing])
    assert one.meta.tokens == 1
    assert one.indices(0).shape == (1, TOP_K)
    assert len(one.warnings) == 2
    with Recorder(model) as recorder:
        pass
    assert recorder.trace().meta.tokens == 0, "a rank without text has an empty trace, which merges"


def test_a_pass_of_padding_only_adds_nothing() -> None:
    model = build("mixtral")
    with Recorder(model, statistics=("basic", "router", "outputs")) as recorder, torch.no_grad():
        model(input_ids=tokens(), attention_mask=torch.zeros(2, 12).long(), use_cache=False)
        model(input_ids=tokens(1, 5), use_cache=False)
    assert recorder.trace().meta.tokens == 5


def test_experts_never_routed_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trace = record(build("mixtral"), [tokens(1, 1)])
    assert len(trace.warnings) == 2
    assert trace.warnings[0].startswith("layer 0: 6 of 8 experts never routed in 1 tokens: ")
    assert trace.warnings[0] in caplog.text
    assert trace.statistics is not None
    assert len(trace.statistics[0].never_routed) == 6


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_nan_in_a_router_names_its_layer(family: str) -> None:
    model = build(family)
    layer = find_moe_layers(model)[1]
    with torch.no_grad():
        next(layer.require_router().parameters())[2] = float("nan")
    for names in (("load",), ("router",)):
        with pytest.raises(NumericFault, match="NaN") as caught:
            record(model, [tokens()], statistics=names)
        assert caught.value.layer == layer.index


def test_nan_at_padding_is_nobodys_fault() -> None:
    model = build("mixtral")

    def spoil(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden, chosen, weights = args
        weights = weights.clone()
        weights[5:] = float("nan")
        return hidden, chosen, weights

    handle = find_moe_layers(model)[0].experts.register_forward_pre_hook(spoil)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
    trace = record(model, [{"input_ids": tokens(1, 7), "attention_mask": mask}], layers=[0], weights=True)
    assert trace.meta.tokens == 5
    handle.remove()


def test_weights_beyond_16_bits_are_an_error_not_infinity() -> None:
    model = build("mixtral")

    def scale(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return args[0], args[1], args[2] * 1e6

    find_moe_layers(model)[1].experts.register_forward_pre_hook(scale)
    with pytest.raises(NumericFault, match="does not fit 16 bits") as caught:
        record(model, [tokens()], weights=True)
    assert caught.value.layer == 1
    assert record(model, [tokens()], statistics=("gate_mass",)).meta.tokens == 24


def test_a_fault_is_raised_again_rather_than_a_wrong_figure() -> None:
    model = build("mixtral")
    with torch.no_grad():
        find_moe_layers(model)[0].require_router().weight[0] = float("nan")  # type: ignore[index, union-attr]
    recorder = Recorder(model)
    with recorder, torch.no_grad():
        model(input_ids=tokens(), use_cache=False)
        for _ in range(2):
            with pytest.raises(NumericFault):
                recorder.trace()


def replace_choices(model: PreTrainedModel, value: int) -> None:
    def change(
        module: nn.Module, args: tuple[torch.Tensor, ...], answer: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        logits, weights, chosen = answer
        chosen, weights = chosen.clone(), weights.clone()
        chosen[:, 1], weights[:, 1] = value, 0
        return logits, weights, chosen

    find_moe_layers(model)[0].require_router().register_forward_hook(change)


def test_no_expert_is_a_legal_choice() -> None:
    model = build("mixtral")
    model.set_experts_implementation("eager")
    replace_choices(model, EXPERTS)
    for once in (False, True):
        trace = record(model, [tokens()], statistics=("basic", "outputs"), once=once)
        assert trace.indices(0)[:, 1].tolist() == [EXPERTS] * 24
        assert trace.statistics is not None
        assert int(trace.statistics[0]["load"].sum()) == 24
        assert int(trace.statistics[1]["load"].sum()) == 48
        assert bool(trace.statistics[0]["output_norm"].isfinite().all())


def test_an_index_beyond_is_an_error() -> None:
    model = build("mixtral")
    replace_choices(model, -1)
    for layer in find_moe_layers(model):
        layer.experts.forward = lambda hidden, chosen, weights: hidden
    with Recorder(model) as recorder, torch.no_grad():
        model(input_ids=tokens(), use_cache=False)
    with pytest.raises(BadData, match="expert -1 of 8") as caught:
        recorder.trace()
    assert caught.value.layer == 0


def test_ids_beyond_the_embedding_are_refused_before_the_pass() -> None:
    with pytest.raises(BadConfig, match=f"token id {VOCAB} lies outside"):
        record(build("mixtral"), [torch.tensor([[3, VOCAB]])])
    with pytest.raises(BadConfig, match="no batch of token ids"):
        record(build("mixtral"), ["text"])


def test_layers_can_be_chosen() -> None:
    model = build("deepseek_v3")
    for once in (False, True):
        trace = record(model, [tokens()], layers=[2], once=once)
        assert trace.meta.layers == [2]
    with pytest.raises(BadConfig, match="no MoE layer"):
        record(model, [tokens()], layers=[0])


def test_compiled_models_are_refused() -> None:
    model = build("mixtral")
    with pytest.raises(UnsupportedModel, match="compiled"):
        Recorder(torch.compile(model, backend="eager"))  # type: ignore[arg-type]
    model.model.layers[1].compile(backend="eager")
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.1 is compiled"):
        record(model, [tokens()])


def test_compiling_while_recording_fails_loudly() -> None:
    model = build("mixtral")
    with Recorder(model) as recorder, torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        with pytest.raises(Exception, match="compiled while it is recorded"):
            compiled(input_ids=tokens(), use_cache=False)
        assert recorder.tokens == 0


def test_a_layer_that_shows_nothing_is_an_error() -> None:
    """As when a CUDA graph replays a layer: its modules are not called."""
    model = build("mixtral")
    block = find_moe_layers(model)[1].block
    block.forward = lambda hidden: hidden  # type: ignore[method-assign]
    with pytest.raises(UnsupportedModel, match="1 MoE layers did not show") as caught:
        record(model, [tokens()])
    assert caught.value.layer == 1


def test_experts_that_run_twice_are_an_error() -> None:
    model = build("mixtral")
    block = find_moe_layers(model)[0].block
    once = block.forward
    block.forward = lambda hidden: once(once(hidden))  # type: ignore[method-assign]
    with pytest.raises(UnsupportedModel, match="ran twice"):
        record(model, [tokens()])


def test_experts_that_see_other_positions_are_an_error() -> None:
    """As in models that drop padding before their experts: tokens could not be told apart."""
    model = build("mixtral")
    block = find_moe_layers(model)[0].block
    whole = block.forward
    block.forward = lambda hidden: torch.cat([whole(hidden[:, :9].contiguous()), hidden[:, 9:]], dim=1)  # type: ignore[method-assign]
    with pytest.raises(UnsupportedModel, match="ran on 18 positions in a forward pass of 24"):
        record(model, [tokens()])


def test_a_failed_pass_leaves_nothing() -> None:
    model = build("mixtral")
    names = ("basic", "outputs", "router")
    expected = record(model, [tokens(), tokens(seed=1)], statistics=names)
    handle = None

    def fail(module: nn.Module, args: object, output: object) -> None:
        raise MemoryError

    recorder = Recorder(model, statistics=names)
    with recorder, torch.no_grad():
        model(input_ids=tokens(), use_cache=False)
        handle = model.model.layers[1].self_attn.register_forward_hook(fail)
        with pytest.raises(MemoryError):
            model(input_ids=tokens(3, 7), use_cache=False)
        handle.remove()
        model(input_ids=tokens(seed=1), use_cache=False)
    trace = recorder.trace()
    assert trace.meta.tokens == expected.meta.tokens
    assert torch.equal(trace.indices(0), expected.indices(0))
    assert trace.statistics is not None
    assert expected.statistics is not None
    torch.testing.assert_close(trace.statistics[0]["output_norm"], expected.statistics[0]["output_norm"])


def test_recomputation_in_the_backward_pass_is_not_counted() -> None:
    model = build("qwen3_moe").train()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()
    with Recorder(model, statistics=("load", "outputs")) as recorder:
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    trace = recorder.trace()
    assert trace.meta.tokens == tokens().numel()
    assert trace.statistics is not None
    assert int(trace.statistics[0]["load"].sum()) == TOP_K * tokens().numel()


def test_training_through_the_recording_implementation_has_the_same_gradients() -> None:
    model = build("mixtral")
    model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    stock = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with Recorder(model, statistics=("outputs",), once=True):
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, stock[name], rtol=1e-4, atol=1e-6)


def test_a_mask_that_does_not_tell_padding_is_refused() -> None:
    model = build("mixtral")
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
    with Recorder(model), pytest.raises(BadConfig, match="padding cannot be told"):
        model(input_ids=tokens(), attention_mask=mask, use_cache=False)
    with Recorder(model) as recorder, torch.no_grad():
        recorder.expect(tokens())
        model(input_ids=tokens(), attention_mask=mask, use_cache=False)
    assert recorder.trace().meta.tokens == 24
    with Recorder(model) as recorder:
        recorder.expect(tokens(1, 3))
        with pytest.raises(BadConfig, match="labels of"):
            model(input_ids=tokens(), use_cache=False)


def test_the_trace_names_the_model_and_refuses_others() -> None:
    first = record(build("mixtral", seed=0), [tokens()])
    second = record(build("mixtral", seed=1), [tokens()])
    assert len(first.meta.fingerprint) == 64
    with pytest.raises(BadData):
        second.check_model(first.meta.fingerprint)
    again = record(build("mixtral", seed=0), [tokens()])
    again.check_model(first.meta.fingerprint)
    assert again.digest == first.digest


def test_a_policy_is_named_as_the_routing() -> None:
    from moekit.routing import TopK
    from moekit.runtime import attach

    model = build("mixtral")
    assert record(model, [tokens()]).meta.routing == "stock"
    attach(model, TopK(top_k=1))
    trace = record(model, [tokens()])
    assert trace.meta.routing == "TopK(top_k=1)"
    assert trace.meta.top_k == [1, 1]


def test_a_recorder_is_entered_once_at_a_time() -> None:
    recorder = Recorder(build("mixtral"))
    with recorder, pytest.raises(BadConfig, match="entered already"), recorder:
        pass


def test_not_a_moe() -> None:
    with pytest.raises(UnsupportedModel, match="not a Mixture of Experts"):
        Recorder(nn.Linear(2, 2))


class Bar:
    """Counts what a progress bar is told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def start(self, label: str, total: int | None) -> None:
        self.told.append((label, total))

    def advance(self, amount: int = 1, note: str = "") -> None:
        self.told.append(amount)

    def finish(self) -> None:
        self.told.append("end")


def test_progress_is_told() -> None:
    bar = Bar()
    record(build("mixtral"), [tokens(), tokens()], progress=bar)
    assert bar.told == [("profiling", 2), 1, 1, "end"]


@pytest.mark.parametrize("statistics", [("basic",), ("basic", "outputs", "router", "residual")])
def test_a_copy_of_a_recorded_model_runs_and_is_not_recorded(statistics: tuple[str, ...]) -> None:
    model = build("qwen2_moe")
    stock = logits(model)
    with Recorder(model, statistics=statistics) as recorder:
        logits(model)
        before = recorder.tokens
        twin = copy.deepcopy(model)
        assert torch.equal(logits(twin), stock)
        assert recorder.tokens == before
        with Recorder(twin, statistics=statistics) as other:
            logits(twin)
        assert recorder.tokens == before == other.tokens
    assert torch.equal(logits(twin), stock)
