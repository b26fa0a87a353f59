"""Plant faults in a copy of the library, one at a time, and show which test catches each.

    python benchmarks/planted_faults.py [--only NAME ...] [--json]

Each fault is one line of the source made wrong, as a slip of the hand would: gate and up projections swapped, an
inverse forgotten, a row of the router that does not follow its expert. The tests that run are those of `make test`
(slow ones left out), the folders that hold the laws first, until one fails. A fault that no test notices is an error.
Before the first one all these tests run on a copy without a fault, and must pass: what fails there would catch
anything.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Fault:
    """One wrong line.

    Attributes:
        name: what is wrong.
        file: under src/moekit.
        right: text as it stands, there once.
        wrong: what stands in its place.
        tests: where it should be noticed, cheapest first.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


FAULTS = (
    Fault(
        "gate and up projections swapped where they are stored one after the other",
        "compress/weights.py",
        "        gate, up = both.chunk(2, dim=1)\n",
        "        up, gate = both.chunk(2, dim=1)\n",
        ("tests/unit/compress/engine", "tests/engine"),
    ),
    Fault(
        "biases of the down projections lost when a layer is written back",
        "compress/weights.py",
        '        ("down", True): weights.down_bias_EH,\n',
        '        ("down", True): None if weights.down_bias_EH is None else torch.zeros_like(weights.down_bias_EH),\n',
        ("tests/unit/compress/engine", "tests/engine"),
    ),
    Fault(
        "the last expert that should stay replaced by its neighbour on disk",
        "compress/engine/kept.py",
        "(expert + 1) * each) for expert in self.keep]",
        "(expert + 1) * each) for expert in (*self.keep[:-1], self.keep[-1] - 1)]",
        ("tests/engine", "tests/unit/compress/engine"),
    ),
    Fault(
        "experts reordered, their router's rows not",
        "anatomy/permute.py",
        "            _reorder(tensor, axis, index)\n",
        "            _reorder(tensor, axis, torch.arange(count))\n",
        ("tests/unit/anatomy", "tests/laws"),
    ),
    Fault(
        "tensors of parts that name experts are renamed by the order, not by its inverse",
        "runtime/axes.py",
        "torch.tensor(inverse(order), device=tensor.device)",
        "torch.tensor(list(order), device=tensor.device)",
        ("tests/laws", "tests/unit/routing"),
    ),
    Fault(
        "a stale cache: what earlier positions left is not renewed",
        "runtime/cache.py",
        "        self._state[layer, name] = value.detach()\n",
        "        self._state.setdefault((layer, name), value.detach())\n",
        ("tests/laws",),
    ),
    Fault(
        "padding seen by parts that mix what attention looks at",
        "runtime/context.py",
        "            mask = mask & self.attention_mask.to(device)[:, None, :]\n",
        "            mask = mask.clone()\n",
        ("tests/laws",),
    ),
    Fault(
        "weights of chosen experts no longer divided by their sum",
        "anatomy/gate.py",
        "        if spec.normalise:\n",
        "        if spec.normalise and spec.scoring == 'never':\n",
        ("tests/unit/routing", "tests/unit/anatomy"),
    ),
    Fault(
        "the selection bias added to the weights' scores and not to the choice",
        "anatomy/gate.py",
        "        return scores_TE if bias_E is None else scores_TE + bias_E\n",
        "        return scores_TE\n",
        ("tests/unit/routing", "tests/unit/anatomy"),
    ),
    Fault(
        "a row between ranks that leaves out a token's second expert there",
        "parallel/plan.py",
        "    slot_NK = same_NKK.tril(-1).sum(-1)\n",
        "    slot_NK = same_NKK.tril(-1).sum(-1) * 0\n",
        ("tests/parallel/test_dispatch.py", "tests/unit/parallel"),
    ),
    Fault(
        "padding counted as tokens by the balance loss",
        "training/losses.py",
        "if mask_T is None else indices_TK.masked_fill(~mask_T.unsqueeze(-1), experts)\n    # Not",
        "\n    # Not",
        ("tests/unit/training/test_losses.py", "tests/laws", "tests/unit/training"),
    ),
    Fault(
        "the denominator of a resampled ratio held fixed",
        "_intervals.py",
        "    residual_N = total_N - total_N.sum() / size_N.sum() * size_N\n",
        "    residual_N = total_N - total_N.mean()\n",
        ("tests/unit/evaluation", "tests/unit/placement"),
    ),
    Fault(
        "tensors that the model has no place for left out of a saved folder",
        "checkpoint/carried.py",
        "    kept = tuple(source.tensors[name] for name in origin.tensors if name not in left)\n",
        "    kept = tuple(source.tensors[name] for name in origin.tensors if name in left)\n",
        ("tests/unit/checkpoint/test_carried.py",),
    ),
)


def copy(folder: Path) -> None:
    """Copy the sources and tests."""
    for name in ("src", "tests", "docs", "recipes", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "mkdocs.yml", "README.md"):
        shutil.copy(ROOT / name, folder / name)


def plant(fault: Fault, folder: Path) -> None:
    """Copy the sources and tests, and make the one line wrong.

    Raises:
        SystemExit: the line is not there once: the library has changed, and this list has not.
    """
    copy(folder)
    file = folder / "src" / "moekit" / fault.file
    text = file.read_text()
    if text.count(fault.right) != 1:
        raise SystemExit(f"{fault.name}: its line stands {text.count(fault.right)} times in {fault.file}")
    file.write_text(text.replace(fault.right, fault.wrong))


def caught_by(folder: Path, tests: tuple[str, ...]) -> str | None:
    """The first test that fails; None if all pass."""
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not full"]
    for where in tests:
        done = subprocess.run([*command, where], cwd=folder, env=environment, capture_output=True, text=True)
        found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, flags=re.MULTILINE)
        if found:
            return found[1]
        if done.returncode:
            raise SystemExit(f"pytest did not run: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return None


def control(faults: Sequence[Fault]) -> None:
    """Run all that is to catch them on a copy without a fault: what fails there would catch anything.

    Raises:
        SystemExit: a test fails, or pytest does not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy(Path(folder))
        failed = caught_by(Path(folder), tuple(dict.fromkeys(name for fault in faults for name in fault.tests)))
    if failed is not None:
        raise SystemExit(f"{failed} fails without any fault: mend that first")


def main() -> None:
    """Plant each, print who caught it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="faults whose name contains one of these words")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    results: list[dict[str, object]] = []
    faults = [fault for fault in FAULTS if not asked.only or any(word in fault.name for word in asked.only)]
    control(faults)
    for fault in faults:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            plant(fault, Path(folder))
            test = caught_by(Path(folder), fault.tests)
        results.append({"fault": fault.name, "file": fault.file, "caught_by": test})
        if not asked.json:
            print(f"{fault.name}\n    {test or 'NOT CAUGHT'}  ({time.monotonic() - began:.0f} s)", flush=True)
    if asked.json:
        print(json.dumps(results, indent=2))
    missed = [result for result in results if result["caught_by"] is None]
    if missed:
        raise SystemExit(f"{len(missed)} of {len(results)} faults were not caught")


if __name__ == "__main__":
    main()
