"""Choose again from a saved run, without torch: examples/allocate_again.py RUN 3.5 4.0 4.5."""

import sys

from hawqkit.pipeline.choosing import ChoiceSettings, choose
from hawqkit.pipeline.folder import RunFolder


def main(run: str, *average_bits: str) -> None:
    """Print the predicted loss of the best mix at each size."""
    sensitivities = RunFolder.at(run).read_sensitivities()
    for bits in average_bits:
        allocation, _ = choose(sensitivities, ChoiceSettings(budgets={"average_bits": float(bits)}))
        certificate = allocation.certificate
        print(
            f"{bits} bits: {allocation.objective:.4f} nats, "
            f"proven not below {certificate.bound:.4f}"
        )
    assert "torch" not in sys.modules


if __name__ == "__main__":
    main(*sys.argv[1:])
