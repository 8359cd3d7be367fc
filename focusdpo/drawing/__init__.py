"""Pictures made of tensors and numbers: masks over images, curves, sheets of samples."""
