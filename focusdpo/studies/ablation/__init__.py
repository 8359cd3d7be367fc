"""The method taken apart: one run with one thing changed at a time, several seeds of each, judged by the same yardsticks."""
