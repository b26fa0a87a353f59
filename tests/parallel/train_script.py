"""Trains a tiny model under torchrun, or alone, and writes its losses and weights.

python -m torch.distributed.run --nproc-per-node 4 tests/parallel/train_script.py OUT '{"steps": 20, ...}'
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from moekit.data.batches import TokenBatches
from moekit.training import TrainConfig, train
from tests.families import build


def rows(count: int, length: int) -> TokenBatches:
    """Rows of random tokens."""
    ids = torch.randint(3, 100, (count, length), generator=torch.Generator().manual_seed(7)).int()
    documents = torch.arange(count).unsqueeze(1).expand(count, length).contiguous().int()
    return TokenBatches(ids, documents, torch.zeros_like(documents, dtype=torch.int16), ("x",))


def main(out: Path, settings: dict[str, Any]) -> None:
    """One run."""
    torch.set_num_threads(1)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    family, dispatch = settings.pop("family", "qwen2_moe"), settings.pop("dispatch", "once-per-rank")
    kind, copies = settings.pop("data_parallel", "ddp"), settings.pop("copies", 1)
    micro, stop = settings.pop("micro", 4), settings.pop("stop", None)
    if settings.pop("other_order", False):
        _turn_micro_batches(2 * micro)
    model = build(family)
    config = TrainConfig(
        batch=2,
        accumulation=micro // world,
        seq_len=16,
        lr=1e-2,
        lr_schedule="constant",
        warmup=0,
        **{"precision": "fp32", **settings},
    )
    distribution = None
    if world > 1:
        from moekit.parallel.data_parallel import RankedTraining
        from moekit.parallel.ranks import Ranks, expert_mesh
        from moekit.parallel.sharding import expert_parallel

        dist.init_process_group("gloo")
        ranks = Ranks.of(expert_mesh(world // copies, nodes=2 if dispatch == "hierarchical" else 1))
        expert_parallel(model, ranks, dispatch=dispatch)
        distribution = RankedTraining(ranks, kind, {"model": "tiny"})
        distribution.prepare(model)
    text = rows(8 * micro, 16)
    if stop is not None:
        _stop_after(stop)
    result = train(
        model, None, text, config, output=out / "run" if settings.get("save_every") else None, distribution=distribution
    )  # type: ignore[arg-type]
    if distribution is not None:
        from moekit.parallel.sharding import gather_experts

        gather_experts(model)
    weights = {name: _whole(p) for name, p in model.named_parameters()}
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(weights, out / "weights.pt")
        (out / "result.json").write_text(
            json.dumps(
                {
                    "losses": result.losses,
                    "resumed": result.resumed_from,
                    "norms": [h.get("grad_norm") for h in result.history],
                }
            )
        )
    if dist.is_initialized():
        dist.destroy_process_group()


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    full = getattr(parameter, "full_tensor", None)
    return (full() if full is not None else parameter).detach().clone()


def _turn_micro_batches(rows_of_step: int) -> None:
    """Let each step go through its micro-batches of two rows backwards: the same sums in another order."""
    from moekit.training import run

    ordered = run.row_order

    def turned(*args: Any) -> list[int]:
        numbers = ordered(*args)
        steps = [numbers[i : i + rows_of_step] for i in range(0, len(numbers), rows_of_step)]
        return [row for step in steps for i in range(len(step) - 2, -1, -2) for row in step[i : i + 2]]

    run.row_order = turned  # type: ignore[assignment]


def _stop_after(step: int) -> None:
    """Kill this process in the step after this one, as a power cut would."""
    from moekit.training import trainer

    begin = trainer._Report.on_step_begin

    def on_step_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= step:
            os._exit(9)
        begin(self, args, state, control, **kwargs)

    trainer._Report.on_step_begin = on_step_begin  # type: ignore[method-assign]


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
