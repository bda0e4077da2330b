"""Full-integer LiteRT (TensorFlow Lite) files: their writer, and their runtime."""
