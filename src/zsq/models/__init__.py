"""Networks and weights from outside."""
