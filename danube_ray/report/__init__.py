"""One HTML page per run, made from its artifacts alone: it opens from disk and asks nothing of the network."""
