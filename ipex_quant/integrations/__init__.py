"""Integrations with other packages; import each one by itself, with its package installed."""
