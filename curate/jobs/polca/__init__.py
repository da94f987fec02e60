"""Audits of a training run: what its checkpoints say about the examples that no single loss curve shows. Imported when first used."""
