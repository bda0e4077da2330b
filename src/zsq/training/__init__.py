"""The loop that trains, its losses and optimizers."""
