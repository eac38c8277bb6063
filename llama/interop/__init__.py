"""Other formats of checkpoints: to read, convert, download and check them, and to plan what fits."""
