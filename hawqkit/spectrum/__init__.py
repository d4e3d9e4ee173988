"""Spectra of a network and of its layers: density, top eigenpairs, rank, degeneracy.

Here the operators of a model meet the estimators. The modules are imported one by one.
"""
