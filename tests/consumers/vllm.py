"""What vLLM on a CPU makes of a folder; run in the environment of `.ci/consumer vllm`.

    vllm.py FOLDER PROMPTS.json RESULT [DTYPE]

PROMPTS.json: {"prompts": [[token, ...], ...] of one length, "new_tokens": greedy tokens of each}.
RESULT, a folder: `layers.json` {module of vLLM: scheme}, `continuations.json` [[token, ...], ...],
`tensors.safetensors` with `logprobs` (prompts, length - 1, V), entry t of what follows token t,
and for each quantized module `weight.NAME` (rows, columns): what it makes of the unit vectors.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np


def layers_of(model: Any) -> dict[str, tuple[str, Any]]:
    """Return the scheme of each linear module, and the weight (rows, columns) where it is coded."""
    import torch

    found = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "scheme", None)
        if scheme is not None:
            columns = int(module.input_size)
            unit = torch.eye(columns, dtype=model.lm_head.weight.dtype)
            out = module(unit)
            rows = out[0] if isinstance(out, tuple) else out  # (columns, rows)
            found[name] = (type(scheme).__name__, rows.T.float().contiguous())
        elif hasattr(module, "quant_method") and hasattr(module, "input_size"):
            found[name] = (type(module.quant_method).__name__, None)
    return found


def logprobs_of(flat: Any, vocabulary: int) -> Any:
    """Return (length - 1, V) float32 from vLLM's lists of (token, log probability)."""
    tokens = np.asarray(flat.token_ids, np.int64)
    values = np.asarray(flat.logprobs, np.float32)
    rows = []
    for start, end in zip(flat.start_indices, flat.end_indices, strict=True):
        if start == end:
            continue  # nothing comes before the first token
        row = np.full(vocabulary, np.nan, np.float32)
        row[tokens[start:end]] = values[start:end]
        rows.append(row)
    return np.stack(rows)


def main() -> None:
    here = Path(__file__).parent.resolve()
    sys.path = [p for p in sys.path if Path(p or ".").resolve() != here]
    import torch
    from safetensors.torch import save_file
    from vllm import LLM, SamplingParams

    folder, asked, result = (
        sys.argv[1],
        json.loads(Path(sys.argv[2]).read_text()),
        Path(sys.argv[3]),
    )
    prompts = [{"prompt_token_ids": tokens} for tokens in asked["prompts"]]
    length = len(asked["prompts"][0])
    vocabulary = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
    llm = LLM(
        folder,
        dtype=sys.argv[4] if len(sys.argv) > 4 else "float32",
        enforce_eager=True,
        max_logprobs=vocabulary,
        max_model_len=length + asked["new_tokens"] + 1,
        skip_tokenizer_init=True,
    )
    (layers,) = llm.apply_model(layers_of)
    score = SamplingParams(
        max_tokens=1,
        temperature=0,
        detokenize=False,
        flat_logprobs=True,
        prompt_logprobs=vocabulary,
    )
    greedy = SamplingParams(
        max_tokens=asked["new_tokens"], temperature=0, detokenize=False, ignore_eos=True
    )
    scored = []
    for prompt in prompts:  # a vocabulary of logarithms for each token: arrays take a tenth of it
        flat = llm.generate([prompt], score, use_tqdm=False)[0].prompt_logprobs
        scored.append(logprobs_of(flat, vocabulary))
    answers = llm.generate(prompts, greedy, use_tqdm=False)
    result.mkdir(parents=True, exist_ok=True)
    tensors = {"logprobs": torch.from_numpy(np.stack(scored))}
    tensors |= {f"weight.{n}": w for n, (_, w) in layers.items() if w is not None}
    save_file(tensors, result / "tensors.safetensors")
    (result / "layers.json").write_text(json.dumps({n: s for n, (s, _) in layers.items()}))
    tokens = [list(answer.outputs[0].token_ids) for answer in answers]
    (result / "continuations.json").write_text(json.dumps(tokens))


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    main()
