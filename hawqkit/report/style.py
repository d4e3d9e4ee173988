"""How every figure is drawn: colors, sizes, and matplotlib made into deterministic inline SVG.

Colors are Okabe and Ito's (https://jfly.uni-koeln.de/color/), which the color-blind tell apart;
each series also has its own marker, so that a greyscale print loses nothing. Heat maps use color
maps whose lightness is monotone.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hawqkit.errors import Unsupported
from hawqkit.report.wording import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK = "#1b2430"
SOFT = "#66707c"
LINE = "#d5dae0"
BLUE, ORANGE, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
SKY, AMBER, YELLOW = "#56b4e9", "#e69f00", "#b8a900"
SERIES = (BLUE, ORANGE, GREEN, PINK, SKY, AMBER, INK, YELLOW, SOFT)
_FINE = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
LOSS_MAP = "YlGnBu"
DOUBT_MAP = "OrRd"

_STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],  # ships with matplotlib: the same layout on every machine
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "text.parse_math": False,  # a layer may be called "$x"
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.hashsalt": "hawqkit",
    "svg.fonttype": "none",  # text stays text: it can be searched, copied and read aloud
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@contextmanager
def styled() -> Iterator[None]:
    """Set hawqkit's style for the block, whatever the user's matplotlibrc says.

    Raises:
        Unsupported: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise Unsupported(
            "the report's figures need matplotlib, which is not installed; install it with "
            "`pip install 'hawqkit[plots]'` (or `pip install matplotlib`). The terminal tables of "
            "`hawqkit show` work without it."
        ) from error
    with mpl.rc_context(), warnings.catch_warnings():
        # A glyph that the measuring font lacks is drawn by the browser with a font of its own.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        mpl.rcdefaults()
        for key, value in _STYLE.items():
            mpl.rcParams[key] = value  # type: ignore[index]
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure, in inches, that knows no pyplot and no window."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def to_svg(figure: Figure, name: str, title: str) -> str:
    """Return a figure as an `<svg>` element to stand inside of a page.

    Args:
        figure: made by `new_figure` inside of `styled`.
        name: prefix of every id in it, so that several figures can share a page.
        title: what a screen reader says.
    """
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :].rstrip()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = text.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "").replace("xlink:", "")
    text = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    head, body = text.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*pt"', "", head)
    label = clean(title).replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return f'{head} role="img" aria-label="{label}">{body}\n'


def label(text: object) -> str:
    """Return a label that matplotlib draws as it is: it hides what begins with an underscore."""
    cleaned = clean(text)
    return f" {cleaned}" if cleaned.startswith("_") else cleaned


def light(color: tuple[float, float, float, float]) -> bool:
    """Return whether dark text reads better on this color."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3])
    return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.36


def bare(axes: Axes) -> None:
    """Take frame and tick marks away: for grids of cells."""
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def plain_log_ticks(axis: Axis) -> None:
    """Label a log axis with plain numbers, some even where it spans less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = sorted(axis.get_data_interval())
    view = axis.get_view_interval()
    decades = math.log10(max(high, view[1]) / max(min(low, view[0]), 1e-300)) if high > 0 else 1.0
    subs = (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
    axis.set_major_locator(LogLocator(base=10, subs=subs if decades > 0.4 else _FINE, numticks=14))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
