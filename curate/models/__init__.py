"""Models on the disk: where checkpoints are, in which order, and what a folder holds, by content."""
