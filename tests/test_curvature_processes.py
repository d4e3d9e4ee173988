"""Two processes, each with its share of the batches, give the products of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from processes import run_alone, run_on_two

SCRIPT = """
import json, sys
from pathlib import Path
import curvature_oracles as oracles
import torch
from hawqkit.curvature.fisher import fisher
from hawqkit.curvature.gauss_newton import gauss_newton
from hawqkit.curvature.hessian import hessian
from hawqkit.curvature.layer_traces import layer_traces
from hawqkit.curvature.objective import cross_entropy
from hawqkit.distributed import finish, processes
me = processes()
case = oracles.mlp()
few = case.batches[:1]
found = {"processes": me.count}
for name, make, batches in (
    ("hessian", hessian, case.batches), ("fisher", fisher, case.batches),
    ("gauss-newton", gauss_newton, case.batches), ("one batch", hessian, few),
):
    op = make(case.model, cross_entropy(), batches)
    found[name] = op.matmat(oracles.noise(op.size, 2, seed=1)).flatten().tolist()
op = hessian(case.model, cross_entropy(), case.batches, products="difference")
found["difference"] = op.matvec(oracles.noise(op.size, seed=1)).tolist()
for kind in ("hessian", "gauss-newton"):
    traces = layer_traces(case.model, cross_entropy(), case.batches, kind=kind, max_probes=16)
    found["traces of " + kind] = [t.value for t in traces.values()]
Path(sys.argv[1] + str(me.index)).write_text(json.dumps(found))
finish()
"""


@pytest.mark.timeout(400)  # three interpreters that import torch, on cores that others use
def test_two_processes_give_the_products_of_one(tmp_path: Path) -> None:
    script = tmp_path / "products.py"
    script.write_text(SCRIPT)
    run_alone(str(script), str(tmp_path / "one"))
    run_on_two(str(script), str(tmp_path / "two"))
    one = json.loads((tmp_path / "one0").read_text())
    both = [json.loads((tmp_path / f"two{i}").read_text()) for i in range(2)]
    assert [f.pop("processes") for f in (one, *both)] == [1, 2, 2]
    for found in both:
        for name, values in one.items():
            assert found[name] == pytest.approx(values, rel=1e-6, abs=1e-12), name
