"""Exported graphs: made from a module, read, edited, their batch norms observed and folded."""
