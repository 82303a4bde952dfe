"""Models on disk: low-precision checkpoints that are read, directories that are written and loaded."""
