"""Process groups, the exchange of samples between replicas, and exact reductions."""
