"""Attention over packed rows, and products and elementwise operators compiled for a CPU."""
