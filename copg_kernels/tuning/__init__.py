"""What `python -m copg_kernels.tune` is made of."""
