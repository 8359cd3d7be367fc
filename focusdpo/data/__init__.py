"""Preference pairs: format, checks, tensors."""

from focusdpo.data.dataset import Encodings, PairBatch, PairDataset, PairSample, SizeBatches, collate
from focusdpo.data.records import DatasetError, PairRecord, Problem, Reference
from focusdpo.data.validation import load_pairs

__all__ = [
    "DatasetError",
    "Encodings",
    "PairBatch",
    "PairDataset",
    "PairRecord",
    "PairSample",
    "Problem",
    "Reference",
    "SizeBatches",
    "collate",
    "load_pairs",
]
