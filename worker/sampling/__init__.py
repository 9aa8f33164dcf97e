"""The sampling parameters of running requests, and what is read of their logits. What is computed is in `kernels/sampling.py`."""
