"""Traces, eigenpairs, spectral densities and ranks of anything that multiplies vectors.

The modules are imported one by one, so that those without torch in them stay importable without it.
"""
