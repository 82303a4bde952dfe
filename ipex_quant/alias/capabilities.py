"""``intel_extension_for_pytorch._C``: what public scripts ask of it."""
