"""What the kernels are looked at with, where there is no GPU to run them on."""
