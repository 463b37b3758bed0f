"""Quality against time for a model at hand: which sampler, in how many steps, under what guidance."""
