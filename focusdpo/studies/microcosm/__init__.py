"""The method on a world small enough to learn whole: a FLUX of a few million weights, real photographs, minutes."""
