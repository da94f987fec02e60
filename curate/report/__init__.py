"""What a store says to people: scores and stores in words, a row explained, a dataset summed up, selections compared."""
