"""Metrics of generated images: similarity to references and prompts, leakage between subjects, FID, and their intervals.

prompts, images, regions: what is compared, checked by name. encoders, embeddings: features, computed once.
similarity, leakage, fid, bootstrap, shares: the numbers. report: what becomes of them. evaluation: all of it in turn.
"""

LEVEL = 0.95  # of an interval
RESAMPLES = 2000  # of a bootstrap interval
