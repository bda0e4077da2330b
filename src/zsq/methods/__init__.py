"""What stands in for the training data: one frozen dataclass of settings a method."""
