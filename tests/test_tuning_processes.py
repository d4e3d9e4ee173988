"""Two processes tune to what one tunes to, up to the rounding of sums."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from processes import run_alone, run_on_two
from safetensors.numpy import load_file

SCRIPT = """\
import sys
from dataclasses import replace
from pathlib import Path

import torch
import pico
from tuning_cases import allocation_of, ranges_of, small_data, small_model, uniform

import hawqkit as hk
from hawqkit import distributed
from hawqkit.tuning.settings import Distillation, TuneSettings

torch.set_num_threads(1)
here = distributed.processes()
folder = Path(sys.argv[1])
double = {"dtype": torch.float64}
model, data = small_model(steps=30, **double), small_data(70)
data = replace(data, inputs={k: v.double() for k, v in data.inputs.items()})
settings = TuneSettings(
    steps=8, batch=18, learning_rate=2e-3, clip=1.0, learned_scales="both", start="lsq",
    distillation=Distillation(), batch_norm="re-estimated", checkpoint_every=3,
)
ranges = ranges_of(model, data, 8)
allocation = allocation_of(model, uniform(model, "w8a8"), activations=ranges)
tuned = hk.tune(
    model, allocation, data, settings=settings, folder=folder, held_out={"held-out": data}
)
assert tuned.record.validation is not None
llama = hk.wrap_model(pico.llama(dtype=torch.float64), name="llama")
mix = {x.name: "int8-g32" for x in llama.layers if x.kind == "linear"}
text = pico.sequences(9, 12, ragged=True)
told = hk.tune(llama, mix, text, settings=TuneSettings(steps=4, batch=5, optimizer="sgd"))
curves = {"net": tuned.record.curve.loss, "llama": told.record.curve.loss}
hashes = distributed.gather((tuned.record.tuned, told.record.tuned))
assert len(set(hashes)) == 1, "the processes end with different networks"
if here.is_main:
    import json

    (folder / "found.json").write_text(json.dumps({**curves, "processes": here.count}))
distributed.wait()
distributed.finish()
"""


@pytest.mark.timeout(400)  # an interpreter for each of two processes, on cores that others use
def test_two_processes_tune_to_what_one_tunes_to(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run_alone(str(script), str(tmp_path / "one"))
    run_on_two(str(script), str(tmp_path / "two"))
    one, two = (json.loads((tmp_path / n / "found.json").read_text()) for n in ("one", "two"))
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-9)
    files = [load_file(tmp_path / n / "tuned" / "model.safetensors") for n in ("one", "two")]
    assert set(files[0]) == set(files[1])
    for name, values in files[0].items():
        np.testing.assert_allclose(files[1][name], values, rtol=1e-7, atol=1e-9)
