"""The reference backend: all-to-all over torch.distributed or MPI, in plain torch; the definition of CONTRACT."""
