"""The embedding server: loads a bundle and serves its codes over gRPC (`matvae-serve`)."""
