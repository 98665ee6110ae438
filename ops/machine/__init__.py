"""This machine: locks that are freed when their holder dies, processes, and signals."""
