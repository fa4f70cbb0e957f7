"""Which channels must go together: ids flow along the graph and join where tensors meet."""
