"""Run by vLLM's own Python: what it says of token ids, as JSON on the last line.

    python in_vllm.py FOLDER '[[5, 6, 7], ...]' NEW

For each prompt: the log-probability of every token behind the first, and NEW tokens chosen greedily. It knows nothing
of moekit, which is not installed beside vLLM.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def main(folder: str, prompts: list[list[int]], new: int) -> None:
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    engine = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=128, enable_prefix_caching=False)
    asked = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, prompt_logprobs=0, detokenize=False)
    answers = engine.generate([{"prompt_token_ids": ids} for ids in prompts], asked, use_tqdm=False)
    print(json.dumps([_told(ids, answer) for ids, answer in zip(prompts, answers, strict=True)]))


def _told(ids: list[int], answer: Any) -> dict[str, Any]:
    of_token = [logprobs[i].logprob for i, logprobs in zip(ids[1:], answer.prompt_logprobs[1:], strict=True)]
    return {"logprobs": of_token, "chosen": list(answer.outputs[0].token_ids)}


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3]))
