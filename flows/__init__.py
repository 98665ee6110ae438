"""Compositions of the tasks."""
