"""Fault scenarios and their checker. Nothing here is built yet."""
