"""Measure mixes on held-out text, and set what was predicted beside it."""
