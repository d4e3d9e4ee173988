"""Mixes that others made: what a quantized checkpoint or a configuration gives each layer.

A reader turns what it finds into names of formats. It follows the consumer's own rule of which
pattern wins, and a format that hawqkit has no name for is an error, never a guess.
"""

from hawqkit.targets.foreign.contract import ForeignMix
from hawqkit.targets.foreign.reading import read_foreign

__all__ = ["ForeignMix", "read_foreign"]
