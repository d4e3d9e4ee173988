"""Numbers and names as a reader sees them, the same in the terminal, in figures and on the page."""

from __future__ import annotations

import math
import re

from hawqkit.records import CROSS_ENTROPY

DASH = "–"
ELLIPSIS = "…"
_LARGEST_LOSS = 300 * math.log(10)  # whose exponential is still said as a number

# Control characters drive a terminal, and bidirectional marks show a name as what it is not; lone
# surrogates cannot be written as UTF-8.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def clean(text: object) -> str:
    r"""Return text in which nothing can steer a terminal or a browser's direction of writing.

    >>> clean("a\x1b[31mb")
    'a\ufffd[31mb'
    """
    return _UNSAFE.sub("\N{REPLACEMENT CHARACTER}", str(text))


def with_error(value: float | None, stderr: float | None = None) -> str:
    """Return a value and its standard error, both to the error's second significant digit.

    >>> with_error(0.18263, 0.00612)
    '0.1826 ± 0.0061'
    >>> with_error(1234.5, 67.8), with_error(0.25), with_error(None)
    ('1234 ± 68', '0.25', '–')
    """
    if value is None or not math.isfinite(value):
        return DASH
    if stderr is None or not math.isfinite(stderr):
        return significant(value)
    places = _places(stderr, 2) if stderr > 0 else _places(value, 4)
    if places > 6:
        power = math.floor(math.log10(max(abs(value), stderr)))
        digits = min(max(places + power, 0), 4)
        scale = 10.0**power
        return f"({value / scale:.{digits}f} ± {stderr / scale:.{digits}f})e{power}"
    return f"{value:.{max(places, 0)}f} ± {stderr:.{max(places, 0)}f}"


def significant(value: float | None, digits: int = 4) -> str:
    """Return a number with so many significant digits, without trailing zeros.

    >>> significant(0.0123456), significant(81234.0), significant(0.0), significant(3e-9)
    ('0.01235', '81234', '0', '3e-09')
    """
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def fixed(value: float | None, places: int) -> str:
    """Return a number with so many decimal places.

    >>> fixed(4.0, 2), fixed(None, 2)
    ('4.00', '–')
    """
    return DASH if value is None or not math.isfinite(value) else f"{value:.{places}f}"


def perplexity(loss: float | None, places: int = 2) -> str:
    """Return exp(loss) with so many decimal places, as a power of ten where it is far too large.

    >>> perplexity(2.0), perplexity(25.0), perplexity(1e30), perplexity(None)
    ('7.39', '7.2e+10', 'over 1e300', '–')

    Args:
        loss: in nats.
        places: decimal places.
    """
    if loss is None or math.isnan(loss):
        return DASH
    if loss > _LARGEST_LOSS:
        return "over 1e300"
    value = math.exp(loss)
    return f"{value:.{places}f}" if value < 1e6 else f"{value:.1e}"


def compact(value: float | None) -> str:
    """Return a number in at most five characters where its magnitude allows, for dense tables.

    >>> [compact(v) for v in (0.0, 0.0042, 0.123, 4.56, 78.9, 1234.0, 3e-5, None)]
    ['0', '.0042', '.123', '4.56', '78.9', '1234', '3e-5', '–']
    """
    if value is None or not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    size = abs(value)
    if size < 5e-4 or size >= 1e5:
        return re.sub(r"e([-+])0*", lambda m: "e" + m[1].strip("+"), f"{value:.0e}")
    if size < 1:
        return f"{value:.{4 if size < 0.01 else 3}f}".replace("0.", ".", 1)
    return f"{value:.{max(2 - int(math.log10(size)), 0)}f}"


def megabytes(size: int | None) -> str:
    """Return bytes as megabytes of 10^6 bytes.

    >>> megabytes(169_620_480), megabytes(9_412), megabytes(None)
    ('169.62', '0.01', '–')
    """
    return DASH if size is None else f"{size / 1e6:.2f}"


def percent(share: float | None, places: int = 1) -> str:
    """Return a share of 1 as percent.

    >>> percent(0.8531), percent(None)
    ('85.3 %', '–')
    """
    return DASH if share is None or not math.isfinite(share) else f"{100 * share:.{places}f} %"


