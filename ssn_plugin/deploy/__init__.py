"""After training: every SSN becomes the normalizer it chose."""

from ssn_plugin.deploy.collapse import collapse_ssn

__all__ = ['collapse_ssn']
