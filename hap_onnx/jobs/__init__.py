"""A run of ``compress``: rounds, candidates, gates, and what is kept for the next run."""
