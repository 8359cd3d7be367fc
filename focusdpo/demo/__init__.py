"""The demo: real photographs, a small dataset, a tiny FLUX checkpoint, and the real training path."""
