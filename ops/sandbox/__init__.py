"""Runs generated code with its tests behind two guards."""
