"""The latent states that training runs pass through, found from their weights."""
