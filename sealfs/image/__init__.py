"""The sealed image: format, tree, journal, recovery, cache. Knows no FUSE, no TPM, no trio."""
