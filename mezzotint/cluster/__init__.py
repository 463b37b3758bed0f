"""Work in other processes, here or on many machines, by Ray: nobody else knows it."""

from mezzotint.cluster.cluster import Cluster

__all__ = ["Cluster"]
