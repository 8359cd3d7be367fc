"""The page of a training run: `focusdpo report`."""
