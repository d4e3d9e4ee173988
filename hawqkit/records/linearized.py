"""The record of a prediction with linear logits, beside what was measured on the same examples."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Linearized:
    """Predictions of the mean KL of one mix, in nats, from the same withheld sequences.

    With z the logits, z' those of the mix, t = J dW their derivative along all rounding errors at
    once, p = softmax(z):

        quadratic = mean 1/2 t' (diag p - p p') t          logits linear, softmax of second order
        kl        = mean KL(p || softmax(z + t))           logits linear, softmax exact
        parabolic = mean KL(p || softmax(z + s))           logits on a parabola, softmax exact
        measured  = mean KL(p || softmax(z'))              nothing approximated

    z + s is where the parabola leads that goes through the logits at -1/4, 0 and 1/4 of the errors:
    unlike the three before it, no limit of small errors, but an extrapolation by four.

    `quadratic` is the expectation of `Prediction.joint` over the labels that the probe samples.
    Errors are jackknives over documents; those of differences and the ratio are paired.

    Attributes:
        softmax: kl - quadratic: what the softmax does beyond second order.
        network: measured - kl: what the network does beyond first order.
        ratio: kl / measured; None where nothing was lost.
        sequences: number of sequences, or examples.
        counted: predictions in them.
        how: `forward` mode, or `difference` of the outputs at two distances.
        reason: why forward mode did not serve; empty where it did.
        parabolic: None for models in half precision, whose rounding the parabola magnifies.
        parabolic_ratio: parabolic / measured.
    """

    kl: float
    kl_stderr: float
    quadratic: float
    quadratic_stderr: float
    measured: float
    measured_stderr: float
    softmax: float
    softmax_stderr: float
    network: float
    network_stderr: float
    ratio: float | None
    ratio_stderr: float | None
    sequences: int
    counted: int
    how: str = "forward"
    reason: str = ""
    parabolic: float | None = None
    parabolic_stderr: float | None = None
    parabolic_ratio: float | None = None
    parabolic_ratio_stderr: float | None = None
