"""What a cluster has to stand: failovers under load, bad configurations; and the checker of what it has put out."""
