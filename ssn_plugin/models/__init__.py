"""Backbones and a classifier head for the hosts, each of which is imported only when used."""
