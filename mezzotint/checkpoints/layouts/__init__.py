"""Original single-file layouts: for each network a table from its own names to the published folder's, and back."""
