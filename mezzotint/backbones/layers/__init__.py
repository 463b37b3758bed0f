"""The parts every convolutional network here is built from, named as in the published weight files."""
