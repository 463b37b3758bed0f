"""Training: one loop, a file per method, run folders that survive anything."""
