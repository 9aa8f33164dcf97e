"""The sampling parameters of running requests. What is done with them is `kernels/sampling.py`."""
