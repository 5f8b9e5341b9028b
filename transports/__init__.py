"""Every way bytes and events move: rings, multicast, captures, files, NATS; and the compiled toolbox under them."""
