"""Tensors in, tensors out: the projections, the statistics and the autograd functions of SSN."""
