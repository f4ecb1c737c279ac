"""Training: from a data root to a bundle that the server loads (`matvae-train`). Read `pipeline` first."""
