"""Symptom to probe to named cause to advice: why the pictures of a model are bad, or slow."""
