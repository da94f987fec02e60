"""POLCA: what a training run's checkpoints say about the examples that no single loss curve shows. Imported when first used."""
