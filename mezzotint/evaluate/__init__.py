"""How far painted pictures are from real ones: distances with their noise floor, and a look for copies."""