def percent_with_error(share: float, stderr: float) -> str:
    """Return a share of 1 and its standard error as percent.

    >>> percent_with_error(0.8531, 0.0061)
    '85.31 ± 0.61 %'
    """
    return f"{with_error(100 * share, 100 * stderr)} %"


def points(share: float, stderr: float) -> str:
    """Return the difference of two shares of 1 and its standard error in points of a hundred.

    >>> points(-0.0042, 0.0035)
    '-0.42 ± 0.35'
    """
    return with_error(100 * share, 100 * stderr)


def weights(count: int) -> str:
    """Return a number of weights: in millions, or in full where it is far below one.

    >>> weights(134_515_008), weights(2_320)
    ('134.5 million', '2,320')
    """
    return f"{count / 1e6:.1f} million" if count >= 1e5 else f"{count:,}"


def duration(seconds: float | None) -> str:
    """Return seconds as a reader would say them.

    >>> duration(0.94), duration(42.4), duration(231.5), duration(7260.0)
    ('0.9 s', '42 s', '3 min 52 s', '2 h 1 min')
    """
    if seconds is None:
        return DASH
    whole = round(seconds)
    if whole < 10:
        return f"{seconds:.1f} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def gigabytes(size: int | None) -> str:
    """Return bytes as GiB; 0 stands for memory that was not measured.

    >>> gigabytes(1_620_000_000), gigabytes(0)
    ('1.51 GiB', '–')
    """
    return f"{size / 2**30:.2f} GiB" if size else DASH


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """Return a count with its noun.

    >>> plural(1, "layer"), plural(210, "layer"), plural(2, "process", "processes")
    ('1 layer', '210 layers', '2 processes')
    """
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def shorten(name: str, width: int) -> str:
    """Return a name of at most `width` characters, its middle replaced by an ellipsis.

    The end of a layer's name tells more than its beginning, so two thirds go to the end.

    >>> shorten("model.layers.12.self_attn.q_proj", 20)
    'model.…f_attn.q_proj'
    """
    name = clean(name)
    if len(name) <= width:
        return name
    head = (width - 1) // 3
    return name[:head] + ELLIPSIS + name[len(name) - (width - 1 - head) :]


def short_class(name: str, width: int) -> str:
    """Return a class's name of at most `width` characters: its first synonym, cut at its end.

    >>> short_class("hammerhead, hammerhead shark", 16), short_class("black-footed ferret", 12)
    ('hammerhead', 'black-foote…')
    """
    first = clean(name).split(", ")[0]
    return first if len(first) <= width else first[: width - 1] + ELLIPSIS


def scale_of_ten(values: list[float]) -> int:
    """Return the power of ten, a multiple of 3, in whose units the largest lies in [1, 1000).

    >>> scale_of_ten([2e-5, 3e-4, 4e-3]), scale_of_ten([12.0]), scale_of_ten([])
    (-3, 0, 0)
    """
    largest = max(values, default=0.0)
    return 3 * math.floor(math.log10(largest) / 3) if largest > 0 else 0


def common_prefix(names: list[str]) -> str:
    """Return the dotted prefix that all names share, with its last dot.

    >>> common_prefix(["model.layers.0.up", "model.layers.1.up"]), common_prefix(["lm_head"])
    ('model.layers.', '')
    """
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1 or clean(column[0]) != column[0]:
            break
        shared.append(column[0])
    return ".".join([*shared, ""])


def loss_sentence(loss: str) -> str:
    """Return what KL and nats stand for where the loss is another; empty for the cross-entropy.

    >>> loss_sentence("cross-entropy")
    ''
    """
    if loss == CROSS_ENTROPY:
        return ""
    return (
        f"The loss of this probe is {clean(loss)}. Wherever KL and nats are named here, read what "
        "the mean of that loss grows by, to second order, in its own unit."
    )


def power_label(power: int) -> str:
    """Return the unit that goes with `scale_of_ten`.

    >>> power_label(-3), power_label(0)
    ('10⁻³ nats', 'nats')
    """
    digits = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{digits} nats" if power else "nats"


def _places(value: float, digits: int) -> int:
    """Return the decimal places that show so many significant digits of a value."""
    if value == 0:
        return digits
    return digits - 1 - math.floor(math.log10(abs(value)))
