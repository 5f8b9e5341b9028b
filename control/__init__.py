"""Configuration and placement: the model of the configuration file, and the mapping of instruments to shards."""
