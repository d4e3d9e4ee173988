"""Scripts that exports carry as `apply.py`: each runs by itself, without hawqkit."""
