"""Backbones for the host frameworks; their modules import mmdet or mmseg only when used."""
