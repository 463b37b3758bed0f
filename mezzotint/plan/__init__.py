"""What a model will cost before anything runs: parameters, operations, memory, time and money."""
