"""k-quants, rounded by llama.cpp itself: a GGUF file of floats goes in, one of blocks of 256 comes out.

A k-quant is a block of 256 numbers whose small groups have scales of their own, which are numbers of few bits
themselves. llama.cpp chooses them by a search and mixes widths among tensors (the `_m` in q4_k_m); both are its own and
change with its releases, so they are asked of it (`llama_model_quantize`) rather than written again. It runs in a
process of its own: what it cannot do, it ends the process for.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from moekit._files import read_text
from moekit.errors import BadConfig, NumericFault, UnsupportedModel

# Of matrices in a file that are not rounded before; auto as they are stored.
TensorType = Literal[
    "auto",
    "f32",
    "f16",
    "bf16",
    "q8_0",
    "q2_k",
    "q3_k_s",
    "q3_k_m",
    "q3_k_l",
    "q4_k_s",
    "q4_k_m",
    "q5_k_s",
    "q5_k_m",
    "q6_k",
]
KQUANTS = frozenset(name for name in get_args(TensorType) if "_k" in name)
FLOATS = frozenset({"F32", "F16", "BF16", "F64"})
# Bits that experts were rounded to -> the k-quant of as many.
OF_BITS = {1: "Q2_K", 2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 7: "Q8_0", 8: "Q8_0"}
_EXACT = frozenset({"Q4_0", "Q5_0", "Q8_0"})
_EXTRA = "pip install 'moekit[engines]'"
_CHILD = "import sys; from moekit.exporting.gguf_kquants import round_here; round_here(sys.argv[1])"
_BLOCK = 32
_TOLD = 3


def main_kind(name: str) -> str:
    """The type that most of a file is of: Q4_K for q4_k_m."""
    return name.upper()[:4]


def check_installed() -> None:
    """Refuse before any work what only llama.cpp can do.

    Raises:
        UnsupportedModel: llama-cpp-python is not installed.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        raise UnsupportedModel(
            "k-quants are rounded by llama.cpp, and its package llama-cpp-python is not installed",
            hint=f"{_EXTRA} (it compiles llama.cpp); or --type q8_0, which needs no engine",
        )


def check_columns(name: str, layer: int, columns: int) -> None:
    """Refuse experts that llama.cpp would leave in floats: their rows do not come in blocks.

    Raises:
        BadConfig: names the layer.
    """
    if columns % _BLOCK:
        raise BadConfig(
            f"rows of {name} hold {columns} numbers, and the smallest of llama.cpp's blocks holds {_BLOCK}",
            layer=layer,
            hint="such experts stay in floats: --type bf16 or f16",
        )


def quantize(source: Path, target: Path, kind: str, overrides: Mapping[str, str]) -> dict[str, str]:
    """Let llama.cpp round a file, and read back what became of its experts.

    Args:
        source: file of floats, some tensors perhaps in blocks already.
        target: the file to write.
        kind: q2_k to q6_k, llama.cpp's mixture of that name.
        overrides: name of a tensor -> the type that it gets, or has already.

    Returns:
        Name of each tensor of experts -> its type.

    Raises:
        UnsupportedModel: llama.cpp refused; says in its own words why.
        NumericFault: a tensor of experts is left in floats.
    """
    job = target.with_name(f"{target.name}.job.json")
    told = {"source": str(source), "target": str(target), "kind": kind, "overrides": dict(overrides)}
    job.write_text(json.dumps(told))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CHILD, str(job)], env=environment, capture_output=True, text=True, errors="replace"
        )
    finally:
        job.unlink(missing_ok=True)
    if done.returncode or not target.is_file():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise UnsupportedModel(
            f"llama.cpp did not round the file to {kind}: {' / '.join(lines[-_TOLD:]) or 'it gave no reason'}",
            hint="write floats (--type bf16) and give them to llama.cpp's own llama-quantize",
        )
    kinds = refuse_floats(target)
    for name, wanted in overrides.items():
        if wanted in _EXACT and kinds[name] != wanted:
            raise NumericFault(
                f"{name} held rounded experts exactly in {wanted}, and llama.cpp made {kinds[name]} of it",
                file=target,
                hint="a newer llama-cpp-python, or --type q8_0, which needs no engine",
            )
    return kinds


def refuse_floats(file: Path) -> dict[str, str]:
    """The types of a file's tensors of experts.

    Raises:
        NumericFault: one of them is in floats, or there are none.
    """
    import gguf

    kinds = {
        tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors if "_exps." in tensor.name
    }
    left = [name for name, kind in kinds.items() if kind in FLOATS and name.endswith(".weight")]
    if left or not kinds:
        layer = re.search(r"blk\.(\d+)\.", left[0]) if left else None
        raise NumericFault(
            f"{left[0]} is left in {kinds[left[0]]}" if left else "the file holds no tensor of experts",
            file=file,
            layer=int(layer[1]) if layer else None,
            hint="another --type, or a newer llama-cpp-python",
        )
    return kinds


def counted(kinds: Mapping[str, str]) -> dict[str, int]:
    """How many tensors of experts' weights are of which type."""
    return dict(sorted(Counter(kind for name, kind in kinds.items() if name.endswith(".weight")).items()))


def sizes(file: Path) -> tuple[int, int]:
    """Bytes of all tensors of a file, and of its experts."""
    import gguf

    told = [(int(tensor.n_bytes), "_exps." in tensor.name) for tensor in gguf.GGUFReader(file).tensors]
    return sum(n for n, _ in told), sum(n for n, experts in told if experts)


def round_here(job: str) -> None:
    """Round a file in this process; what `quantize` starts.

    Args:
        job: file that says what is to be done.

    Raises:
        RuntimeError: llama.cpp refused.
    """
    llama_cpp: Any = importlib.import_module("llama_cpp")
    told = json.loads(read_text(job))
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{told['kind'].upper()}")
    settings.nthread = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    kept = _override(llama_cpp, settings, told["overrides"])
    code = llama_cpp.llama_model_quantize(os.fsencode(told["source"]), os.fsencode(told["target"]), settings)
    del kept  # llama.cpp read from it until here
    if code:
        raise RuntimeError(f"llama_model_quantize answered {code}")


def _override(llama_cpp: Any, settings: Any, overrides: Mapping[str, str]) -> Any:
    """Give single tensors types of their own; returns the memory that llama.cpp reads."""
    if not overrides:
        return None
    if not hasattr(llama_cpp, "llama_model_tensor_override") or not hasattr(settings, "tt_overrides"):
        raise RuntimeError(
            "this llama-cpp-python gives no types to single tensors, which experts that were rounded before need: "
            "pip install -U llama-cpp-python"
        )
    array = (llama_cpp.llama_model_tensor_override * (len(overrides) + 1))()  # the last one, empty, ends the list
    for place, (name, kind) in enumerate(overrides.items()):
        array[place].pattern = f"^{re.escape(name)}$".encode()
        array[place].type = getattr(llama_cpp, f"GGML_TYPE_{kind}")
    settings.tt_overrides = array
    return array
