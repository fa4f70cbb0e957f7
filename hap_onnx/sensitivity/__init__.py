"""How much the outputs depend on each channel: traces, curvature, and scores made of them."""
