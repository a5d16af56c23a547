"""Normalisation by a mixture of statistics: who computes it, and how."""
