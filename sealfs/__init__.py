"""sealfs: encrypted disks for virtual machines, keys held by the host's TPM."""

__version__ = "0.1.0"
