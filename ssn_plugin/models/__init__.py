"""Backbones and a classifier head for the frameworks, each of which is imported only when used."""
