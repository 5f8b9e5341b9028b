"""Market data inside a node: events, protocols, books, calculations, the shard loop, the journal and delivery."""
