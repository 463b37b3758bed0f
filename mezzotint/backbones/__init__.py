"""The networks: they map a noisy input, a clock and a conditioning to a raw output, and do not know what noise is."""
