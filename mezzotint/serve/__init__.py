"""The server: an HTTP API, a queue that loses nothing, a web page, and workers that share one network."""
