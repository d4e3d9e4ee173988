"""Quantization-aware fine-tuning: train what rounding will leave of a network."""
