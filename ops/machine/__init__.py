"""This machine: locks that die with their holder, processes and signals."""
