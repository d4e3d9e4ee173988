"""Rounding of weights.

`rounding` does one matrix, `errors_of` its errors in many formats, `apply` a whole model and back.
"""
