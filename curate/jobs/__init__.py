"""What stands on top of a run: the demo, rounds of collecting, POLCA, the states of runs. Imported when first used."""
