"""Preference pairs: format, checks, tensors."""

from focusdpo.data.buckets import leave_out_misfits
from focusdpo.data.dataset import Encodings, PairBatch, PairDataset, PairSample, PairSizes, SizeBatches, collate
from focusdpo.data.lines import DatasetError, Problem
from focusdpo.data.records import PairRecord, Reference
from focusdpo.data.references import LongestSide, Placement, ReferenceRule
from focusdpo.data.validation import load_pairs

__all__ = [
    "DatasetError",
    "Encodings",
    "LongestSide",
    "PairBatch",
    "PairDataset",
    "PairRecord",
    "PairSample",
    "PairSizes",
    "Placement",
    "Problem",
    "Reference",
    "ReferenceRule",
    "SizeBatches",
    "collate",
    "leave_out_misfits",
    "load_pairs",
]
