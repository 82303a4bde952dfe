"""SmoothQuant: moving the outliers of an activation into the weights that consume it (arXiv 2211.10438)."""
