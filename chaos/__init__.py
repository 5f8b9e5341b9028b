"""The checker of what a cluster has put out. Fault scenarios are not built yet."""
