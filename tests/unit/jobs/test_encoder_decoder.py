"""An encoder with a decoder: profiled, pruned, proved and checked against plain forwards of the stock class."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeExperts

from moekit import check, evaluate, generate, load, place, profile, prune, super_experts
from moekit.checkpoint import Checkpoint
from moekit.errors import MoekitError, UnsupportedModel
from moekit.family import texts, write
from moekit.family.registry import family
from moekit.family.rules import EXPERTS
from moekit.trace import Trace, record
from moekit.trace.streamed import record_streamed

# Of four encoder and four decoder layers the second ones hold experts; numbered through.
MOE_LAYERS = {1: "encoder.block.1.layer.1.mlp", 5: "decoder.block.1.layer.2.mlp"}
START = 1


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write(family("switch_transformers"), folder / "switch", 0)
    write(family("nllb_moe"), folder / "nllb", 0)
    for name, begin in (("text", 0), ("heldout", 10)):
        for domain, documents in texts(documents=14, repeats=2).items():
            (folder / name / domain).mkdir(parents=True)
            for number, document in enumerate(documents[begin : begin + 4]):
                (folder / name / domain / f"{number}.txt").write_text(document, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def pruned(made: Path) -> Any:
    return prune(
        made / "switch",
        method="reap",
        keep=4,
        data=made / "text",
        heldout=made / "heldout",
        out=made / "pruned",
        device="cpu",
        progress=False,
    )


def stock(folder: Path) -> PreTrainedModel:
    kind: Any = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model: PreTrainedModel = kind.from_pretrained(folder, dtype=torch.float32).eval()
    return model


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(4, 100, (3, 11), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    ids[1, 7:], mask[1, 7:] = 0, 0
    return ids, mask


@torch.no_grad()
def by_hand(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Layer -> tokens that each expert ran on, and REAP's sum of gate times norm of its output."""
    seen: dict[str, tuple[Tensor, Any]] = {}
    for name in MOE_LAYERS.values():
        router = model.get_submodule(f"{name}.router")
        router.register_forward_hook(lambda _m, args, out, name=name: seen.__setitem__(name, (args[0], out)))
    begun = torch.cat([torch.full_like(ids[:, :1], START), ids[:, 1:]], dim=1)
    model(input_ids=ids, attention_mask=mask, decoder_input_ids=begun, decoder_attention_mask=mask)
    found = {}
    for layer, name in MOE_LAYERS.items():
        hidden, (chosen, weight, _) = seen[name]
        experts: Any = model.get_submodule(f"{name}.experts")
        load, reap = torch.zeros(EXPERTS), torch.zeros(EXPERTS)
        for row, position in mask.nonzero().tolist():
            for expert in chosen[row, position].nonzero().flatten().tolist():
                load[expert] += 1
                made = experts[f"expert_{expert}"](hidden[row, position])
                reap[expert] += weight[row, position, 0] * made.norm()
        found[layer] = (load, reap)
    return found


def test_what_is_recorded_is_what_stock_routers_choose_on_both_sides(made: Path) -> None:
    ids, mask = batch()
    expected = by_hand(stock(made / "switch"), ids, mask)
    given = [{"input_ids": ids, "attention_mask": mask}]
    names = ("load", "gated_output_norm")
    whole = record(load(made / "switch", device="cpu"), given, statistics=names)
    layerwise = record_streamed(Checkpoint.open(made / "switch"), given, statistics=names, device="cpu")
    for trace in (whole, layerwise):
        assert trace.meta.layers == list(expected)
        assert trace.meta.tokens == int(mask.sum())
        for layer, told in trace.require(names).items():
            load_E, reap_E = expected[layer]
            assert told["load"].tolist() == load_E.tolist()
            torch.testing.assert_close(told["gated_output_norm"].float(), reap_E, rtol=1e-4, atol=1e-5)


