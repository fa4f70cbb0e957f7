"""What layers take in the runtime: timed kernels, a table of them, and the times that planning adds up."""
