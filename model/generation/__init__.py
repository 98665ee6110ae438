"""Generation: rows that start and end at different times share a batch, a key-value cache and random streams."""
