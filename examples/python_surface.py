"""The stages as Python calls: python examples/python_surface.py MODEL [sequences] [length]."""

import sys

import hawqkit as hk


def main(source: str, sequences: int = 16, length: int = 128) -> hk.Validation:
    """Probe a model, choose 4.5 bits on average, and measure the result on held-out text."""
    model = hk.load_model(source, exclude=["lm_head"])
    batches = hk.load_batches("builtin", model, sequences=sequences, length=length, withheld=8)
    held_out = hk.load_batches("builtin", model, split="held-out", sequences=8, length=length)
    sensitivities = hk.probe(model, batches, formats=["int3-g32", "int4-g32", "int8-g32"])
    allocation = hk.allocate(sensitivities, average_bits=4.5, draws=8)
    validation = hk.validate(model, allocation, held_out)
    for mix in validation.mixes:
        found = mix.measured["held-out"]
        predicted = f"{mix.prediction.kl:.4f}" if mix.prediction else "-"
        print(f"{mix.name:14} KL {found.kl:.4f} +- {found.kl_stderr:.4f}, predicted {predicted}")
    return validation


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
