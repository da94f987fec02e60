"""Sampled answers: what is asked of an engine (types), which engine serves a model here (engines, open), and the three engines."""
