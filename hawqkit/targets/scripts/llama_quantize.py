"""Quantize a GGUF file with llama.cpp's llama-quantize by the files beside this script.

python apply.py MODEL.gguf OUTPUT.gguf [--imatrix FILE]

MODEL.gguf is in float, of the model that the mix was chosen for; make it with llama.cpp's
convert_hf_to_gguf.py. llama-quantize must be on the path, or named in LLAMA_QUANTIZE.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
TYPES = HERE / "tensor-types.txt"
# What the tool calls a file of mostly this type; its own mixture is overruled tensor by tensor.
MIXTURES = {"q3_k": "Q3_K_M", "q4_k": "Q4_K_M", "q5_k": "Q5_K_M"}
FLOATS = ("f32", "f16", "bf16")


def main() -> None:
    """Quantize, compare the type of every tensor with the mix, and keep the file if all agree."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--imatrix", type=Path, default=None, help="importance of the inputs")
    args = parser.parse_args()
    if args.output.exists():
        sys.exit(f"{args.output} exists: name a new file.")

    from gguf import GGUFReader

    wanted = {}
    for line in TYPES.read_text(encoding="utf-8").split():
        pattern, _, kind = line.partition("=")
        wanted[pattern.removeprefix("^").removesuffix("$").replace("\\", "")] = kind
    before = {t.name: t.tensor_type.name.lower() for t in GGUFReader(args.model).tensors}
    if missing := sorted(set(wanted) - set(before)):
        sys.exit(f"the mix is of another model: the file has no tensors {missing[:5]}.")
    count = Counter(kind for kind in wanted.values() if kind not in FLOATS)
    most = count.most_common(1)[0][0] if count else "q8_0"
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.output.parent) as place:
        made = Path(place) / "model.gguf"
        command = [os.environ.get("LLAMA_QUANTIZE", "llama-quantize")]
        command += ["--imatrix", str(args.imatrix)] if args.imatrix is not None else []
        command += ["--tensor-type-file", str(TYPES), str(args.model), str(made)]
        try:
            subprocess.run([*command, MIXTURES.get(most, most.upper())], check=True)
        except FileNotFoundError:
            sys.exit(f"there is no {command[0]}: build llama.cpp, or name it in LLAMA_QUANTIZE.")
        except subprocess.CalledProcessError as error:
            sys.exit(f"llama-quantize ended with {error.returncode}; its messages stand above.")
        after = {t.name: t.tensor_type.name.lower() for t in GGUFReader(made).tensors}
        wrong = [
            f"{name}: {after.get(name)} in place of {kind}"
            for name, kind in {**before, **wanted}.items()
            if after.get(name) != kind
        ]
        if wrong:
            sys.exit("llama-quantize changed the mix, nothing was saved:\n" + "\n".join(wrong))
        made.rename(args.output)


if __name__ == "__main__":
    main()