def test_a_profile_and_what_is_placed_by_it_name_layers_by_their_numbers(made: Path, tmp_path: Path) -> None:
    told = profile(made / "switch", data=made / "text", out=tmp_path / "trace", device="cpu", progress=False)
    assert told.summary is not None
    assert Trace.load(tmp_path / "trace").meta.layers == [1, 5]
    assert any("each row of the text is what the encoder reads" in line for line in told.warnings)
    place(tmp_path / "trace", devices=(2,), model=made / "switch", out=tmp_path / "placed", progress=False)
    orders = json.loads((tmp_path / "placed" / "model-2" / "moekit.json").read_text())["config"]["orders"]
    assert {int(layer) for layer in orders} == {1, 5}
    assert orders["1"] != orders["5"]
    source, moved = stock(made / "switch"), stock(tmp_path / "placed" / "model-2")
    for layer, name in MOE_LAYERS.items():
        for new, old in enumerate(orders[str(layer)]):
            ours = moved.get_submodule(f"{name}.experts")[f"expert_{new}"].wo.weight
            assert torch.equal(ours, source.get_submodule(f"{name}.experts")[f"expert_{old}"].wo.weight)
    ids, mask = batch()
    with torch.no_grad():
        before, after = (m(input_ids=ids, attention_mask=mask, decoder_input_ids=ids).logits for m in (source, moved))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_what_is_pruned_is_the_source_without_those_experts(made: Path, pruned: Any) -> None:
    kept = {row["layer"]: row["kept"] for row in pruned.layers}
    assert set(kept) == set(MOE_LAYERS)
    assert all(len(keep) == 4 for keep in kept.values())
    source, found = stock(made / "switch").state_dict(), stock(made / "pruned").state_dict()
    assert stock(made / "pruned").config.num_experts == 4
    for layer, name in MOE_LAYERS.items():
        router = f"{name}.router.classifier.weight"
        assert torch.equal(found.pop(router), source[router][kept[layer]])
        for new, old in enumerate(kept[layer]):
            for part in ("wi", "wo"):
                tensor = found.pop(f"{name}.experts.expert_{new}.{part}.weight")
                assert torch.equal(tensor, source[f"{name}.experts.expert_{old}.{part}.weight"])
    assert all(torch.equal(tensor, source[name]) for name, tensor in found.items())
    assert check(made / "pruned", parent=made / "switch", progress=False).ok


def test_the_proof_is_the_teacher_forced_loss_of_the_stock_models(made: Path, pruned: Any) -> None:
    assert pruned.proof is not None
    text = pruned.proof["method"]["text"]["overall"]
    for side, folder in (("a", made / "switch"), ("b", made / "pruned")):
        assert text[side]["nll"] == pytest.approx(loss(folder, made / "heldout"), rel=1e-5)
    told = evaluate(made / "pruned", data=made / "heldout", split=None, device="cpu", progress=False)
    assert told.domains[0]["nll"] == pytest.approx(loss(made / "pruned", made / "heldout"), rel=1e-5)


def test_how_the_text_was_read_is_said(made: Path, pruned: Any) -> None:
    assert any("(token 1 stands in place of the row's first)" in line for line in pruned.warnings)
    told = evaluate(made / "pruned", data=made / "heldout", device="cpu", progress=False)
    assert told.warnings == [line for line in pruned.warnings if "encoder" in line]


@pytest.mark.parametrize(
    ("ask", "what"),
    [
        (lambda made, out: super_experts(made / "switch", data=made / "text", out=out), "super experts"),
        (lambda made, out: generate(made / "switch", prompt="the river", out=out), "prompts cannot be continued"),
        (
            lambda made, out: prune(
                made / "switch", method="reap", keep=4, data=made / "text", proof=False, protect="super", out=out
            ),
            "--protect super",
        ),
        (
            lambda made, out: prune(
                made / "switch", method="reap", keep=4, data=made / "text", proof=False, self_generated=4, out=out
            ),
            "--self-generated",
        ),
        (lambda made, out: evaluate(made / "switch", questions=(made / "questions.json",), out=out), "questions"),
    ],
)
def test_what_is_for_models_that_only_write_is_refused(
    made: Path, tmp_path: Path, ask: Callable[[Path, Path], object], what: str
) -> None:
    asked = [{"question": "2 + 2 =", "choices": [" 4", " 5"], "answer": 0, "task": "sums"}]
    (made / "questions.json").write_text(json.dumps(asked), encoding="utf-8")
    with pytest.raises(UnsupportedModel, match=f"{what}.*only write"):
        ask(made, tmp_path / "out")


@torch.no_grad()
def loss(folder: Path, text: Path) -> float:
    """Nats a token, by the family's own loss: the target is the document without its first token."""
    model, tokenizer = stock(folder), transformers.AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for file in sorted(text.rglob("*.txt")):
        ids = tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False, return_tensors="pt").input_ids
        model.config.decoder_start_token_id = START
        mean = model(input_ids=ids[:, :-1], labels=ids[:, 1:]).loss
        total, count = total + float(mean) * (ids.shape[1] - 1), count + ids.shape[1] - 1
    return total / count


