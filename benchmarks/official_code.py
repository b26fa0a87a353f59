"""Official code of papers beside moekit's, on the same tiny inputs.

    python benchmarks/official_code.py --mc-smoe DIR --mc DIR --quantmoe DIR --compressed-experts DIR --ream DIR \
        --hc-smoe DIR --reap DIR --mone DIR --gemq DIR

Each DIR is your own checkout of a repository: UNITES-Lab/MC-SMoE, Aaronhuang-778/Mixture-Compressor-MoE (or a fork of
it), UNITES-Lab/moe-quantization, yifei-he/Compressed-Experts, SamsungSAILMontreal/ream, wazenmai/HC-SMoE,
CerebrasResearch/reap, zxgx/mode-pd, jndeng/GEMQ. Its functions are imported from there, both sides get the same
tensors or the same tiny model, and a table tells what each gave. Repositories that are not named are skipped. Imports
that have nothing to do with the function are left empty, and .cuda() stays on the CPU; nothing else is changed.

Exit code 1 where a row disagrees that should not.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

import torch

PARTS = {
    "mc-smoe": ("mc_smoe", "UNITES-Lab/MC-SMoE"),
    "mc": ("pmq", "Aaronhuang-778/Mixture-Compressor-MoE"),
    "quantmoe": ("quantmoe", "UNITES-Lab/moe-quantization"),
    "compressed-experts": ("compressed", "yifei-he/Compressed-Experts"),
    "ream": ("ream", "SamsungSAILMontreal/ream"),
    "hc-smoe": ("hc_smoe", "wazenmai/HC-SMoE"),
    "reap": ("reap_code", "CerebrasResearch/reap"),
    "mone": ("mone", "zxgx/mode-pd"),
    "gemq": ("gemq", "jndeng/GEMQ"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (_, repository) in PARTS.items():
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help=f"checkout of {repository}")
    given = vars(parser.parse_args())
    torch.set_num_threads(1)
    failed = False
    for name, (module, repository) in PARTS.items():
        checkout = given[name.replace("-", "_")]
        if checkout is None:
            print(f"{repository} skipped: no --{name}\n")
            continue
        start = time.perf_counter()
        table = importlib.import_module(f"official.{module}").run(checkout.resolve())
        failed |= table.failed()
        print(f"{table.text()}\n\n{time.perf_counter() - start:.0f} s\n", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
