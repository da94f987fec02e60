"""What needs a backward pass: gradients and their inner products, along rows, pairs, sets and targets."""
