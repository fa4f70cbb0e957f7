"""Cheaper replacements of layers: their factors, what they lose, and what they save."""
