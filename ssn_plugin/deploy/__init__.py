"""After training: every SSN becomes the normalizer it chose."""

from ssn_plugin.deploy.collapse import collapse_ssn
from ssn_plugin.deploy.constant_ratios import hold_ratios
from ssn_plugin.deploy.fold import find_foldable, fold_batch_norms

__all__ = ['collapse_ssn', 'find_foldable', 'fold_batch_norms', 'hold_ratios']
