"""The web page of a server: rendered here, live by small scripts of its own, nothing from anywhere else."""
