"""A model off the disk, ready for a pass: its weights, a LoRA adapter over them, one that is being trained, one without weights."""
