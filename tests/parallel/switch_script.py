"""Loads a folder through transformers' own switch on several ranks, and compares logits and gradients with one process.

python -m torch.distributed.run --nproc-per-node 4 tests/parallel/switch_script.py FOLDER IMPLEMENTATION [TP]
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import moekit.parallel.transformers_ep  # noqa: F401


def main(folder: str, name: str, tp: int) -> None:
    """Raises where the numbers differ."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes = {"tp_size": tp, "fsdp_size": world // tp} if tp > 1 else {"fsdp_size": world}
    config = DistributedConfig(**sizes, ep_size=world, ep_implementation=name)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, dtype=torch.float32)
    alone = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.randint(3, 100, (world, 9), generator=torch.Generator().manual_seed(1))
    mine = tokens[rank // tp : rank // tp + 1]
    found, expected = (m(input_ids=mine, labels=mine, use_cache=False) for m in (model, alone))
    logits = getattr(found.logits, "full_tensor", lambda: found.logits)()
    worst = (logits - expected.logits).abs().max()
    assert worst <= 1e-5, f"logits differ by {worst}"
    if name != "moekit_all_reduce":
        found.loss.backward()
        alone(input_ids=tokens[::1], labels=tokens, use_cache=False).loss.backward()
    print(f"rank {rank}: logits within {float(worst):.1e}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 1)
