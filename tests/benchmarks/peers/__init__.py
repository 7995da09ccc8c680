"""rbee-worker beside other engines, on the same weights, the same machine and in the same run."""
