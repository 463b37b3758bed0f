"""Defects: where they may lie, painting them on good images, and a data set others can use."""
