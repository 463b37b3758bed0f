"""The parts that backbones and codecs are built from, named as in the published weight files."""
