"""Parts of ``distillation_throughput.py``: shapes, the steps that are compared, single kernels."""
