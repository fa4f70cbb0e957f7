"""What ``--data`` may be, and how it becomes seeded batches of named arrays."""
