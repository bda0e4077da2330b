"""One run: what is asked for, its settings, schedule and folder, and its stages."""
