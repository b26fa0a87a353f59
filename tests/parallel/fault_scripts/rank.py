"""One rank of a job in which something goes wrong: dispatches random tokens again and again until it does.

python rank.py FAULT VICTIM WHEN; it ends as a command of moekit's own would.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from moekit.cli._errors import explain, install_signals, show_warnings
from moekit.errors import BadData
from moekit.parallel.dispatcher import DispatchOptions
from moekit.parallel.dispatchers.once_per_rank import OncePerRank
from moekit.parallel.launch.start import StartedRanks, agree, start_ranks
from moekit.parallel.layout import ExpertLayout
from moekit.parallel.ranks import Ranks

EXPERTS, HIDDEN, TOP_K, TOKENS = 8, 16, 2, 32
AT_STEP = 5
LONG = 60.0  # who is still here by then has noticed nothing


def _go_wrong(fault: str) -> None:
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "term":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(LONG)
    elif fault == "raise":
        raise BadData("the text of this rank is empty")
    elif fault == "spin":
        while time.sleep(0.1) is None:  # a loop of the user's own that never ends
            pass
    elif fault == "child":  # as a data loader's: SIGTERM to it is nobody else's business
        child = os.fork()
        if child == 0:
            try:
                time.sleep(LONG)
            except KeyboardInterrupt:
                os._exit(9)
            os._exit(1)
        time.sleep(0.5)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    elif fault == "exit":
        sys.exit(0)


def work(ranks: StartedRanks, fault: str, victim: int, when: str) -> None:
    torch.manual_seed(ranks.rank)
    layout = ExpertLayout.contiguous(EXPERTS, ranks.world, torch.device("cpu"))
    assert dist.group.WORLD is not None
    dispatcher = OncePerRank.over(layout, Ranks(dist.group.WORLD), DispatchOptions())
    print("dispatching", flush=True)
    until = time.monotonic() + LONG
    for step in range(10**9):
        wrong = fault if step == AT_STEP and ranks.rank == victim else ""
        if when == "before":
            _go_wrong(wrong)
        x_NH = torch.randn(TOKENS, HIDDEN)
        indices_NK = torch.rand(TOKENS, EXPERTS).argsort(1)[:, :TOP_K]
        flight = dispatcher.dispatch(x_NH, indices_NK, torch.full((TOKENS, TOP_K), 1 / TOP_K))
        if when == "middle":
            _go_wrong(wrong)
        dispatcher.combine(flight, lambda rows_QH, ids_QS, weights_QS: rows_QH * weights_QS.sum(-1, keepdim=True))
        if when == "after":
            _go_wrong(wrong)
        if fault in ("none", "child") and step == AT_STEP:
            return
        if time.monotonic() > until:
            raise AssertionError("nothing was noticed")
        time.sleep(0.01)


def main(fault: str, victim: int, when: str) -> int:
    install_signals()
    show_warnings()
    torch.set_num_threads(1)
    odd = int(os.environ.get("RANK", "0")) == victim
    try:
        if fault == "never" and odd:
            return 7
        with start_ranks() as ranks:
            print("pid", os.getpid(), flush=True)
            if fault == "mute" and odd:
                time.sleep(LONG)
            agree(
                timeout=4.0,
                config={"top_k": 4 if fault == "config" and odd else 2, "dispatch": "once-per-rank"},
                plan="ab12" if fault == "plan" and odd else "cd34",
            )
            work(ranks, fault, victim, when)
    except BaseException as error:
        return explain(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
