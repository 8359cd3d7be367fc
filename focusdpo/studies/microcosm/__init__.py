"""The method on a world small enough to learn whole: a FLUX of a million weights or more, real photographs, minutes."""
