"""Models on disk: reading low-precision checkpoints, saving and loading directories."""
