"""Ways for other packages to use this one; each is imported on its own and needs its package."""