def test_one_expert_that_is_not_the_parents_is_named_with_its_layers_number(made: Path, pruned: Any) -> None:
    from safetensors.torch import load_file, save_file

    broken = made / "broken"
    broken.mkdir()
    for file in (made / "pruned").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (shard,) = broken.glob("model*.safetensors")
    tensors = load_file(shard)
    tensors[f"{MOE_LAYERS[5]}.experts.expert_2.wo.weight"][0, 0] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    report = check(broken, parent=made / "switch", progress=False)
    assert not report.ok
    assert {(f.layer, f.expert) for f in report.findings if f.severity == "error"} == {(5, 2)}


@pytest.mark.full
@pytest.mark.slow
def test_layers_that_keep_different_numbers_load_through_moekit(made: Path, tmp_path: Path) -> None:
    told = prune(
        made / "switch",
        method="frequency",
        keep=0.5,
        scope="global",
        least=1,
        data=made / "text",
        proof=False,
        out=tmp_path / "out",
        device="cpu",
        progress=False,
    )
    kept = {row["layer"]: row["kept"] for row in told.layers}
    model = load(tmp_path / "out", device="cpu")
    for layer, name in MOE_LAYERS.items():
        assert len(model.get_submodule(f"{name}.experts")) == len(kept[layer])
        assert model.get_submodule(f"{name}.router").num_experts == len(kept[layer])


@contextmanager
def as_trained() -> Iterator[None]:
    """NLLB's experts as the model was trained: both that a token chose, by their weights."""

    def forward(self: Any, hidden_states: Tensor, router_mask: Tensor, router_probs: Tensor) -> Tensor:
        given = [router_probs[:, [e]] * self[f"expert_{e}"](hidden_states) for e in range(self.num_experts)]
        total: Tensor = torch.stack(given).sum(0) * (1 - self.moe_token_dropout)
        return total

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NllbMoeExperts, "forward", forward)
        yield


@pytest.mark.full
@pytest.mark.slow
def test_nllb_of_a_release_that_runs_what_is_chosen(made: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"keep": 4, "device": "cpu", "progress": False}
    with as_trained():
        told = prune(
            made / "nllb",
            method="reap",
            data=made / "text",
            heldout=made / "heldout",
            out=tmp_path / "pruned",
            **asked,
        )
        assert told.proof is not None
        overall = told.proof["method"]["text"]["overall"]
        model = stock(tmp_path / "pruned")
        assert all(row["experts"] == EXPERTS for row in told.layers)
        assert overall["a"]["nll"] != overall["b"]["nll"]
        assert type(model) is transformers.NllbMoeForConditionalGeneration
    assert check(tmp_path / "pruned", parent=made / "nllb", progress=False).ok


@pytest.mark.full
@pytest.mark.slow
def test_nllb_as_transformers_runs_it_is_pruned_without_being_run(made: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"keep": 4, "device": "cpu", "progress": False}
    with pytest.raises(UnsupportedModel, match="does not run the experts that their router chooses"):
        prune(made / "nllb", method="random", heldout=made / "heldout", **asked, out=tmp_path / "none")
    told = prune(made / "nllb", method="random", proof=False, out=tmp_path / "pruned", **asked)
    source, found = stock(made / "nllb").state_dict(), stock(tmp_path / "pruned").state_dict()
    for row in told.layers:
        side, number = ("encoder", row["layer"]) if row["layer"] < 4 else ("decoder", row["layer"] - 4)
        name = f"model.{side}.layers.{number}.ffn"
        for new, old in enumerate(row["kept"]):
            for part in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
                assert torch.equal(
                    found[f"{name}.experts.expert_{new}.{part}"], source[f"{name}.experts.expert_{old}.{part}"]
                )
        router = f"{name}.router.classifier.weight"
        assert torch.equal(found[router], source[router][row["kept"]])
    assert check(tmp_path / "pruned", parent=made / "nllb", progress=False).ok


def test_weights_that_are_not_finite_are_named(made: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (made / "switch").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    (shard,) = broken.glob("model*.safetensors")
    tensors = load_file(shard)
    tensors[f"{MOE_LAYERS[5]}.experts.expert_6.wi.weight"][3, 1] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(MoekitError) as caught:
        prune(broken, method="reap", keep=4, data=made / "text", proof=False, out=tmp_path / "out", progress=False)
    assert (caught.value.layer, caught.value.expert) == (5, 6)
