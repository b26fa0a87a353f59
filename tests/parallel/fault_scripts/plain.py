"""A user's own script, without `with` and without any handling of errors; rank 1 fails."""

from __future__ import annotations

import torch
import torch.distributed as dist

from moekit.parallel.launch.start import start_ranks

ranks = start_ranks()
ones = torch.ones(2)
dist.all_reduce(ones)
if ranks.rank == 1:
    raise ValueError("a fault of the user's")
while True:
    dist.all_reduce(ones)
